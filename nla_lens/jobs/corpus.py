"""What is explained, document by document, wherever it lies."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.results.rows import column_type, user_columns

_LARGE: Final = "large"
_MOST_EXACT: Final = 1 << 53
"""Larger integers are not numbers of float64."""
COLUMNS: Final = ("text", "messages")
"""Looked for in this order where none is named."""


@dataclass(frozen=True)
class Document:
    """One thing to be explained.

    Attributes:
        text: A text or a list of chat messages; None for vectors, or where it could not be read.
        vectors: `[n, d]`, where vectors were given.
        columns: The user's own values.
        error: Why it could not be read.
    """

    text: Any = None
    vectors: Tensor | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


class File:
    """A file that must stay as it is while a job runs."""

    def __init__(self, path: Path) -> None:
        """Raises an NLAError if it is not there."""
        self._path = path
        self._was = self._looked_at()

    def check(self) -> None:
        """Raises an NLAError if it was written to or replaced since."""
        if self._looked_at() != self._was:
            raise NLAError(f"{self._path} has changed since the job began; begin a new store")

    def _looked_at(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise NLAError(f"{self._path} cannot be read: {error.strerror or error}") from error
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Part(Protocol):
    """Documents of one file, or of one list; any of them can be read at any time.

    Attributes:
        name: What it is called in messages.
        file: Where vectors lie that are read when they are explained; texts are compared
            themselves.
    """

    name: str
    file: File | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def digest(self) -> str:
        """A hash of the content."""
        ...


class Corpus(Sequence[Document]):
    """All documents, numbered through.

    Attributes:
        parts: Files or lists, in order.
        user: The user's columns: name in the input -> (name in the store, type).
        is_vectors: Whether these are vectors and not texts.
    """

    def __init__(
        self, parts: Sequence[Part], *, is_vectors: bool, limit: int | None = None
    ) -> None:
        """Args:
        parts: See the class.
        is_vectors: See the class.
        limit: Only the first so many documents.
        """
        self.parts, self.is_vectors = list(parts), is_vectors
        self.user: dict[str, tuple[str, str]]
        self._starts: list[int] = []
        total = 0
        for part in self.parts:
            self._starts.append(total)
            total += len(part)
        self._n = total if limit is None else min(limit, total)
        self.user = self._user()

    def _user(self) -> dict[str, tuple[str, str]]:
        """One pass over the columns, so that every shard gets the same types."""
        kinds: dict[str, set[str]] = {}
        for document in self:
            for name, value in document.columns.items():
                found = kinds.setdefault(name, set())
                found.add(column_type([value]) if value is not None else "")
                if type(value) is int and abs(value) > _MOST_EXACT:
                    found.add(_LARGE)
        named = user_columns(kinds)
        return {name: (named[name], _joined(found - {""})) for name, found in kinds.items()}

    def first(self, n: int) -> Corpus:
        """The first n documents."""
        return Corpus(self.parts, is_vectors=self.is_vectors, limit=n)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < self._n:
            raise IndexError(index)
        at = bisect.bisect_right(self._starts, index) - 1
        return self.parts[at][index - self._starts[at]]

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

    def check_unchanged(self) -> None:
        """Raises an NLAError if a file has changed whose content is not looked at again."""
        for part in self.parts:
            if part.file is not None:
                part.file.check()

    def described(self) -> dict[str, Any]:
        """What a manifest says of the input."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{part.name}\0{part.digest()}\0".encode("utf-8", "backslashreplace"))
        names = [part.name for part in self.parts]
        shown = names if len(names) <= 20 else [*names[:20], f"... {len(names) - 20} more"]
        return {"files": shown, "n_documents": len(self), "sha256": digest.hexdigest()}


class Excerpt(Corpus):
    """Some documents in a row, by their numbers in the whole; it travels to other processes."""

    def __init__(self, whole: Corpus, numbers: range) -> None:
        """Args:
        whole: The corpus.
        numbers: Which of its documents.
        """
        self.parts, self.user, self.is_vectors = [], whole.user, whole.is_vectors
        self._first = numbers.start
        self._documents = [_alone(whole[i]) for i in numbers]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index - self._first < len(self._documents):
            raise IndexError(index)
        return self._documents[index - self._first]


def _alone(document: Document) -> Document:
    """A pickle of a view would hold all that it is a view of."""
    if document.vectors is None:
        return document
    return replace(document, vectors=document.vectors.clone())


def _joined(kinds: set[str]) -> str:
    if _LARGE in kinds:
        # Beside other numbers an id would be rounded.
        return "int64" if kinds == {_LARGE, "int64"} else "json"
    if len(kinds) <= 1:
        return next(iter(kinds), "string")
    return "double" if kinds <= {"int64", "double"} else "json"
