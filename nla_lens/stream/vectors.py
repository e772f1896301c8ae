"""What a caller may hand to `explain`, checked and brought into one form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, Final, TypeAlias

import numpy as np
import psutil
import torch
from torch import Tensor

from nla_lens.errors import NLAError, first_line
from nla_lens.models.ambient import undisturbed
from nla_lens.stream.origin import Origin
from nla_lens.stream.residual import ResidualTensor

VectorsLike: TypeAlias = "Tensor | np.ndarray[Any, Any] | Sequence[Any]"

_TAKEN: Final = "a list of them, a pandas column of lists or floats by themselves will do, too"
_DEEPEST: Final = 16
_KINDS: Final = (Tensor, torch.nn.Parameter, torch.nn.Buffer, ResidualTensor)


class _Unfit(Exception):
    """Why something is no vectors; the caller's own error says the rest."""


@dataclass(frozen=True)
class VectorBatch:
    """Checked vectors in row-major order.

    Attributes:
        vectors_ND: `[n, d]` float32 on the CPU, finite, none all zero.
        shape: Leading axes of the input; () for a single vector.
        origin: Where they came from, flattened to `[n, 3]`; None when not known.
    """

    vectors_ND: Tensor
    shape: tuple[int, ...]
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.vectors_ND)


@undisturbed()
def check_vectors(vectors: VectorsLike, d_model: int) -> VectorBatch:
    """Brings vectors of any float dtype, device and number of leading axes into one form.

    Args:
        vectors: A tensor, an array, or what becomes one. Members of a list are stacked where they
            are of one shape; else their vectors come one behind the other, `[n, d]`.
        d_model: Length of a vector.

    Raises:
        NLAError: Something else, integers, a last axis other than `d_model`, more than fits into
            memory, NaN or infinity, or an all-zero vector; names the value, the place and the
            remedy.
    """
    try:
        given = _as_tensor(vectors, "vectors")
    except _Unfit as unfit:
        reason = f": {unfit}" if str(unfit) else ""
        raise NLAError(
            f"vectors must be a torch tensor or a numpy array, found {type(vectors).__name__}"
            f"{reason}. {_TAKEN[0].upper()}{_TAKEN[1:]}"
        ) from unfit.__cause__
    if given.ndim == 0 or given.shape[-1] != d_model:
        raise NLAError(
            f"vectors have shape {tuple(given.shape)}; this NLA reads vectors of width "
            f"d_model={d_model} (last axis), from its own source model"
        )
    shape = tuple(given.shape[:-1])
    origin = given.known_origin() if isinstance(given, ResidualTensor) else None
    # A copy: the caller may go on writing into the tensor while explanations are still due.
    try:
        plain_LD = _plain(given).detach().cpu()
        vectors_ND = plain_LD.reshape(-1, d_model).to(torch.float32, copy=True)
        _check_values(vectors_ND, shape)
    # torch's own words are of control flow, or of tensors to be converted.
    except (RuntimeError, AssertionError) as error:
        raise NLAError(
            f"vectors have no values that can be read here ({first_line(error):.200}): "
            "inside torch.func.vmap or FakeTensorMode nothing can be explained; do it outside"
        ) from error
    return VectorBatch(vectors_ND, shape, None if origin is None else origin.flat())


def _as_tensor(vectors: Any, name: str) -> Tensor:
    """Floating-point values as a tensor; a ResidualTensor where something is known of them.

    Args:
        vectors: What a caller handed over.
        name: What messages call it: `vectors[2]` for a member.
    """
    if isinstance(vectors, Tensor):
        return _checked(vectors, name)
    if isinstance(vectors, str):
        raise _Unfit(_about(name, "a text, which explain_text reads"))
    if isinstance(vectors, Mapping):
        raise _Unfit(_about(name, f"a mapping with the keys {list(vectors)[:4]!r:.80}; pass one"))
    if isinstance(vectors, bytes):
        raise _Unfit("" if name == "vectors" else f"{name} is bytes")
    if isinstance(vectors, (list, tuple)):
        if all(isinstance(member, Number) for member in vectors):
            return _checked(_from_numpy(np.asarray(vectors), name), name)
        return _joined(vectors, name)
    if isinstance(vectors, Number) and name != "vectors":
        raise _Unfit(_about(name, f"the number {vectors!r:.40} beside others that are none"))
    array = _as_array(vectors, name)
    if isinstance(array, Tensor):
        return _checked(array, name)
    if isinstance(array, list) or (array.dtype.kind == "O" and array.ndim):
        # A pandas column of lists, say.
        return _as_tensor(list(array), name)
    return _checked(_from_numpy(array, name), name)


def _as_array(vectors: Any, name: str) -> Any:
    """A numpy array over what somebody else's object holds, a tensor, or a list of its members."""
    try:
        if any(hasattr(vectors, n) for n in ("__array__", "__array_interface__")):
            return np.asanyarray(vectors)
        if hasattr(vectors, "__dlpack__"):
            return torch.utils.dlpack.from_dlpack(vectors)
        if isinstance(vectors, Number):
            return np.asarray(vectors)
        with contextlib.suppress(TypeError):
            return np.asarray(memoryview(vectors))
        if isinstance(vectors, Sequence):
            return list(vectors)
    # Whatever somebody else's `__array__` raises.
    except Exception as error:
        what = f"a {type(vectors).__name__} that does not become an array"
        raise _Unfit(_about(name, f"{what} ({type(error).__name__}: {error!s:.200})")) from error
    if isinstance(vectors, Iterator):
        raise _Unfit(_about(name, "an iterator; pass list(...) of it"))
    if hasattr(vectors, "keys"):
        raise _Unfit(
            _about(name, f"a {type(vectors).__name__} of several; pass one of its entries")
        )
    raise _Unfit("" if name == "vectors" else f"{name} is a {type(vectors).__name__}")


def _from_numpy(array: np.ndarray[Any, Any], name: str) -> Tensor:
    kind, dtype = array.dtype.kind, array.dtype
    if kind == "V" and "float" in dtype.name and dtype.names is None:
        # ml_dtypes' bfloat16 and float8, as JAX has them.
        array = array.astype(np.float32)
    elif kind not in "fiubc":
        raise _Unfit(_about(name, f"an array of dtype {dtype}"))
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise _Unfit(_about(name, "a masked array with masked values; fill or drop them"))
    _check_size(array.size, f"vectors of shape {array.shape}")
    # Copied even where it need not be: PyTorch warns about read-only arrays.
    array = np.array(array, order="C", subok=False)
    if kind == "f" and array.dtype.itemsize > 4:
        # Also what PyTorch has no name for: long double, and the other byte order.
        array = array.astype(np.float64)
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise _Unfit(_about(name, f"an array of dtype {dtype}")) from error


def _checked(given: Tensor, name: str) -> Tensor:
    """A dense tensor of floats that fits into memory."""
    if given.is_meta:
        raise _Unfit(_about(name, "on the meta device, which holds no values"))
    if not given.is_floating_point():
        verb = "are" if name == "vectors" else "is"
        raise NLAError(
            f"{name} {verb} {given.dtype}; residual-stream vectors are floating point. Token ids "
            "given by mistake?"
        )
    if given.is_nested:
        raise _Unfit(_about(name, "a nested tensor; pass list(...) of its parts"))
    _check_size(given.numel(), f"vectors of shape {tuple(given.shape)}")
    if type(given) not in _KINDS:
        return _from_subclass(given, name)
    if given.layout == torch.strided:
        return given
    try:
        return _plain(given).detach().to_dense()
    except RuntimeError as error:
        raise _Unfit(_about(name, f"of layout {given.layout} ({error!s:.200})")) from error


def _from_subclass(given: Tensor, name: str) -> Tensor:
    """The values of a tensor that answers for itself what torch asks of it."""
    try:
        return torch.from_numpy(np.array(given.detach().cpu().float().numpy()))
    # Whatever somebody else's `__torch_dispatch__` raises.
    except Exception as error:
        what = f"a {type(given).__name__} that gives no values ({type(error).__name__})"
        raise _Unfit(_about(name, what)) from error


def _joined(members: Sequence[Any], name: str) -> Tensor:
    """Members stacked, or their vectors one behind the other; each keeps what is known of it."""
    if name.count("[") >= _DEEPEST:
        raise _Unfit(f"nested deeper than {_DEEPEST} lists")
    tensors = [_as_tensor(member, f"{name}[{i}]") for i, member in enumerate(members)]
    for i, tensor in enumerate(tensors):
        if tensor.shape[-1:] != tensors[0].shape[-1:]:
            raise _Unfit(
                f"{name}[{i}] has shape {tuple(tensor.shape)}, {name}[0] "
                f"{tuple(tensors[0].shape)}; vectors are of one width"
            )
    _check_size(sum(tensor.numel() for tensor in tensors), f"the {len(tensors)} members of {name}")
    tensors = [tensor.detach().cpu().float() for tensor in tensors]
    if any(isinstance(tensor, ResidualTensor) for tensor in tensors):
        tensors = [_as_residual(tensor) for tensor in tensors]
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(tensors)
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


def _as_residual(tensor: Tensor) -> ResidualTensor:
    origin = tensor.known_origin() if isinstance(tensor, ResidualTensor) else None
    return ResidualTensor.wrap(tensor, origin or Origin.unknown(tensor.shape[:-1]))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_ordinary() if isinstance(tensor, ResidualTensor) else tensor


def _about(name: str, what: str) -> str:
    return what if name == "vectors" else f"{name} is {what}"


def _check_size(n_values: int, what: str) -> None:
    """Refuses what takes more memory than there is, before any is taken."""
    needed, free = 4 * n_values, psutil.virtual_memory().available
    if needed > free:
        raise NLAError(
            f"{what} take {needed / 1e9:,.1f} GB in float32, and {free / 1e9:,.1f} GB are free; "
            "explain them in pieces, such as vectors[:10_000]"
        )


def _check_values(vectors_ND: Tensor, shape: tuple[int, ...]) -> None:
    finite = vectors_ND.isfinite().all(-1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        bad = vectors_ND[row][~vectors_ND[row].isfinite()][0].item()
        raise NLAError(
            f"the vector at {_place(row, shape)} holds {bad} in float32; drop it, or find out "
            "why the model overflowed (float16?)"
        )
    nonzero = vectors_ND.ne(0).any(-1)
    if not nonzero.all():
        row = int((~nonzero).nonzero()[0])
        raise NLAError(
            f"the vector at {_place(row, shape)} is all zero: it has no direction to "
            "explain; drop it"
        )


def _place(row: int, shape: tuple[int, ...]) -> str:
    return "index " + str(tuple(int(i) for i in np.unravel_index(row, shape))) if shape else "hand"
