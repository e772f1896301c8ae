"""Matrix products of a float32 model on a CPU by oneDNN, which torch carries and rarely calls.

`torch.nn.functional.linear` multiplies float32 by MKL, which keeps to AVX2 on processors that are
not Intel's; oneDNN writes AVX-512 code for all of them: twice as fast from about 8 rows on an AMD
EPYC (Zen 5), and no slower for one row. Both sum in float32, in another order.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WORTH_A_CALL: Final = 2**18
"""Multiplications of a product under which oneDNN's longer way in costs more than it saves."""


class _ByOneDNN(TorchFunctionMode):
    """While it is active, `linear` in this thread goes to oneDNN."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Other kinds of tensors (quantized weights, say) bring a product of their own.
    plain = x.is_cpu and type(weight) in (Tensor, torch.nn.Parameter)
    suits = plain and x.dtype is weight.dtype is torch.float32 and not torch.is_grad_enabled()
    if suits and x.numel() * weight.shape[0] >= _WORTH_A_CALL:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def products_by_onednn(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What to run a model in; changes nothing where oneDNN is no faster or not there."""
    return _ByOneDNN() if device.type == "cpu" and _is_faster() else contextlib.nullcontext()


def _is_faster() -> bool:
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
