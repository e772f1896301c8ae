"""Matrix products of a float32 model on a CPU by oneDNN, which torch carries and rarely calls.

`torch.nn.functional.linear` multiplies float32 by MKL, which keeps to AVX2 on processors that are
not Intel's; oneDNN writes AVX-512 code for all of them: twice as fast from about 8 rows on an AMD
EPYC (Zen 5), and no slower for one row. Both sum in float32, in another order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from nla_lens.models.passes import OwnPass, current_pass

_WORTH_A_CALL: Final = 2**18
"""Multiplications of a product under which oneDNN's longer way in costs more than it saves."""


class _Here(threading.local):
    """Where a thread multiplies by oneDNN.

    Attributes:
        passes: The passes that entered a `ByOneDNN`, the innermost last; None for none of ours.
    """

    def __init__(self) -> None:
        self.passes: list[OwnPass | None] = []


_here = _Here()


class ByOneDNN:
    """The linear layers of a model; while it is entered they multiply by oneDNN.

    They do so in the thread that entered it, and there in the pass of ours that it is in, if any.
    Layers that somebody gave a `forward` of their own, or another class, stay as they are. Where
    oneDNN is no faster, nothing changes.

    Not a torch function mode: one that has to look at each call of torch costs a tenth of a decode
    step of few rows.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args:
        model: A model on any device; only products on a CPU are concerned.
        """
        self._layers: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        self._n_entered = 0
        if is_faster():
            self._layers = [
                (module, partial(_forward, module))
                for module in model.modules()
                if type(module) is nn.Linear and module.weight.device.type == "cpu"
            ]

    def __enter__(self) -> None:
        _here.passes.append(current_pass())
        self._n_entered += 1
        try:
            for layer, forward in self._layers:
                layer.__dict__.setdefault("forward", forward)
        # A Ctrl-C.
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        self._n_entered -= 1
        try:
            _here.passes.pop()
        finally:
            try:
                self._clean()
            # May be done again where it was interrupted.
            except BaseException:
                self._clean()
                raise

    def _clean(self) -> None:
        if self._n_entered:
            return
        for layer, forward in self._layers:
            if layer.__dict__.get("forward") is forward:
                del layer.__dict__["forward"]


def _forward(layer: Any, x: Tensor) -> Tensor:
    passes = _here.passes
    if passes and passes[-1] is current_pass() and (passes[-1] is None or passes[-1].acts()):
        return linear(x, layer.weight, layer.bias)
    return nn.functional.linear(x, layer.weight, layer.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, by oneDNN where it takes the tensors and is worth it."""
    # Other kinds of tensors (quantized weights, say) bring a product of their own.
    plain = x.is_cpu and type(weight) in (Tensor, nn.Parameter)
    suits = plain and x.dtype is weight.dtype is torch.float32 and not torch.is_grad_enabled()
    if suits and x.numel() * weight.shape[0] >= _WORTH_A_CALL and is_faster():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, bias)


@cache
def is_faster() -> bool:
    """Whether this processor, and this torch, are ones that gain by it."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
