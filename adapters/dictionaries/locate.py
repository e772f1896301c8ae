"""Which of the files at a place are a dictionary's: the same on this machine and on the hub.

A folder holds one dictionary as a rule: a weights file, and a config beside it. Llama Scope keeps
the weights a level below the config, Qwen Scope one file a layer beside one config.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from nla_lens.errors import NLAError

WEIGHTS: Final = (".safetensors", ".pt", ".pth")
INDEX: Final = ".safetensors.index.json"
HYPERPARAMS: Final = "hyperparams.json"
CHECKPOINTS: Final = "checkpoints"
_KNOWN: Final = ("sae_weights.safetensors", "sae.safetensors", "params.safetensors", "ae.pt")
_CONFIGS: Final = ("cfg.json", "config.json", HYPERPARAMS)
# As their authors' loader prefers them: OpenMOSS/Language-Model-SAEs, `from_config`.
_LLAMA_SCOPE: Final = tuple(
    f"{CHECKPOINTS}/{name}{suffix}" for name in ("pruned", "final") for suffix in WEIGHTS
)
_SHOWN: Final = 6


@dataclass(frozen=True)
class Found:
    """One dictionary's files, as paths below the place that was looked at.

    Attributes:
        weights: The file with the tensors, or the index of several.
        config: The JSON that is about it; None where there is none.
    """

    weights: str
    config: str | None


def locate(names: Iterable[str], place: str, wanted: str = "") -> Found:
    """The one dictionary among files.

    Args:
        names: Paths, with "/" between their parts.
        place: What messages call the place.
        wanted: A folder or a file among them; "" is the place itself.

    Raises:
        NLAError: None, or several.
    """
    listed = sorted(set(names))
    wanted = wanted.strip("/")
    if wanted in listed:
        return Found(wanted, _config(listed, wanted))
    start = f"{wanted}/" if wanted else ""
    inside = [name[len(start) :] for name in listed if name.startswith(start)]
    where = f"{place}/{wanted}" if wanted else place
    if wanted and not inside:
        raise NLAError(f"{place} has no {wanted}{_hint(listed)}")
    here = [name for name in inside if "/" not in name and _is_weights(name)]
    shards = [name for name in inside if "/" not in name and name.endswith(INDEX)]
    candidates = [name for name in here if name in _KNOWN] or here
    if HYPERPARAMS in inside and not candidates:
        candidates = [name for name in _LLAMA_SCOPE if name in inside][:1]
    if len(shards) == 1 and not set(here) & set(_KNOWN):
        candidates = shards
    if len(candidates) > 1:
        raise NLAError(
            f"{where} has several weights files: {_some(candidates)}; name one, as in "
            f"filename={candidates[0]!r}"
        )
    if not candidates:
        raise NLAError(f"{where} has no dictionary: no {', '.join(WEIGHTS)}{_hint(inside)}")
    return Found(start + candidates[0], _config(listed, start + candidates[0]))


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHTS)


def _config(listed: Sequence[str], weights: str) -> str | None:
    """The config of a weights file: beside it, or above a folder of checkpoints."""
    folder = PurePosixPath(weights).parent
    folders = [folder, folder.parent] if folder.name == CHECKPOINTS else [folder]
    candidates = [str(where / name) for where in folders for name in _CONFIGS]
    return next((name for name in candidates if name in listed), None)


def _hint(names: Sequence[str]) -> str:
    """Where else there are some."""
    if any(name.endswith("params.npz") for name in names):
        return (
            "; params.npz is Gemma Scope 1, which is not read here: load it with "
            "sae_lens.SAE.from_pretrained and pass the SAE itself"
        )
    folders = sorted({str(PurePosixPath(n).parent) for n in names if "/" in n and _is_weights(n)})
    return f"; there are some in {_some(folders)}, name one with subfolder=" if folders else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{list(names[:_SHOWN])}{more}"
