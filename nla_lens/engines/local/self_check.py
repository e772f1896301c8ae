"""Whether an engine decodes with its cache as it would without: looked at once, when it is loaded.

A release of transformers or of a framework that hands on, masks or numbers keys and values
otherwise than was assumed raises nothing: the texts stay fluent, and are no longer about the
vector. So an engine decodes a script of a few tokens, by all that its real decoding is made of (the
prefix kept once, several tokens behind it, steps, a row that leaves and one that joins behind a
mask), and its logits are held against those of one pass over the same tokens without a cache. The
tokens are the script's, whatever the logits say, so that a near tie changes nothing.

All of it is six passes of a few tokens: what six tokens cost, with a model of any size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.engines import Job
from nla_lens.engines.local.decoding import Decoder
from nla_lens.engines.local.verbalizer import LocalVerbalizer
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import embedding_of, input_device, width_of
from nla_lens.models.block_reader import BlockReader
from nla_lens.models.caching import keeps_states, ways_of_caching
from nla_lens.models.kv_cache import empty_cache, repeated

_logger = logging.getLogger(__name__)
_PROMPT: Final = 4
_MARKER: Final = 2
_LENGTHS: Final = (2, 3, 2)
"""Of the rows of a script; with two rows at once the third joins when the first is over."""
_ROWS_AT_ONCE: Final = 2
_ROUNDING: Final = {torch.float32: 0.01, torch.float64: 0.01}
_ROUNDING_OF_STATES: Final = 0.001
"""Of families with states, in float32: Zamba 2's are 0.002 off at first, 0.07 after 40 tokens."""
_ROUNDING_HALF: Final = 0.1
"""How far rounding may move logits, as part of their spread. Measured with 4 to 48 blocks: rounding
1e-5 in float32 and 0.05 in bfloat16; positions off by one, a mask or a cache ignored, 0.16 to 1.2.
The prompt is short so that each token counts."""


@dataclass(frozen=True)
class Script:
    """What is to be decoded.

    Attributes:
        prompt_ids: The prompt of all rows.
        marker: Index in it where vectors are injected.
        injected_BD: What is injected into each row: what stands there anyway, or nothing.
        rows: Tokens that each row writes; no token stands twice in them.
    """

    prompt_ids: list[int]
    marker: int
    injected_BD: Tensor
    rows: list[list[int]]

    @classmethod
    def of(cls, lm: Any, engine: Any, spec: NLASpec) -> Script:
        """For an engine with `embed` and `eos_ids`."""
        ids = _plain_ids(lm, engine.eos_ids)
        prompt_ids = [next(ids) for _ in range(_PROMPT)]
        marker_1D = engine.embed(prompt_ids[_MARKER : _MARKER + 1])
        # To be added, a zero vector is nothing.
        injected_1D = marker_1D if spec.injection == "replace" else torch.zeros(1, width_of(lm))
        rows = [[next(ids) for _ in range(length)] for length in _LENGTHS]
        return cls(prompt_ids, _MARKER, injected_1D.expand(len(rows), -1), rows)


@torch.inference_mode()
def check_decoding(
    lm: Any, script: Script, decode: Callable[[Script], list[Tensor]], name: str, *packages: str
) -> None:
    """Holds an engine's decoding against a pass without a cache.

    Args:
        lm: The causal LM inside.
        script: What is to be decoded.
        decode: Gives the logits before each token of each row, `[n, V]` float32.
        name: The engine's name.
        packages: Distributions whose code runs, beside transformers.

    Raises:
        NLAError: The logits differ by more than rounding, or decoding fails.
    """
    try:
        wanted, found = _without_cache(lm, script), decode(script)
    except (NLAError, torch.OutOfMemoryError):
        raise
    # Whatever a model's code raises when it is handed another cache than its own.
    except Exception as error:
        raise _refusal(lm, name, packages, _failing(error)) from error
    _check_numbers(lm, wanted)
    apart = max(map(_apart, found, wanted))
    _judge(lm, name, packages, apart, "its texts would be fluent, and not about the vector")


def settle_caching(
    engine: LocalVerbalizer, lm: Any, spec: NLASpec, name: str, *packages: str
) -> None:
    """Lets an engine decode in the fastest way that gives what a pass without a cache gives.

    Args:
        engine: Is told the way; otherwise as for `check_verbalizer`.
        lm: The causal LM inside.
        spec: Of the checkpoint.
        name: The engine's name.
        packages: As for `check_decoding`.

    Raises:
        NLAError: None does, in a family that keeps keys and values alone.
    """
    *fast, last = ways_of_caching(lm)
    for way in fast:
        engine.caching = way
        try:
            check_verbalizer(engine, lm, spec, name, *packages)
        except DamagedWeightsError:
            raise
        except NLAError:
            continue
        return
    engine.caching = last
    if last.kept:
        check_verbalizer(engine, lm, spec, name, *packages)
        return
    _logger.warning(
        "what %s keeps between two tokens cannot be moved from row to row, or is not right in this "
        "transformers: each token runs its row from the beginning, which is right and slow",
        type(lm).__name__,
    )


def check_verbalizer(
    engine: LocalVerbalizer, lm: Any, spec: NLASpec, name: str, *packages: str
) -> None:
    """As `check_decoding`, for an engine that decodes by `decoding.Decoder`."""
    script = Script.of(lm, engine, spec)

    def decode(script: Script) -> list[Tensor]:
        forward = _Rehearsal(engine, script)
        job = Job(
            script.prompt_ids,
            script.marker,
            script.injected_BD,
            max_new_tokens=max(map(len, script.rows)),
            is_finished=lambda ids: list(ids) in script.rows,
        )
        for _ in Decoder(forward, input_device(lm)).decode(job, _ROWS_AT_ONCE):
            pass
        return [torch.stack(logits) for logits in forward.said]

    check_decoding(lm, script, decode, name, *packages)


@torch.inference_mode()
def check_reader(model: Any, reader: BlockReader, name: str) -> None:
    """Holds what a reconstructor reads behind a kept prefix against a pass without one.

    Raises:
        NLAError: They differ by more than rounding, or reading fails.
    """
    ids = _plain_ids(model)
    prefix_ids, rest = [next(ids), next(ids)], [[next(ids), next(ids)] for _ in range(2)]
    try:
        wanted_BTD = reader.run(torch.tensor([prefix_ids + ids for ids in rest]))
        _check_numbers(model, [wanted_BTD])
        if not reader.keeps_prefixes:
            return
        cache = empty_cache()
        reader.run(torch.tensor([prefix_ids]), cache)
        found_BTD = reader.run(torch.tensor(rest), repeated(cache, len(rest)))
    except (NLAError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _refusal(model, name, (), _failing(error)) from error
    apart = _apart(found_BTD.flatten(0, 1), wanted_BTD[:, len(prefix_ids) :].flatten(0, 1))
    _judge(model, name, (), apart, "its vectors would be wrong")


class DamagedWeightsError(NLAError):
    """A model puts out NaN for ordinary tokens, whatever the way it is run."""


def _check_numbers(lm: Any, said: Sequence[Tensor]) -> None:
    """Refuses NaN: argmax takes it for the largest number, and writes the first token for ever."""
    if any(bool(part.isnan().any()) for part in said):
        raise DamagedWeightsError(
            f"{lm.name_or_path} computes NaN for plain tokens: its weights hold NaN, or overflow "
            f"in {lm.dtype}; fetch it again, or load it in another dtype="
        )


class _Rehearsal:
    """Runs an engine's passes, notes what they say, and says what stands in the script.

    Attributes:
        eos_ids: None: the script says how long a row is.
        caching: The engine's.
        said: Logits before each token of each row.
    """

    eos_ids: frozenset[int] = frozenset()

    def __init__(self, engine: Any, script: Script) -> None:
        self.said: list[list[Tensor]] = []
        self.can_share, self.caching = engine.can_share, engine.caching
        self._run, self._rows = engine.run, script.rows
        self._row_of = {token: row for row, ids in enumerate(script.rows) for token in ids}

    def run(
        self, ids_BT: Tensor, cache: Any, *, injected_BD: Tensor | None = None, **how: Any
    ) -> Tensor:
        """See `decoding.Forward`."""
        logits_BV: Tensor = self._run(ids_BT, cache, injected_BD=injected_BD, **how)
        if injected_BD is not None:
            rows = list(range(len(self.said), len(self.said) + len(ids_BT)))
            self.said += [[] for _ in rows]
        else:
            # The prefix is no row's.
            last = ids_BT[:, -1].tolist()
            rows = [self._row_of[token] for token in last if token in self._row_of]
        scripted_BV = torch.zeros_like(logits_BV)
        for place, row in enumerate(rows):
            scripted_BV[place, self._rows[row][len(self.said[row])]] = 1.0
            self.said[row].append(logits_BV[place])
        return scripted_BV


def _without_cache(lm: Any, script: Script) -> list[Tensor]:
    """What decoding must give, in one pass: padded behind, where nothing looks."""
    n_prompt, longest = len(script.prompt_ids), max(map(len, script.rows))
    ids_BT = torch.tensor(
        [script.prompt_ids + row + [0] * (longest - len(row)) for row in script.rows],
        device=input_device(lm),
    )
    logits_BTV = lm(input_ids=ids_BT[:, :-1], use_cache=False).logits.float()
    return [
        logits_TV[n_prompt - 1 : n_prompt - 1 + len(row)]
        for logits_TV, row in zip(logits_BTV, script.rows, strict=True)
    ]


def _plain_ids(lm: Any, without: frozenset[int] = frozenset()) -> Iterator[int]:
    """Token ids from the middle of the vocabulary, where no special ones are."""
    embedding: Any = embedding_of(lm)
    n_vocab = len(embedding.weight)
    step = n_vocab // 2 // (_PROMPT + sum(_LENGTHS) + len(without)) or 1
    return (i for i in range(n_vocab // 4, n_vocab, step) if i not in without)


def _apart(a_NX: Tensor, b_NX: Tensor) -> float:
    """Largest distance of two lines, in units of the second one's spread."""
    a_NX, b_NX = a_NX.float().to(b_NX.device), b_NX.float()
    if not torch.equal(a_NX.isfinite(), b_NX.isfinite()):
        return torch.inf
    a_NX, b_NX = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a_NX, b_NX))
    spread_N = (b_NX - b_NX.mean(-1, keepdim=True)).norm(dim=-1)
    apart_N = (a_NX - b_NX).norm(dim=-1) / spread_N.clamp_min(torch.finfo(torch.float32).tiny)
    return float(apart_N.max())


def _failing(error: Exception) -> str:
    return f"fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _judge(lm: Any, name: str, packages: tuple[str, ...], apart: float, so: str) -> None:
    within = _ROUNDING.get(lm.dtype, _ROUNDING_HALF)
    if within < _ROUNDING_HALF and keeps_states(lm):
        within = _ROUNDING_OF_STATES
    if not apart <= within:
        what = f"is {apart:.2g} of the spread away from a pass without one, so {so}"
        raise _refusal(lm, name, packages, what)


def _refusal(lm: Any, name: str, packages: tuple[str, ...], what: str) -> NLAError:
    involved = (*packages, "transformers")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in involved)
    remedy = f"another release of {' or of '.join(involved)}"
    if packages:
        remedy = f"engine='transformers', or {remedy}"
    return NLAError(
        f"engine={name!r} ({versions}) cannot run this {lm.config.model_type!r} model: what it "
        f"computes with a key-value cache {what}. Use {remedy}"
    )
