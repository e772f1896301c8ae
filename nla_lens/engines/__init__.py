"""Where the two halves run: one Protocol for each, one file for each place.

An engine knows prompts, vectors and token ids; it knows nothing of sidecars, tags or scores.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from torch import Tensor

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.errors import NLAError
from nla_lens.models.placement import Placement


@dataclass(frozen=True)
class Job:
    """Vectors to be put into words; all rows share one prompt.

    Attributes:
        prompt_ids: The tokenized prompt.
        marker: Index in it where the vectors go.
        injected_ND: What goes in, `[n, d]` float32 on the CPU, finite: for `replace` already at its
            injection norm, for `norm_matched_add` the vectors as they are.
        max_new_tokens: Longest answer.
        is_finished: Whether ids generated so far end the answer (closing tag).
        temperature: 0 is argmax.
        seeds: One per row, for sampling.
        batch_size: Most rows at once; None lets the engine choose.
        stop: Text at which a server may end an answer; `is_finished` has the last word.
        watched: Of which rows what is there so far is asked for, too, after each token; looked at
            anew each time. Only for engines that stream.
    """

    prompt_ids: Sequence[int]
    marker: int
    injected_ND: Tensor
    max_new_tokens: int
    is_finished: Callable[[Sequence[int]], bool]
    temperature: float = 0.0
    seeds: Sequence[int] = ()
    batch_size: int | None = None
    stop: str | None = None
    watched: Callable[[int], bool] | None = None

    def is_over(self, ids: Sequence[int], eos_ids: frozenset[int]) -> bool:
        """Whether an answer ends with the last of these ids."""
        return ids[-1] in eos_ids or len(ids) >= self.max_new_tokens or self.is_finished(ids)


class Unfinished(list[int]):
    """Ids of a row that is not over, see `Job.watched`."""


class VerbalizerEngine(Protocol):
    """Runs an AV.

    Attributes:
        eos_ids: Ids that end an answer; what is generated may end with one of them.
    """

    eos_ids: frozenset[int]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """What enters block 0 for these ids, `[T, d]` float32 on the CPU."""
        ...

    def generate(self, job: Job) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, generated ids, end-of-sequence included) as rows finish, in any order.

        One with an attribute `streams` that is true yields `Unfinished` ids of watched rows, too.
        """
        ...


class ReconstructorEngine(Protocol):
    """Runs the backbone of an AR."""

    def last_resid(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Output of the last block at each prompt's last token, `[n, d]` float32 on the CPU."""
        ...


_ENGINES: Final = {
    "transformers": "nla_lens.engines.local.transformers",
    "transformer_lens": "nla_lens.engines.local.transformer_lens",
    "nnsight": "nla_lens.engines.local.nnsight",
    "ndif": "nla_lens.engines.ndif.engine",
    "vllm": "nla_lens.engines.served.vllm",
    "sglang": "nla_lens.engines.served.sglang",
}
_SERVED: Final = ("vllm", "sglang")
_ROLES: Final = ("av", "ar", "source")


def per_half(engine: str | Mapping[str, str]) -> dict[str, str]:
    """The engine of each half, and of the source model that `explain_text` reads.

    Args:
        engine: One for all, or some of {"av": ..., "ar": ..., "source": ...}; the rest run by
            transformers in this process. So do the others beside an AV on a vLLM or SGLang server.

    Raises:
        NLAError: No such engine or half, or one that cannot run the half.
    """
    if isinstance(engine, Mapping):
        chosen = dict(engine)
    else:
        chosen = dict.fromkeys(("av",) if is_served(engine) else _ROLES, engine)
    unknown = sorted(set(chosen) - set(_ROLES))
    if unknown:
        raise NLAError(f"engine= has {unknown}; its keys are {list(_ROLES)}")
    for role, name in chosen.items():
        _module_name(name)
        if role != "av" and is_served(name):
            raise NLAError(
                f"engine={{{role!r}: {name!r}}}: such a server gives texts and no vectors, so only "
                'the verbalizer ("av") can run there'
            )
    return {role: chosen.get(role, "transformers") for role in _ROLES}


def is_remote(engine: str) -> bool:
    """Whether an engine needs no weights on this machine."""
    return engine.partition(":")[0] == "ndif"


def is_served(engine: Any) -> bool:
    """Whether an engine is a server that reads prompt embeddings, at `url=`."""
    return engine in _SERVED


def remote_host(engine: str) -> str | bool:
    """What `extract` takes as `remote=` for a source that runs where an engine does."""
    return is_remote(engine) and (engine.partition(":")[2] or True)


def _module_name(engine: str) -> str:
    name = engine.partition(":")[0] if isinstance(engine, str) and is_remote(engine) else engine
    if not isinstance(engine, str) or name not in _ENGINES:
        raise NLAError(f"engine={engine!r} is not known; known are {sorted(_ENGINES)}")
    return _ENGINES[name]


def _module(engine: str) -> Any:
    """An engine's module; what it needs and is not there is named first."""
    name = _module_name(engine)
    if is_remote(engine) or engine == "nnsight":
        from nla_lens.engines.local.nnsight_package import import_nnsight

        import_nnsight()
    return importlib.import_module(name)


def _named(engine: str) -> dict[str, str]:
    # Only where something stands behind the name does the engine look at it.
    return {"engine": engine} if is_remote(engine) else {}


def load_verbalizer_engine(
    engine: str,
    checkpoint: Checkpoint,
    spec: NLASpec,
    placement: Placement,
    url: Any = None,
) -> VerbalizerEngine:
    """Loads an AV into an engine; `url` says where a server is.

    Raises:
        NLAError: No such engine, or one that cannot apply the checkpoint's injection rule.
    """
    options = {"url": url} if is_served(engine) else _named(engine)
    loaded: VerbalizerEngine = _module(engine).load_verbalizer(
        checkpoint, spec, placement, **options
    )
    return loaded


def load_reconstructor_engine(
    engine: str, checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> ReconstructorEngine:
    """Loads an AR's backbone into an engine.

    Raises:
        NLAError: No such engine, or weights that are not a truncated backbone.
    """
    loaded: ReconstructorEngine = _module(engine).load_reconstructor(
        checkpoint, spec, placement, **_named(engine)
    )
    return loaded
