"""Where the two halves run: one Protocol for each, one file for each place.

An engine knows prompts, vectors and token ids; it knows nothing of sidecars, tags or scores.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from torch import Tensor

from nla_lens.checkpoint import Checkpoint
from nla_lens.errors import NLAError
from nla_lens.spec import NLASpec


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
    """

    prompt_ids: Sequence[int]
    marker: int
    injected_ND: Tensor
    max_new_tokens: int
    is_finished: Callable[[Sequence[int]], bool]
    temperature: float = 0.0
    seeds: Sequence[int] = ()
    batch_size: int | None = None


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
        """Yields (row, generated ids, end-of-sequence included) as rows finish, in any order."""
        ...


class ReconstructorEngine(Protocol):
    """Runs the backbone of an AR."""

    def last_resid(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Output of the last block at each prompt's last token, `[n, d]` float32 on the CPU."""
        ...


@dataclass(frozen=True)
class Placement:
    """The caller's wishes about how weights are loaded; passed on to the engine."""

    dtype: Any = None
    device: Any = None
    device_map: Any = None
    trust_remote_code: bool = False


_ENGINES: Final = {
    "transformers": "nla_lens.engines.transformers",
    "transformer_lens": "nla_lens.engines.transformer_lens",
    "nnsight": "nla_lens.engines.nnsight",
}


def _module(engine: str) -> Any:
    if engine not in _ENGINES:
        raise NLAError(f"engine={engine!r} is not known; known are {sorted(_ENGINES)}")
    return importlib.import_module(_ENGINES[engine])


def load_verbalizer_engine(
    engine: str, checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> VerbalizerEngine:
    """Loads an AV into an engine.

    Raises:
        NLAError: No such engine, or one that cannot apply the checkpoint's injection rule.
    """
    loaded: VerbalizerEngine = _module(engine).load_verbalizer(checkpoint, spec, placement)
    return loaded


def load_reconstructor_engine(
    engine: str, checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> ReconstructorEngine:
    """Loads an AR's backbone into an engine.

    Raises:
        NLAError: No such engine, or weights that are not a truncated backbone.
    """
    loaded: ReconstructorEngine = _module(engine).load_reconstructor(checkpoint, spec, placement)
    return loaded
