"""What a caller may hand to `explain`, checked and brought into one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.stream.residual import Origin, ResidualTensor

VectorsLike: TypeAlias = "Tensor | np.ndarray[Any, Any]"


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


def check_vectors(vectors: VectorsLike, d_model: int) -> VectorBatch:
    """Brings vectors of any float dtype, device and number of leading axes into one form.

    Raises:
        NLAError: Integers, a last axis other than `d_model`, NaN or infinity, or an all-zero
            vector; names the value, the place and the remedy.
    """
    origin = vectors.origin if isinstance(vectors, ResidualTensor) else None
    given = _as_tensor(vectors)
    if not given.is_floating_point():
        raise NLAError(
            f"vectors are {given.dtype}; residual-stream vectors are floating point. Token ids "
            "given by mistake?"
        )
    if given.ndim == 0 or given.shape[-1] != d_model:
        raise NLAError(
            f"vectors have shape {tuple(given.shape)}; this NLA reads vectors of width "
            f"d_model={d_model} (last axis), from its own source model"
        )
    shape = tuple(given.shape[:-1])
    # A copy: the caller may go on writing into the tensor while explanations are still due.
    vectors_ND = given.reshape(-1, d_model).to(torch.float32, copy=True)
    _check_values(vectors_ND, shape)
    if origin is not None:
        flat = origin.where_LX3.reshape(-1, 3).cpu()
        origin = Origin(origin.hook_name, flat, origin.to_token, origin.nla)
    return VectorBatch(vectors_ND, shape, origin)


def _as_tensor(vectors: VectorsLike) -> Tensor:
    if isinstance(vectors, ResidualTensor):
        vectors = vectors.as_ordinary()
    try:
        if isinstance(vectors, Tensor):
            return vectors.detach().to_dense().cpu()
        # Copied even where it need not be: PyTorch warns about read-only arrays.
        array = np.array(vectors, order="C")
        if array.dtype.kind == "f" and array.dtype.itemsize > 4:
            # Also what PyTorch has no name for: long double, and the other byte order.
            array = array.astype(np.float64)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, RuntimeError) as error:
        raise NLAError(
            f"vectors must be a torch tensor or a numpy array, found {type(vectors).__name__}: "
            f"{error}"
        ) from error


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
