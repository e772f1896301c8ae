"""The mean that some trainers subtract from vectors: a file beside the sidecar that names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.errors import NLAError

if TYPE_CHECKING:
    from torch import Tensor

_NAMES: Final = tuple(
    f"{centre}_mean.{kind}" for centre in ("centre", "center") for kind in ("npy", "safetensors")
)


def mean_file(av: Checkpoint, ar: Checkpoint | None) -> str | None:
    """The file that the sidecars of a pair name.

    Raises:
        NLAError: One half is centred and the other is not; or such a file lies there and no sidecar
            says what it is for.
    """
    for half in filter(None, (av, ar)):
        home = half.sidecar.path.parent
        lies = [d / n for d in (half.path, home) for n in _NAMES if (d / n).is_file()]
        if lies and half.sidecar.centre_mean is None:
            raise NLAError(
                f"{lies[0]} lies there, and {half.sidecar.path} does not say what it is for; if "
                "the mean is subtracted from vectors, say so: extraction: {centre_mean: "
                f"{lies[0].name}}}"
            )
    if ar is not None and (av.sidecar.centre_mean is None) != (ar.sidecar.centre_mean is None):
        raise NLAError(
            f"contradictory centre_mean: {av.sidecar.path} says {av.sidecar.centre_mean!r}; "
            f"{ar.sidecar.path} says {ar.sidecar.centre_mean!r}; a centred half does not belong to "
            "one that is not"
        )
    return av.sidecar.centre_mean


def load_mean(av: Checkpoint, ar: Checkpoint | None, d_model: int) -> Tensor | None:
    """The mean, `[d]` float32; None where vectors are taken as they are.

    Raises:
        NLAError: The file cannot be read, is of another shape, or the halves' differ.
    """
    found = [_read(half, d_model) for half in (av, ar) if half and half.sidecar.centre_mean]
    if ar is not None and len(found) == 2 and not bool((found[0] == found[1]).all()):
        raise NLAError(
            f"contradictory centre_mean: the files beside {av.sidecar.path} and {ar.sidecar.path} "
            "hold different vectors"
        )
    return found[0] if found else None


def _read(half: Checkpoint, d_model: int) -> Tensor:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    path: Path = half.sidecar.path.parent / str(half.sidecar.centre_mean)
    if not path.is_file():
        raise NLAError(
            f"{half.sidecar.path} names {path.name} (extraction.centre_mean): it is not beside it"
        )
    # A vector of the widest model there is has half a megabyte.
    if path.stat().st_size > 64 * d_model + 100_000:
        raise NLAError(
            f"{path} has {path.stat().st_size} bytes: too many for a vector of {d_model}"
        )
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            tensors = [torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))]
        else:
            tensors = list(load_file(path).values())
    # numpy and safetensors raise whatever a damaged file makes them trip over.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise NLAError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error
    if len(tensors) != 1 or tuple(tensors[0].shape) != (d_model,):
        shapes = [list(tensor.shape) for tensor in tensors]
        raise NLAError(f"{path} holds {shapes}; expected one vector [{d_model}]")
    mean_D = tensors[0].float()
    if not bool(mean_D.isfinite().all()):
        raise NLAError(f"{path} holds NaN or infinity")
    return mean_D
