"""From documents to numbered rows: which tokens of each, and their residual vectors."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.errors import NLAError
from nla_lens.jobs.corpus import Corpus, Document
from nla_lens.jobs.positions import Picker, Tokens
from nla_lens.models.tokens import token_text
from nla_lens.stream.extraction import Source, encode, read_prompts
from nla_lens.stream.residual import ResidualTensor


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
        if not same or _mark(found, columns) != self.marks[document - self.first]:
            raise NLAError(
                f"document {document} has changed since the job began: its content, its tokens or "
                "what positions= picks of them; begin a new store"
            )


_MOST_SHOWN: Final = 5


class Reader:
    """Reads the rows of a corpus; the same numbers at every call.

    Attributes:
        corpus: The documents.
        picker: Which tokens of each.
        source: The model that reads texts; None for vectors.
    """

    def __init__(
        self, corpus: Corpus, picker: Picker, spec: NLASpec, source: Source | None
    ) -> None:
        """Args:
        corpus: The documents.
        picker: Which tokens of each.
        spec: Of the NLA that explains them.
        source: The model that reads texts; None for vectors.
        """
        self.corpus, self.picker, self._spec, self.source = corpus, picker, spec, source

    def over(self, corpus: Corpus) -> Reader:
        """The same of another corpus."""
        return Reader(corpus, self.picker, self._spec, self.source)

    @cached_property
    def _to_text(self) -> Any:
        return token_text(self._need_source().tokenizer)

    def _need_source(self) -> Source:
        if self.source is None:
            raise NLAError("the corpus holds texts and no source model was opened")
        return self.source

    def prepare(self, document: Document) -> Prepared:
        """What is known of a document before it is run."""
        if document.error is not None:
            return Prepared(error=document.error)
        if document.vectors is not None:
            width = document.vectors.shape[-1]
            if width != self._spec.d_model:
                return Prepared(error=f"width {width} instead of {self._spec.d_model}")
            return Prepared(picked=range(len(document.vectors)))
        source = self._need_source()
        try:
            ids = encode(source, document.text)
            messages = None if isinstance(document.text, str) else document.text
            tokens = Tokens(ids, _Lazily(ids, self._to_text), messages, source.tokenizer)
            return Prepared(ids, self.picker(tokens))
        except NLAError as error:
            return Prepared(error=str(error))

    def plan(self) -> Plan:
        """Looks at every document once; runs no model."""
        starts, n_tokens, failed, n_failed = [0], 0, dict[int, str](), 0
        marks, tokens = list[int](), hashlib.sha256()
        for i, document in enumerate(self.corpus):
            prepared = self.prepare(document)
            n_tokens += len(prepared.ids)
            starts.append(starts[-1] + prepared.n_rows)
            marks.append(_mark(prepared, document.columns))
            tokens.update(_numbers(prepared))
            if prepared.error is not None:
                n_failed += 1
                if len(failed) < _MOST_SHOWN:
                    failed[i] = prepared.error
        return Plan(
            np.asarray(starts, dtype=np.int64),
            n_tokens,
            failed,
            n_failed,
            np.asarray(marks, dtype=np.uint32),
            tokens.hexdigest(),
        )

    def read(self, rows: range, plan: Plan, batch_size: int | None = None) -> list[Row]:
        """Some rows, their vectors read in one go.

        Raises:
            NLAError: A document is not what it was when the plan was made.
        """
        documents = {i: self.corpus[i] for i in plan.documents(rows)}
        prepared = {i: self.prepare(document) for i, document in documents.items()}
        for i, found in prepared.items():
            plan.check(i, found, documents[i].columns)
        wanted: dict[int, list[int]] = {}
        for i, found in prepared.items():
            own = plan.rows(i)
            first, last = rows.start - own.start, rows.stop - own.start
            wanted[i] = list(range(max(first, 0), min(last, found.n_rows)))
        vectors = self._vectors(documents, prepared, wanted, batch_size)
        made = []
        for i, within in wanted.items():
            for n, k in enumerate(within):
                number = plan.rows(i)[k]
                error = prepared[i].error
                vector = None if error is not None else vectors[i][n]
                if vector is not None and (error := _unfit(vector)) is not None:
                    vector = None
                around = self._around(prepared[i], k)
                made.append(Row(number, i, vector, error, *around, documents[i].columns))
        return made

    def read_so_far(self, ids: Sequence[int], position: int | None) -> str | None:
        """The text up to a token, itself included; None where that is not known."""
        if not len(ids) or position is None:
            return None
        tokenizer = self._need_source().tokenizer
        return str(tokenizer.decode(list(ids[: position + 1]), skip_special_tokens=True))

    def _around(self, found: Prepared, k: int) -> tuple[list[str], list[str]]:
        """The tokens before and behind the k-th that is explained, as far as they are not."""
        if found.error is not None or not len(found.ids):
            return [], []
        begin = found.picked[k - 1] + 1 if k else 0
        end = found.picked[k] + 1 if k + 1 == len(found.picked) else len(found.ids)
        before, after = found.ids[begin : found.picked[k]], found.ids[end:]
        return list(map(self._to_text, before)), list(map(self._to_text, after))

    def _vectors(
        self,
        documents: Mapping[int, Document],
        prepared: Mapping[int, Prepared],
        wanted: Mapping[int, list[int]],
        batch_size: int | None,
    ) -> dict[int, Tensor]:
        """`[n_i, d]` for each document that has any."""
        good = [i for i, found in prepared.items() if found.error is None and wanted[i]]
        if self.corpus.is_vectors:
            # A list as index copies: what is checked afterwards is what is explained.
            given = {i: documents[i].vectors for i in good}
            # Before, too: a mapped file that was cut off ends the process.
            self.corpus.check_unchanged()
            copied = {i: v[wanted[i]] for i, v in given.items() if v is not None}
            self.corpus.check_unchanged()
            return copied
        place = self._spec.place
        if place is None:
            raise NLAError("which layer to read is not known; pass layer= to from_pretrained")
        picked = [[prepared[i].picked[k] for k in wanted[i]] for i in good]
        ids = [list(prepared[i].ids) for i in good]
        read = read_prompts(self._need_source(), ids, picked, place, batch_size)
        return dict(zip(good, read, strict=True))


class _Lazily(Sequence[str]):
    """Texts of tokens, made when a rule looks at them."""

    def __init__(self, ids: Sequence[int], to_text: Any) -> None:
        self._ids, self._to_text = ids, to_text

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        picked = self._ids[index]
        return (
            list(map(self._to_text, picked)) if isinstance(index, slice) else self._to_text(picked)
        )


def _numbers(found: Prepared) -> bytes:
    """A document's token ids and which of them are explained, as bytes."""
    counts = (len(found.ids), found.n_rows)
    return b"".join(
        np.asarray(n, dtype=np.int64).tobytes() for n in (counts, found.ids, found.picked)
    )


def _mark(found: Prepared, columns: Mapping[str, Any]) -> int:
    """A checksum of a document: tokens, the user's columns, why it failed."""
    try:
        said = json.dumps([found.error, columns], skipkeys=True, default=_kind)
    # What holds itself; refused where the input is described.
    except (RecursionError, ValueError):
        said = ""
    return zlib.crc32(_numbers(found), zlib.crc32(said.encode()))


def _kind(value: object) -> str:
    """Of an object that is no JSON: the same in a worker's process, where its repr is not."""
    return type(value).__qualname__


def _unfit(vector: Tensor) -> str | None:
    """Why a vector cannot be explained; None where it can."""
    plain = vector.as_ordinary() if isinstance(vector, ResidualTensor) else vector
    if not torch.isfinite(plain.float()).all():
        return "the vector holds NaN or infinity"
    return None if plain.ne(0).any() else "the vector is all zero"
