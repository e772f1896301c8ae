"""The run from checked vectors to finished explanations: verbalize, reconstruct, score, flag."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from nla_lens.errors import NLAError, NLARemoteError
from nla_lens.halves.options import Options
from nla_lens.halves.reconstructor import Reconstructor
from nla_lens.halves.verbalizer import Answer, Verbalizer
from nla_lens.models.ambient import undisturbed_steps
from nla_lens.results import metrics
from nla_lens.results.calibration import Calibration
from nla_lens.results.explanation import Explanation
from nla_lens.results.flags import PARTIAL, find_flags
from nla_lens.stream.injection import norms
from nla_lens.stream.origin import UNKNOWN
from nla_lens.stream.vectors import VectorBatch

_SCORED_AT_ONCE: Final = 16
"""Texts that wait for one another to be scored: enough to fill a batch, few enough to be soon.

They are scored between the verbalizer's steps, not beside them in a thread: on one device the two
would take turns all the same, and a vLLM or SGLang server works on its open requests meanwhile.
Only NDIF, asked for one batch at a time, waits for the few passes that scoring takes.
"""


@undisturbed_steps
def explain_batch(
    verbalizer: Verbalizer,
    reconstructor: Reconstructor | None,
    batch: VectorBatch,
    options: Options,
    numbers: Sequence[int] | None = None,
    *,
    stream: bool = False,
    calibration: Calibration | None = None,
) -> Iterator[Explanation]:
    """Yields explanations in input order.

    A failure or Ctrl-C on the way comes after everything that was finished has been yielded.

    Args:
        verbalizer: Writes the texts.
        reconstructor: Scores them; None: nothing does.
        batch: The vectors.
        options: What the caller asked for.
        numbers: Those of the vectors in a longer run, from 0: each is then sampled as it is there.
        stream: Also yield what there is of the first vector that is not finished, after each token.
        calibration: Says how far to trust them; None: nothing does.

    Raises:
        NLAError: The engine failed.
    """
    scorer = None if options.score is False else reconstructor
    finish = _Finisher(verbalizer, scorer, batch, options.num_samples, calibration)
    at_once = 1 if scorer is None or stream else _SCORED_AT_ONCE
    if options.batch_size is not None:
        at_once = max(1, min(at_once, options.batch_size // options.num_samples))
    try:
        for row, answer in verbalizer.answers(
            batch.vectors_ND.repeat_interleave(options.num_samples, dim=0),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seeds=_seeds(options, range(len(batch)) if numbers is None else numbers),
            batch_size=options.batch_size,
            prompt=options.prompt,
            watched=finish.is_next if stream else None,
        ):
            if not answer.is_over:
                yield finish.so_far(row, answer)
                continue
            finish.add(row, answer)
            if finish.n_due >= at_once:
                yield from finish.flush()
    except GeneratorExit:
        raise
    # Ctrl-C, and whatever else a signal, a scheduler or an event loop stops a program by.
    except BaseException as error:
        yield from finish.flush()
        if isinstance(error, NLAError) or not isinstance(error, Exception):
            error.later = finish.later()  # type: ignore[attr-defined]
            raise
        failure = NLAError(
            f"the verbalizer failed after {finish.n_done} of {len(batch)} vectors: "
            f"{type(error).__name__}: {error}{_advice(error)}"
        )
        failure.later = finish.later()
        raise failure from error
    yield from finish.flush()


def _advice(error: Exception) -> str:
    out_of_memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return "; pass a smaller batch_size" if out_of_memory else ""


def _seeds(options: Options, numbers: Sequence[int]) -> Sequence[int]:
    """A seed for each row, so that a row's text does not depend on its batch."""
    if options.temperature == 0:
        return ()
    base = secrets.randbits(48) if options.seed is None else int(options.seed)
    k = int(options.num_samples)
    rows = (number * k + sample for number in numbers for sample in range(k))
    return [(base * 1_000_003 + row) % 2**63 for row in rows]


class _Finisher:
    """Collects answers and turns them, many at once, into scored and flagged explanations."""

    def __init__(
        self,
        verbalizer: Verbalizer,
        reconstructor: Reconstructor | None,
        batch: VectorBatch,
        num_samples: int,
        calibration: Calibration | None,
    ) -> None:
        self._calibration = calibration
        self._spec, self._reconstructor = verbalizer.spec, reconstructor
        self._batch, self._num_samples = batch, num_samples
        self._norms_N = norms(batch.vectors_ND)[:, 0]
        self._answers: dict[int, Answer] = {}
        self._n_ready = 0
        self.n_done = 0

    @property
    def n_due(self) -> int:
        """Vectors whose answers are all there, up to the first that waits for one."""
        return self._n_ready // self._num_samples - self.n_done

    def add(self, row: int, answer: Answer) -> None:
        """Takes the answer of one row, in any order."""
        self._answers[row] = answer
        while self._n_ready in self._answers:
            self._n_ready += 1

    def is_next(self, row: int) -> bool:
        """Whether it is the first row that waits for its answer."""
        return row == self._n_ready

    def so_far(self, row: int, answer: Answer) -> Explanation:
        """What there is of an answer; neither scored nor flagged as one that is over."""
        return replace(self._draft(answer, row // self._num_samples), flags=(PARTIAL,))

    def flush(self) -> Iterator[Explanation]:
        """Yields what is due, and forgets it.

        Raises:
            NLAError: The reconstructor failed; the texts are yielded first, unscored. So they are
                before a Ctrl-C that came while they were scored.
        """
        due = range(self.n_done, self.n_done + self.n_due)
        self.n_done += len(due)
        finished, failure = self._finish(due)
        yield from finished
        if failure is not None and not isinstance(failure, Exception):
            raise failure
        if failure is not None:
            message = (
                f"the reconstructor failed ({type(failure).__name__}: {failure}); the texts are "
                "there, their scores are not"
            )
            if isinstance(failure, NLARemoteError):
                raise NLARemoteError(message, cause=failure.cause) from failure
            raise NLAError(message) from failure

    def later(self) -> dict[int, Explanation]:
        """What is finished beyond the first vector that is not, by index."""
        whole = [i for i in range(self.n_done, len(self._batch)) if self._has(i)]
        finished, _ = self._finish(whole)
        return dict(zip(whole, finished, strict=True))

    def _has(self, vector: int) -> bool:
        k = self._num_samples
        return all(row in self._answers for row in range(vector * k, vector * k + k))

    def _finish(self, vectors: Sequence[int]) -> tuple[list[Explanation], BaseException | None]:
        """Explanations of vectors whose answers are there; unscored if scoring fails."""
        k = self._num_samples
        drafts = [
            self._draft(self._answers.pop(vector * k + sample), vector)
            for vector in vectors
            for sample in range(k)
        ]
        failure: BaseException | None = None
        try:
            scored = self._scored(drafts, [vector for vector in vectors for _ in range(k)])
        except BaseException as error:
            scored, failure = drafts, error
        flagged = self._trusted([self._flagged(e) for e in scored])
        return [_best(flagged[i : i + k]) for i in range(0, len(flagged), k)], failure

    def _draft(self, answer: Answer, row: int) -> Explanation:
        return Explanation(
            text=answer.text,
            raw_text=answer.raw_text,
            token_ids=answer.token_ids,
            complete=answer.complete,
            norm=float(self._norms_N[row]),
            **self._provenance(row),
        )

    def _provenance(self, row: int) -> dict[str, Any]:
        origin = self._batch.origin
        if origin is None:
            return {}
        _, position, token_id = origin.where_LX3[row].tolist()
        recording, known = origin.recording(row), token_id >= 0
        return {
            "hook_name": recording.hook_name,
            "position": None if position == UNKNOWN else position,
            "token_id": token_id if known else None,
            "token": recording.to_token(token_id) if known and recording.to_token else None,
        }

    def _scored(self, drafts: list[Explanation], rows: list[int]) -> list[Explanation]:
        if self._reconstructor is None or not drafts:
            return drafts
        scores = metrics.score(
            self._reconstructor.reconstruct([draft.text for draft in drafts]),
            self._batch.vectors_ND[torch.tensor(rows)],
            mse_scale=self._spec.mse_scale,
            var_nrm=self._spec.var_nrm,
            mean_D=self._reconstructor.mean_D,
        )
        return [
            replace(
                draft,
                cos=float(scores.cos[i]),
                mse_nrm=float(scores.mse_nrm[i]),
                fve_nrm=None if scores.fve_nrm is None else float(scores.fve_nrm[i]),
            )
            for i, draft in enumerate(drafts)
        ]

    def _flagged(self, explanation: Explanation) -> Explanation:
        least = None if self._calibration is None else self._calibration.least
        return replace(explanation, flags=find_flags(explanation, self._spec, least))

    def _trusted(self, drafts: list[Explanation]) -> list[Explanation]:
        """The samples of each vector speak for one another."""
        if self._calibration is None:
            return drafts
        k = self._num_samples
        beside = [drafts[i - i % k :][:k] if k > 1 else () for i in range(len(drafts))]
        records = [{**vars(e), "samples": s} for e, s in zip(drafts, beside, strict=True)]
        trusts = self._calibration.trust_all(records)
        return [replace(e, trust=trust) for e, trust in zip(drafts, trusts, strict=True)]


def _best(samples: list[Explanation]) -> Explanation:
    """The best of a vector's samples, carrying them all."""
    if len(samples) == 1:
        return samples[0]
    # A NaN is neither better nor worse than anything, and would leave the rest unsorted.
    ranked = sorted(samples, key=lambda e: -e.cos if e.cos is not None and e.cos == e.cos else 2.0)
    return replace(ranked[0], samples=tuple(ranked))
