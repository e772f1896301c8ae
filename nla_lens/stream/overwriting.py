"""What is still known of vectors whose tensor was written to.

Arithmetic in place leaves each vector at its place. `resid[0, 3] = other` puts other vectors there,
of which is known what was known of them. After anything else, and after what was written by way of
a view, nothing says which vector is where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.stream.origin import Origin, on_device

_ARITHMETIC: Final = frozenset(
    f"{name}_"
    for name in (
        "abs", "add", "addcdiv", "addcmul", "clamp", "clamp_max", "clamp_min", "clip", "div",
        "divide", "dropout", "lerp", "masked_fill", "mul", "multiply", "nan_to_num", "neg",
        "negative", "pow", "relu", "renorm", "round", "sqrt", "square", "sub", "subtract",
        "true_divide",
    )
)  # fmt: skip
_PUT: Final = (Tensor.__setitem__, Tensor.copy_)
_SET_DATA: Final = Tensor.data.__set__  # type: ignore[attr-defined]
_LEAVE_VALUES: Final = ("pin_memory_", "rename_", "requires_grad_", "share_memory_")


def version(tensor: Tensor) -> int | None:
    """How often a tensor's memory was written to, by whatever view; None where torch does not say.

    It does not count in inference mode, nor what numpy writes.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return None if tensor.is_inference() else tensor._version


def writes(func: Any) -> bool:
    """Whether a function of torch, as `__torch_function__` gets it, changes what it is given."""
    return func in _PUT or func == _SET_DATA or is_in_place(func)


def is_in_place(func: Any) -> bool:
    """Whether a function of torch changes and answers what it is given."""
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def after_writing(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    origin: Origin,
    known: Callable[[Any], Origin | None],
    leading_index: Callable[[Any, Tensor], tuple[Any, ...] | None],
) -> Origin:
    """What is known of the tensor that `func` has written to.

    Args:
        func: One that `writes`.
        args: What it was called with, the tensor first.
        kwargs: The same.
        origin: What was known before.
        known: What is known of an argument.
        leading_index: The part of an index that concerns the leading axes, None if it reaches into
            d_model.
    """
    name = getattr(func, "__name__", "")
    if name in _ARITHMETIC or name in _LEAVE_VALUES or name.startswith("__i"):
        return origin
    if func in _PUT:
        try:
            return _after_putting(func, args, kwargs, origin, known, leading_index)
        # What is odd enough to fail for the table alone is not known; torch has its own say.
        except (IndexError, NLAError, RuntimeError, TypeError, ValueError):
            pass
    return forgotten(origin)


def _after_putting(
    func: Any, args: Any, kwargs: Any, origin: Origin, known: Any, leading_index: Any
) -> Origin:
    is_copy = func is Tensor.copy_
    index = ... if is_copy else args[1]
    value = args[1 if is_copy else 2] if len(args) > 1 else kwargs.get("src")
    leading = leading_index(index, args[0])
    # Into d_model: as arithmetic, each vector changed where it is.
    return origin if leading is None else _put(origin, leading, known(value))


def _put(origin: Origin, index: tuple[Any, ...], value: Origin | None) -> Origin:
    """The same with other vectors at an index; None are vectors of which nothing is known."""
    there = origin.at(index)
    if value is not None and _are_one(value, there):
        # `resid[0] += other` puts back what it took out.
        return origin
    put = forgotten(there) if value is None else value

    def join(tables: Sequence[Tensor]) -> Tensor:
        # Layers share one table of places: it is never written to.
        whole_LXC, part_PXC = tables[0].clone(), tables[1]
        whole_LXC[on_device(index, whole_LXC)] = part_PXC.expand(*there.leading, -1)
        return whole_LXC

    return Origin.joined([origin, put], join)


def _are_one(a: Origin, b: Origin) -> bool:
    """Whether two were taken from the same place of one table; a device is not waited for."""
    one, other = a.where_LX3, b.where_LX3
    return (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
    ) and replace(a, where_LX3=other, which_LX1=None) == replace(b, which_LX1=None)


def forgotten(origin: Origin) -> Origin:
    """Vectors of which no more is known than who can explain them."""
    recordings = tuple(replace(r, hook_name=None, to_token=None) for r in origin.recordings)
    unknown = Origin.unknown(origin.leading).where_LX3.to(origin.where_LX3.device)
    return replace(origin, hook_name=None, to_token=None, where_LX3=unknown, recordings=recordings)
