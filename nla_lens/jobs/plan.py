"""Which rows a job has, and whether a document is still what it was when the job began."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from nla_lens.errors import NLAError


@dataclass(frozen=True)
class Prepared:
    """A document as far as it is known without running a model.

    Attributes:
        ids: Its token ids; none for vectors.
        picked: Which of them are explained; for vectors: which rows.
        error: Why nothing of it can be; it then has one row, which says so.
    """

    ids: Sequence[int] = ()
    picked: Sequence[int] = ()
    error: str | None = None

    @property
    def n_rows(self) -> int:
        """How many rows it has in the store."""
        return 1 if self.error is not None else len(self.picked)


@dataclass(frozen=True)
class Row:
    """One row to be made.

    Attributes:
        number: In the whole job.
        document: Which one.
        vector: `[d]`, with what is known of it; None where it cannot be explained.
        error: Why not.
        before: Tokens between the row before it, or the beginning, and its own.
        after: Of a document's last row: the tokens behind it.
        columns: The user's own values of its document.
    """

    number: int
    document: int
    vector: Tensor | None = None
    error: str | None = None
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How many rows each document has.

    Attributes:
        starts: Number of each document's first row, and behind the last one's last; int64.
        n_tokens: Of all documents.
        failed: The first documents that cannot be explained, and why.
        n_failed: How many there are.
        marks: A checksum of what each document was, uint32.
        tokens: A hash of all token ids, and of which are explained.
        first: Number of the document that `starts` begins with.
    """

    starts: np.ndarray[Any, Any]
    n_tokens: int
    failed: dict[int, str]
    n_failed: int
    marks: np.ndarray[Any, Any]
    tokens: str
    first: int = 0

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return int(self.starts[-1])

    def documents(self, rows: range) -> range:
        """The documents that some of these rows belong to."""
        first, last = np.searchsorted(self.starts, [rows.start, rows.stop - 1], side="right") - 1
        return range(self.first + int(first), self.first + int(last) + 1)

    def rows(self, document: int) -> range:
        """The rows of a document."""
        at = document - self.first
        return range(int(self.starts[at]), int(self.starts[at + 1]))

    def of(self, documents: range) -> Plan:
        """The same of some documents alone."""
        begin, end = documents.start - self.first, documents.stop - self.first
        starts, marks = self.starts[begin : end + 1].copy(), self.marks[begin:end].copy()
        return replace(self, starts=starts, marks=marks, first=documents.start)

    def check(self, document: int, found: Prepared, columns: Mapping[str, Any]) -> None:
        """Raises an NLAError for a document that is not what it was when the plan was made."""
        same = found.n_rows == len(self.rows(document))
        if not same or mark_of(found, columns) != self.marks[document - self.first]:
            raise NLAError(
                f"document {document} has changed since the job began: its content, its tokens or "
                "what positions= picks of them; begin a new store"
            )


def token_bytes(found: Prepared) -> bytes:
    """A document's token ids and which of them are explained, as bytes."""
    counts = (len(found.ids), found.n_rows)
    return b"".join(
        np.asarray(n, dtype=np.int64).tobytes() for n in (counts, found.ids, found.picked)
    )


def mark_of(found: Prepared, columns: Mapping[str, Any]) -> int:
    """A checksum of a document: tokens, the user's columns, why it failed."""
    try:
        said = json.dumps([found.error, columns], skipkeys=True, default=_kind)
    # What holds itself; refused where the input is described.
    except (RecursionError, ValueError):
        said = ""
    return zlib.crc32(token_bytes(found), zlib.crc32(said.encode()))


def _kind(value: object) -> str:
    """Of an object that is no JSON: the same in a worker's process, where its repr is not."""
    return type(value).__qualname__
