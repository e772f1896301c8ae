"""What decides the rows of a store, so that a later run can tell whether it may go on with it."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from nla_lens.jobs.positions import Picker, Positions
from nla_lens.nla import NLA

if TYPE_CHECKING:
    from nla_lens.jobs.job import Job

_PACKAGES: Final = ("nla-lens", "torch", "transformers", "tokenizers")
_ENDS: Final = 64


def about_job(job: Job, positions: Positions, column: str | None, model: Any) -> dict[str, Any]:
    """The settings of a job, as a manifest holds them."""
    options = job.options
    return {
        "versions": versions(),
        "nla": about_nla(job.nla),
        "source_model": _named(job.nla.spec.source_model if model is None else model),
        "input": {**job.reader.corpus.described(), "column": column},
        "positions": list(Picker.of(positions).described),
        "options": {
            "max_new_tokens": options.max_new_tokens,
            "temperature": float(options.temperature),
            "num_samples": options.num_samples,
            "prompt": options.prompt,
            "score": options.score is not False and job.nla.reconstructor is not None,
        },
        "vectors": job.vectors,
        "calibration": _calibration(job.nla),
    }


def versions() -> dict[str, str]:
    """What ran it; recorded, and no reason to refuse."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def about_nla(nla: NLA) -> dict[str, Any]:
    """Which NLA it is: what it was loaded as, and a hash of what its texts and scores depend on."""
    # Where the source model lies says nothing about what it is.
    spec = {name: value for name, value, _ in nla.spec.rows() if name != "source_model"}
    digest = hashlib.sha256(repr(sorted(spec.items())).encode("utf-8", "backslashreplace"))
    digest.update(repr(nla.verbalizer.prompt_ids).encode())
    halves = {"av": nla.verbalizer, "ar": nla.reconstructor}
    return {
        "hook_name": nla.spec.hook_name,
        "injection": nla.spec.injection,
        "spec": digest.hexdigest(),
        "weights": {
            role: None if half is None else _weights(half) for role, half in halves.items()
        },
    }


def _calibration(nla: NLA) -> str | None:
    """A hash of what trust is computed from; None where there is none."""
    if nla.calibration is None:
        return None
    return hashlib.sha256(repr(nla.calibration.to_dict()).encode()).hexdigest()


def _weights(half: Any) -> str | None:
    """A hash of both ends of every parameter of a half; None where its weights are elsewhere."""
    model = getattr(half.engine, "model", None)
    module = getattr(model, "_module", model)
    if not isinstance(module, nn.Module):
        return None
    digest = hashlib.sha256()
    head = getattr(half, "weight_DD", None)
    for name, parameter in [*module.named_parameters(), *([] if head is None else [("", head)])]:
        if parameter.is_meta:
            return None
        flat = parameter.detach().flatten()
        ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]]).float().cpu()
        digest.update(f"{name}\0{tuple(parameter.shape)}\0".encode() + ends.numpy().tobytes())
    return digest.hexdigest()


def _named(model: Any) -> str | None:
    """A model's name; of a directory its last part, as it may lie elsewhere tomorrow."""
    if model is None:
        return None
    if not isinstance(model, (str, os.PathLike)):
        model = getattr(model, "name_or_path", "") or type(model).__name__
    return Path(model).name if os.path.isdir(os.path.expanduser(model)) else str(model)
