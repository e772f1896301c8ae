"""Documents that are in memory already: texts, chats, dicts, data frames, vectors."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.jobs.corpus import COLUMNS, Document, File, Part


class Listed:
    """A list of rows, each a text, a chat or a dict with one of the two."""

    file: File | None = None

    def __init__(self, rows: Sequence[Any], column: str | None, name: str = "list") -> None:
        """Args:
        rows: The rows.
        column: Which key of a dict is read.
        name: What it is called in messages.
        """
        self.name, self._rows, self._column = name, rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        row = self._rows[index]
        if isinstance(row, Mapping):
            return from_record(_native(row), self._column)
        return Document(text=row)

    def digest(self) -> str:
        """See `Part`."""
        digest = hashlib.sha256()
        for i, row in enumerate(self._rows):
            try:
                digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
            # What holds itself, keys that are no texts or cannot be sorted.
            except (RecursionError, TypeError, ValueError) as error:
                raise NLAError(f"document {i} of the {self.name} is no JSON: {error}") from error
        return digest.hexdigest()


class Rows:
    """Vectors, each a document of its own; `[n, d]`."""

    def __init__(self, vectors_ND: Tensor, name: str = "vectors", file: File | None = None) -> None:
        """Args:
        vectors_ND: `[n, d]`.
        name: What they are called in messages.
        file: Where they lie.
        """
        self.name, self._vectors_ND, self.file = name, vectors_ND, file

    def __len__(self) -> int:
        return len(self._vectors_ND)

    def __getitem__(self, index: int) -> Document:
        return Document(vectors=self._vectors_ND[index : index + 1])

    def digest(self) -> str:
        """See `Part`."""
        digest = hashlib.sha256(
            str((self._vectors_ND.dtype, tuple(self._vectors_ND.shape))).encode()
        )
        for part in self._vectors_ND.split(4096):
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _records(frame: Any) -> list[dict[str, Any]]:
    """The rows of a data frame of pandas or polars, each value as it is; None where there is none.

    Raises:
        NLAError: Two columns of one name, or no such frame.
    """
    names = list(map(str, frame.columns))
    if twice := [name for name in names if names.count(name) > 1]:
        raise NLAError(f"the data frame has two columns {twice[0]!r}")
    try:
        if hasattr(frame, "to_dicts"):
            found: list[dict[str, Any]] = frame.to_dicts()
            return found
        # Not its own JSON, which rounds numbers.
        values = frame.astype(object).where(frame.notna(), None).to_dict(orient="split")["data"]
    except (AttributeError, TypeError, ValueError) as error:
        raise NLAError(f"the data frame cannot be read: {error}") from error
    return [dict(zip(names, row, strict=True)) for row in values]


def _native(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with numpy's numbers and arrays as Python's own."""
    ours = (np.generic, np.ndarray)
    return {name: v.tolist() if isinstance(v, ours) else v for name, v in row.items()}


def from_record(row: Mapping[str, Any], column: str | None) -> Document:
    """A document out of a row with named values; what is not read travels along."""
    name = column or next((c for c in COLUMNS if row.get(c) is not None), None)
    others = {k: v for k, v in row.items() if k != name}
    if name is None or row.get(name) is None:
        wanted = column or " or ".join(COLUMNS)
        return Document(columns=others, error=f"no {wanted} in this row; it has {', '.join(row)}")
    value = row[name]
    if not isinstance(value, (str, list, tuple)):
        return Document(columns=others, error=f"{name} is {value!r:.60}, not a text or messages")
    return Document(text=value, columns=others)


def open_values(
    source: Any, column: str | None, limit: int | None = None
) -> tuple[list[Part], bool]:
    """Parts of what is in memory, and whether they are vectors; no more is taken than `limit`.

    Raises:
        NLAError: Nothing that could be explained.
    """
    if isinstance(source, (Tensor, np.ndarray)):
        return [Rows(as_rows(source, "vectors"))], True
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        records = _records(source)
        check_column(list(map(str, source.columns)), column, "the data frame")
        return [Listed(records, column, "data frame")], False
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise NLAError(
            f"a {type(source).__name__} is no corpus: pass paths, texts, chats or vectors"
        )
    # What has no end may be limited.
    listed = list(source if isinstance(source, Sequence) else itertools.islice(source, limit))
    if listed and all(isinstance(row, (Tensor, np.ndarray)) for row in listed):
        return [
            Rows(as_rows(part, f"vectors {i}"), f"vectors {i}") for i, part in enumerate(listed)
        ], True
    for i, row in enumerate(listed):
        if not isinstance(row, (str, Mapping, list, tuple)):
            raise NLAError(
                f"document {i} is a {type(row).__name__}; expected a text, a chat or a dict"
            )
    if column is not None:
        check_column(
            sorted({key for row in listed if isinstance(row, Mapping) for key in row}),
            column,
            "the list",
        )
    return [Listed(listed, column)], False


def check_column(found: Sequence[str], column: str | None, where: object) -> None:
    """Raises an NLAError where the column to be read is not there."""
    if column is not None and column not in found:
        raise NLAError(f"{where} has no column {column!r}; it has {', '.join(found) or 'none'}")
    if column is None and not set(COLUMNS) & set(found):
        raise NLAError(
            f"{where} has no column {' or '.join(map(repr, COLUMNS))}; it has "
            f"{', '.join(found) or 'none'}; name one: column="
        )


def as_rows(given: Tensor | np.ndarray[Any, Any], where: object) -> Tensor:
    """`[n, d]` of vectors with any leading axes; an array's own memory where torch can have it.

    Raises:
        NLAError: No vectors.
    """
    vectors = given if isinstance(given, Tensor) else _from_numpy(given, where)
    if vectors.ndim == 0 or not vectors.is_floating_point():
        raise NLAError(f"{where}: {vectors.dtype} of shape {tuple(vectors.shape)} are no vectors")
    return vectors.reshape(-1, vectors.shape[-1])


def _from_numpy(array: np.ndarray[Any, Any], where: object) -> Tensor:
    dtype = array.dtype
    if not array.ndim or dtype.kind != "f":
        raise NLAError(f"{where}: {dtype} of shape {array.shape} are no vectors")
    if dtype.itemsize > 8:
        # Long double, which torch has no name for.
        array = array.astype(np.float64)
    elif not dtype.isnative or not array.flags.writeable:
        array = array.astype(dtype.newbyteorder("="))
    return torch.as_tensor(np.ascontiguousarray(array) if min(array.strides) < 0 else array)
