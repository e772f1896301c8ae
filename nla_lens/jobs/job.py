"""A corpus, an NLA and all that decides what a store will hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.halves.explaining import explain_batch
from nla_lens.halves.options import Options
from nla_lens.jobs.inputs import Source, open_corpus
from nla_lens.jobs.plan import Plan, Row
from nla_lens.jobs.positions import Picker, Positions
from nla_lens.jobs.reading import Reader
from nla_lens.nla import NLA
from nla_lens.progress import waiting
from nla_lens.results.explanation import Explanation
from nla_lens.results.rows import failed_row, stored, to_row
from nla_lens.stream.vectors import check_vectors

_log = logging.getLogger(__name__)
_ROWS_PER_SHARD: Final = 256
"""What a power cut costs at most, and enough for a file of its own."""


@dataclass(frozen=True)
class Job:
    """A corpus, an NLA and all that decides what the store will hold.

    Attributes:
        nla: The NLA.
        reader: The documents and their rows.
        plan: How many rows each has.
        options: Those of `NLA.explain`; the seed is set where one is needed.
        vectors: Whether the vectors are kept.
        strict: Stop at the first row that cannot be explained.
    """

    nla: NLA
    reader: Reader
    plan: Plan
    options: Options
    vectors: bool = False
    strict: bool = False
    rows_per_shard: int = _ROWS_PER_SHARD

    @classmethod
    def of(
        cls,
        nla: NLA,
        source: Source,
        *,
        positions: Positions = "all",
        column: str | None = None,
        model: Any = None,
        limit: int | None = None,
        progress: bool | None = None,
        options: Mapping[str, Any],
        **more: Any,
    ) -> Job:
        """Looks through everything before any model runs; see `explain_corpus`."""
        wishes = Options.of(options)
        nla.check_options(wishes)
        picker = Picker.of(positions)
        if limit is not None and not (is_int(limit) and limit >= 1):
            raise NLAError(f"limit={limit!r} must be a positive number of documents")
        corpus = open_corpus(source, column=column, limit=limit)
        reading = None if corpus.is_vectors else nla.open_source(model)
        reader = Reader(corpus, picker, nla.spec, reading)
        with waiting("looking through the input", progress):
            plan = reader.plan()
        if plan.n_rows == 0:
            raise NLAError("no token is picked in any document: look at positions=")
        job = cls(nla, reader, plan, wishes, **more)
        job.report_failures()
        return job

    def within(self, budget: int) -> Job:
        """The same over the first documents: at most `budget` rows, and at least a document."""
        n = int(np.searchsorted(self.plan.starts, budget, side="right")) - 1
        if n >= len(self.reader.corpus):
            return self
        reader = self.reader.over(self.reader.corpus.first(max(1, n)))
        return replace(self, reader=reader, plan=reader.plan())

    def report_failures(self) -> None:
        """Says which documents cannot be explained.

        Raises:
            NLAError: There are some and the job is strict, or there is nothing else.
        """
        if not self.plan.n_failed:
            return
        shown = "; ".join(f"document {i}: {reason}" for i, reason in self.plan.failed.items())
        n = len(self.reader.corpus)
        said = f"{self.plan.n_failed} of {n} documents cannot be explained: {shown}"
        if self.strict or self.plan.n_failed == n:
            raise NLAError(said)
        _log.warning("%s", said)

    def run(self, rows: range) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Makes rows, in order: each with what the store holds of it.

        Raises:
            NLAError: The engine failed; what was finished has been yielded.
        """
        yield from self.explain(self.reader.read(rows, self.plan))

    def explain(self, read: Sequence[Row]) -> Iterator[tuple[Row, dict[str, Any]]]:
        """The same for rows that were read already."""
        good = [row for row in read if row.vector is not None]
        explained = self._explained(good)
        for row in read:
            about: dict[str, Any] = {
                "document": row.document,
                "row": row.number,
                "user": self._user(row),
            }
            if row.vector is None:
                if self.strict:
                    raise NLAError(f"row {row.number} (document {row.document}): {row.error}")
                yield row, failed_row(str(row.error), **about)
            else:
                yield row, to_row(self._next(explained, good), **about)

    def _next(self, explained: Iterator[Explanation], good: Sequence[Row]) -> Explanation:
        try:
            return next(explained)
        except BaseException as error:
            # What ended out of turn is kept, too.
            later = getattr(error, "later", {})
            error.later_rows = [  # type: ignore[attr-defined]
                (
                    good[i],
                    to_row(
                        e, document=good[i].document, row=good[i].number, user=self._user(good[i])
                    ),
                )
                for i, e in sorted(later.items())
            ]
            raise

    def _explained(self, rows: Sequence[Row]) -> Iterator[Explanation]:
        if not rows:
            return iter(())
        batch = check_vectors([row.vector for row in rows], self.nla.spec.d_model)
        return explain_batch(
            self.nla.verbalizer,
            self.nla.reconstructor,
            batch,
            self.options,
            numbers=[row.number for row in rows],
            calibration=self.nla.calibration,
        )

    def _user(self, row: Row) -> dict[str, Any]:
        named = self.reader.corpus.user
        return {
            named[name][0]: stored(value, named[name][1]) for name, value in row.columns.items()
        }
