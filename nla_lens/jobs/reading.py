"""From documents to numbered rows: which tokens of each, and their residual vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.errors import NLAError
from nla_lens.jobs.corpus import Corpus, Document
from nla_lens.jobs.plan import Plan, Prepared, Row, mark_of, token_bytes
from nla_lens.jobs.positions import Picker, Tokens
from nla_lens.models.tokens import token_text
from nla_lens.stream.extraction import Source, encode, read_prompts
from nla_lens.stream.residual import ResidualTensor

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
            marks.append(mark_of(prepared, document.columns))
            tokens.update(token_bytes(prepared))
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


def _unfit(vector: Tensor) -> str | None:
    """Why a vector cannot be explained; None where it can."""
    plain = vector.as_ordinary() if isinstance(vector, ResidualTensor) else vector
    if not torch.isfinite(plain.float()).all():
        return "the vector holds NaN or infinity"
    return None if plain.ne(0).any() else "the vector is all zero"
