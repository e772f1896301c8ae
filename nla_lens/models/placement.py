"""Where a model's weights go and in which form: what a caller wishes, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nla_lens.errors import NLAError, first_line


@dataclass(frozen=True)
class Placement:
    """The caller's wishes about how weights are loaded; passed on to whatever loads them."""

    dtype: Any = None
    device: Any = None
    device_map: Any = None
    quantization_config: Any = None
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls,
        dtype: Any,
        device: Any,
        device_map: Any = None,
        quantization_config: Any = None,
        trust_remote_code: bool = False,
    ) -> Placement:
        """What a caller said, checked.

        Raises:
            NLAError: No such dtype or device, or a device and a device map.
        """
        if device is not None and device_map is not None:
            raise NLAError(
                f"device={device!r} and device_map={device_map!r} are both given; pass one"
            )
        where = (torch_device(device), device_map, quantization_config, trust_remote_code)
        return cls(torch_dtype(dtype), *where)


def torch_device(device: Any) -> Any:
    """A torch device from its name; None is passed on.

    Raises:
        NLAError: No such device, or not on this machine.
    """
    import torch

    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    # PyTorch without CUDA raises an AssertionError.
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = first_line(error)
        raise NLAError(f"device={device!r} cannot be used on this machine: {reason}") from error


def torch_dtype(dtype: Any) -> Any:
    """A torch dtype from its name; anything else is passed on.

    Raises:
        NLAError: Not the name of a floating-point dtype.
    """
    import torch

    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise NLAError(f"dtype={dtype!r} is not a floating-point dtype such as torch.bfloat16")
    return found
