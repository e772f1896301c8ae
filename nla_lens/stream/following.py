"""Which functions of torch leave vectors whole, and where they put each of them.

What a listed function does to the vectors of a tensor `[*leading, d_model]`, it is made to do to a
small table `[*leading, C]` of what is known of them, too; so nothing is known of a vector but what
followed it. A function that is not listed, or that reaches into d_model, is not followed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from nla_lens.stream.origin import Origin

Follower: TypeAlias = "Callable[..., Any]"
"""As `origin_of`."""

_ALONG: Final = {
    "chunk": "chunks dim=0",
    "flip": "*dim",
    "gather": "dim index",
    "index_select": "dim index",
    "narrow": "dim start length",
    "narrow_copy": "dim start length",
    "repeat_interleave": "repeats dim=None",
    "roll": "shifts dim=None",
    "select": "dim index",
    "split": "split_size dim=0",
    "split_with_sizes": "split_sizes dim=0",
    "take_along_dim": "indices dim=None",
    "tensor_split": "indices_or_sections dim=0",
    "unbind": "dim=0",
}
"""Functions along one axis or some, with the names of what they take beside the tensor."""
_GATHERING: Final = (torch.gather, Tensor.gather, torch.take_along_dim, Tensor.take_along_dim)
_TOLD_ON_THE_CPU: Final = (torch.tensor_split, Tensor.tensor_split)
_SAME: Final = (
    "bfloat16", "clone", "contiguous", "cpu", "cuda", "data", "detach", "double", "float",
    "half", "pin_memory", "requires_grad_", "share_memory_", "to", "type", "type_as", "xpu",
)  # fmt: skip
_RESHAPING: Final = (
    "atleast_1d", "atleast_2d", "atleast_3d", "flatten", "ravel", "reshape", "reshape_as",
    "squeeze", "unflatten", "unsqueeze", "view", "view_as",
)  # fmt: skip
_EXPANDING: Final = ["broadcast_to", "expand", "expand_as"]
_PERMUTING: Final = (
    "H", "T", "adjoint", "fliplr", "flipud", "mH", "mT", "moveaxis", "movedim", "permute",
    "rot90", "swapaxes", "swapdims", "t", "transpose",
)  # fmt: skip
_SPLITTING: Final = ["dsplit", "hsplit", "vsplit", "repeat", "tile"]
_JOINING: Final = ["cat", "concat", "concatenate", "hstack", "row_stack", "stack", "vstack"]


def origin_of(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Any,
    known: Callable[[Any], Origin | None],
) -> Any:
    """What is known of what `func` answered: an Origin, a list with one for each tensor, or None.

    Args:
        func: As `__torch_function__` gets it.
        args: What it was called with.
        kwargs: The same.
        result: What it answered.
        known: What is known of an argument.
    """
    follower = followers().get(func)
    if follower is None or kwargs.get("out") is not None:
        return None
    try:
        return follower(func, args, dict(kwargs), result, known)
    # What is odd enough to fail for the table alone is not known; the caller has the result.
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None


@functools.cache
def followers() -> Mapping[Any, Follower]:
    """The follower of each listed function."""
    kinds: list[tuple[Sequence[str], Follower]] = [
        (_SAME, _same),
        (_RESHAPING, _reshaped),
        (_EXPANDING, _expanded),
        (_PERMUTING, _permuted),
        (_SPLITTING, _redone),
        (_JOINING, _joined),
    ]
    kinds += [([name], functools.partial(_along, takes=takes)) for name, takes in _ALONG.items()]
    found: dict[Any, Follower] = {}
    for names, follower in kinds:
        for name in names:
            for holder in (Tensor, torch):
                func = getattr(holder, name, None)
                if inspect.isgetsetdescriptor(func):
                    func = func.__get__
                if callable(func):
                    found[func] = follower
    return found


def _subject(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The tensor that a function is about, and its other positional arguments."""
    if args:
        return args[0], args[1:]
    return next((kwargs.pop(name) for name in ("input", "tensor") if name in kwargs), None), ()


def _same(func: Any, args: Any, kwargs: Any, result: Any, known: Any) -> Any:
    """Each vector stays where it is; its dtype or device may change."""
    tensor, _ = _subject(args, kwargs)
    origin = known(tensor)
    if origin is None or not isinstance(result, Tensor) or not result.is_floating_point():
        return None
    return origin if result.shape == tensor.shape else None


def _reshaped(func: Any, args: Any, kwargs: Any, result: Any, known: Any) -> Any:
    """Row-major order stays: vector i is still vector i, if vectors are still of that length."""
    tensor, _ = _subject(args, kwargs)
    origin = known(tensor)
    if origin is None or not _is_of_vectors(result, tensor) or result.numel() != tensor.numel():
        return None
    # `view` with a dtype reads the bits as something else.
    if result.dtype != tensor.dtype:
        return None
    table_LXC = origin.table_LXC
    return origin.moved(table_LXC.reshape(*result.shape[:-1], table_LXC.shape[-1]))


def _expanded(func: Any, args: Any, kwargs: Any, result: Any, known: Any) -> Any:
    tensor, _ = _subject(args, kwargs)
    origin = known(tensor)
    if origin is None or not _is_of_vectors(result, tensor):
        return None
    table_LXC = origin.table_LXC
    return origin.moved(table_LXC.expand(*result.shape[:-1], table_LXC.shape[-1]))


def _permuted(func: Any, args: Any, kwargs: Any, result: Any, known: Any) -> Any:
    """Axes change places: asked of a small tensor whether the last one stays what it is."""
    tensor, rest = _subject(args, kwargs)
    origin = known(tensor)
    if origin is None:
        return None
    canary = torch.arange(3, device="cpu").expand(*[1] * (tensor.ndim - 1), 3)
    moved = func(canary, *rest, **kwargs)
    if moved.shape[-1:] != (3,) or moved.flatten().tolist() != [0, 1, 2]:
        return None
    return _redo(func, origin, rest, kwargs, result)


def _redone(func: Any, args: Any, kwargs: Any, result: Any, known: Any) -> Any:
    """d_model is whole if it is as long as before."""
    tensor, rest = _subject(args, kwargs)
    origin = known(tensor)
    parts = [result] if isinstance(result, Tensor) else result
    if origin is None or not all(_is_of_vectors(part, tensor) for part in parts):
        return None
    return _redo(func, origin, rest, kwargs, result)


def _along(func: Any, args: Any, kwargs: Any, result: Any, known: Any, *, takes: str) -> Any:
    """Vectors are picked along axes that are not d_model."""
    tensor, rest = _subject(args, kwargs)
    origin = known(tensor)
    if origin is None:
        return None
    dims = _dims(takes.split(), rest, kwargs)
    last = tensor.ndim - 1
    if not dims or not all(isinstance(dim, int) and dim % tensor.ndim != last for dim in dims):
        return None
    parts = [result] if isinstance(result, Tensor) else result
    if not all(_is_of_vectors(part, tensor) for part in parts):
        return None
    here, width = origin.where_LX3.device, origin.table_LXC.shape[-1]
    gathers, stays = func in _GATHERING, func in _TOLD_ON_THE_CPU
    indices = [v for v in (*rest, *kwargs.values()) if isinstance(v, Tensor)]
    if gathers and not all(_is_same_for_all(index, tensor) for index in indices):
        return None

    def follow(value: Any) -> Any:
        if not isinstance(value, Tensor) or stays:
            return value
        value = value.to(here)
        return value[..., :1].expand(*value.shape[:-1], width) if gathers else value

    rest = tuple(follow(value) for value in rest)
    kwargs = {name: follow(value) for name, value in kwargs.items()}
    return _redo(func, origin, rest, kwargs, result)


def _is_same_for_all(index: Tensor, tensor: Tensor) -> bool:
    """Whether an index for each coordinate is the same for all coordinates of a vector."""
    return index.ndim == tensor.ndim and (index.shape[-1] == 1 or index.stride(-1) == 0)


def _dims(takes: list[str], rest: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The axes that a function is told of; () for none."""
    if takes == ["*dim"]:
        found: Any = kwargs.get("dims", rest[0] if len(rest) == 1 else rest)
    else:
        i = next(i for i, name in enumerate(takes) if name.startswith("dim"))
        default = {"dim=0": 0}.get(takes[i])
        named = next((kwargs[n] for n in ("dim", "dims", "axis") if n in kwargs), default)
        found = rest[i] if len(rest) > i else named
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _redo(func: Any, origin: Origin, rest: Any, kwargs: Any, result: Any) -> Any:
    """Does to the table what was done to the tensor; None where the two do not agree."""
    done = func(origin.table_LXC, *rest, **kwargs)
    if isinstance(result, Tensor):
        return origin.moved(done) if done.shape[:-1] == result.shape[:-1] else None
    return [
        origin.moved(table) if table.shape[:-1] == part.shape[:-1] else None
        for table, part in zip(done, result, strict=True)
    ]


def _joined(func: Any, args: Any, kwargs: Any, result: Any, known: Any) -> Any:
    """Tensors of which all are known; empty ones have nothing to be known."""
    rest = args[1:]
    tensors = args[0] if args else kwargs.pop("tensors", None)
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) for t in tensors):
        return None
    name = func.__name__
    n_axes = max(t.ndim for t in tensors) + (name == "stack")
    axis = rest[0] if rest else kwargs.get("dim", kwargs.get("axis", 0))
    if name in ("vstack", "row_stack"):
        axis, n_axes = 0, max(2, n_axes)
    elif name == "hstack":
        axis = min(1, n_axes - 1)
    if not isinstance(axis, int) or axis % n_axes == n_axes - 1:
        return None
    parts = [(t, known(t)) for t in tensors if t.numel() or known(t) is not None]
    if not parts or not all(o is not None and _is_of_vectors(result, t) for t, o in parts):
        return None
    origins = [origin for _, origin in parts]
    origin = Origin.joined(origins, lambda tables: func(tables, *rest, **kwargs))
    return origin if origin.leading == result.shape[:-1] else None


def _is_of_vectors(result: Any, tensor: Tensor) -> bool:
    return isinstance(result, Tensor) and result.shape[-1:] == tensor.shape[-1:]
