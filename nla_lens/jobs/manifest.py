"""What decides the rows of a store, so that a later run can tell whether it may go on with it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from nla_lens.errors import NLAError
from nla_lens.jobs.positions import Picker, Positions
from nla_lens.models.anatomy import blocks_of, embedding_of
from nla_lens.nla import NLA
from nla_lens.stream.extraction import Source

if TYPE_CHECKING:
    from nla_lens.jobs.job import Job

_PACKAGES: Final = ("nla-lens", "torch", "transformers", "tokenizers")
_ENDS: Final = 64


def about_job(job: Job, positions: Positions, column: str | None, model: Any) -> dict[str, Any]:
    """The settings of a job, as a manifest holds them."""
    options, reading = job.options, job.reader.source
    return {
        "versions": versions(),
        "nla": about_nla(job.nla),
        "source_model": _named(job.nla.spec.source_model if model is None else model),
        "source_weights": None if reading is None else _source_weights(reading, job.nla),
        "input": {**job.reader.corpus.described(), "column": column},
        "positions": list(Picker.of(positions).described),
        # Another tokenizer or chat template, a function that picks others.
        "tokens": job.plan.tokens,
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
        "dtypes": {role: _dtype(_module(half)) for role, half in halves.items()},
    }


def _calibration(nla: NLA) -> str | None:
    """A hash of what trust is computed from; None where there is none."""
    if nla.calibration is None:
        return None
    return hashlib.sha256(repr(nla.calibration.to_dict()).encode()).hexdigest()


def _module(half: Any) -> nn.Module | None:
    """A half's model; None where it runs elsewhere."""
    model = getattr(getattr(half, "engine", None), "model", None)
    module = getattr(model, "_module", model)
    if not isinstance(module, nn.Module) or any(p.is_meta for p in module.parameters()):
        return None
    return module


def _weights(half: Any) -> str | None:
    """A hash of a half's weights, and of what is known here of those that are elsewhere."""
    module, remote = _module(half), getattr(half.engine, "remote", None)
    known = getattr(half.engine, "digest", None) if remote is None else _named(remote.name)
    head = getattr(half, "weight_DD", None)
    if module is None and known is None and head is None:
        return None
    parameters = [] if module is None else list(module.named_parameters())
    return _hash([*parameters, *([] if head is None else [("", head)])], known or "")


def _source_weights(source: Source, nla: NLA) -> str | None:
    """The same of the blocks that are read; None for a source of another kind or elsewhere."""
    model, place = getattr(source, "model", None), nla.spec.place
    if place is None or not isinstance(model, nn.Module):
        return None
    try:
        read = [embedding_of(model), *blocks_of(model)[: place.n_blocks]]
    except NLAError:
        return None
    if any(p.is_meta for part in read for p in part.parameters()):
        return None
    named = [(f"{i}.{k}", p) for i, part in enumerate(read) for k, p in part.named_parameters()]
    return _hash(named, str(_dtype(read[-1])))


def _dtype(module: nn.Module | None) -> str | None:
    """What a model computes in."""
    first = None if module is None else next(module.parameters(), None)
    return None if first is None else str(first.dtype).removeprefix("torch.")


def _hash(parameters: Iterable[tuple[str, Tensor]], known: str) -> str:
    """Of both ends of every parameter."""
    digest = hashlib.sha256(known.encode("utf-8", "backslashreplace"))
    for name, parameter in parameters:
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
