"""Documents in files: text, JSON lines, parquet; vectors in safetensors, npy and parquet."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from nla_lens.checks import to_path
from nla_lens.errors import NLAError, first_line
from nla_lens.jobs.corpus import Document, File, Part
from nla_lens.jobs.memory import Rows, check_column, from_record
from nla_lens.jobs.vector_files import open_npy, open_safetensors
from nla_lens.results.rows import import_arrow

VECTOR_COLUMN: Final = "vector"
_CHUNK: Final = 1 << 22


def are_paths(source: Any) -> bool:
    """Whether something is a list of paths and not of texts."""
    return (
        isinstance(source, (list, tuple))
        and bool(source)
        and all(isinstance(part, os.PathLike) for part in source)
    )


class TextFile:
    """One document a file."""

    file: File | None = None

    def __init__(self, path: Path) -> None:
        """Raises:
        NLAError: It cannot be read, or is no text.
        """
        self.name, self._path = path.name, path
        # Read once now: what is no text is said before any model runs.
        self._text()

    def _text(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise NLAError(f"{self._path} is no UTF-8 text ({error})") from error
        except OSError as error:
            raise NLAError(f"{self._path} cannot be read: {error.strerror or error}") from error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Document:
        return Document(text=self._text(), columns={"file": self.name})

    def digest(self) -> str:
        """See `Part`."""
        return file_digest(self._path)


class JSONLines:
    """One document a line; only where lines begin is kept in memory.

    Attributes:
        broken: Documents that are no JSON objects, and what is wrong with which line.
    """

    file: File | None = None

    def __init__(self, path: Path, column: str | None) -> None:
        """Raises:
        NLAError: It cannot be read, or no line has the column.
        """
        self.name, self._path, self._column = path.name, path, column
        self._starts = array("q")
        self.broken: dict[int, str] = {}
        seen: dict[str, None] = {}
        at = number = 0
        try:
            with path.open("rb") as file:
                for line in file:
                    number += 1
                    if line.strip():
                        self._starts.append(at)
                        self._look(line, number, seen)
                    at += len(line)
        except OSError as error:
            raise NLAError(f"{path} cannot be read: {error.strerror or error}") from error
        if len(self._starts) > len(self.broken):
            check_column(list(seen), column, path)

    def _look(self, line: bytes, number: int, seen: dict[str, None]) -> None:
        try:
            seen.update(dict.fromkeys(_record(line)))
        except ValueError as error:
            self.broken[len(self._starts) - 1] = f"{self.name}, line {number}: {error}"

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Document:
        if index in self.broken:
            return Document(error=self.broken[index])
        try:
            with self._path.open("rb") as file:
                file.seek(self._starts[index])
                return from_record(_record(file.readline()), self._column)
        except (OSError, ValueError) as error:
            return Document(error=f"{self.name} has changed meanwhile: {error}")

    def digest(self) -> str:
        """See `Part`."""
        return file_digest(self._path)


def _record(line: bytes) -> dict[str, Any]:
    """Raises a ValueError for a line that is no JSON object."""
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not an object")
    return found


class Parquet:
    """One document a row; a row group at a time is kept in memory."""

    def __init__(self, path: Path, column: str | None) -> None:
        """Raises:
        NLAError: No parquet, or without the column.
        """
        self.name, self._path, self._column = path.name, path, column
        arrow = import_arrow()
        try:
            self._file = arrow.parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise NLAError(f"{path} cannot be read as parquet: {first_line(error)}") from error
        names = list(self._file.schema_arrow.names)
        vectors = column or VECTOR_COLUMN
        self.is_vectors = vectors in names and _is_list_of_floats(
            arrow, self._file.schema_arrow.field(vectors).type
        )
        if self.is_vectors:
            self._column = vectors
        else:
            check_column(names, column, path)
        self.file = File(path) if self.is_vectors else None
        counts = [
            self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)
        ]
        self._stops = np.cumsum(counts)
        self._held: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __getitem__(self, index: int) -> Document:
        group = int(np.searchsorted(self._stops, index, side="right"))
        held, rows = self._held
        if held != group:
            try:
                rows = self._file.read_row_group(group).to_pylist()
            except (OSError, ValueError) as error:
                return Document(error=f"{self.name}: {first_line(error)}")
            self._held = group, rows
        before = int(self._stops[group - 1]) if group else 0
        row = rows[index - before]
        if not self.is_vectors:
            return from_record(row, self._column)
        others = {name: value for name, value in row.items() if name != self._column}
        vector = row[str(self._column)]
        if vector is None:
            return Document(columns=others, error=f"{self._column} is null")
        return Document(vectors=torch.tensor([vector], dtype=torch.float32), columns=others)

    def digest(self) -> str:
        """See `Part`."""
        return file_digest(self._path)


def _is_list_of_floats(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(listed and types.is_floating(kind.value_type))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a table: parquet or JSON lines.

    Raises:
        NLAError: It cannot be read; names the line.
    """
    if path.suffix == ".parquet":
        arrow = import_arrow()
        try:
            found: list[dict[str, Any]] = arrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise NLAError(f"{path} cannot be read as parquet: {first_line(error)}") from error
        return found
    records = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise NLAError(f"{path} cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                records.append(_record(line))
            except ValueError as error:
                raise NLAError(f"{path}, line {number}: {error}") from error
    return records


_VECTORS: Final[dict[str, Callable[[Path], list[Part]]]] = {
    ".npy": open_npy,
    ".safetensors": open_safetensors,
}
_TABLES: Final = (".csv", ".json", ".tsv")
_TEXTS: Final = (".txt", ".md", ".jsonl", ".ndjson", ".parquet")


def open_files(source: Any, column: str | None) -> tuple[list[Part], bool]:
    """Parts of files, and whether they hold vectors.

    Raises:
        NLAError: No such file, of no kind that is known, or texts and vectors mixed.
    """
    given = list(source) if isinstance(source, (list, tuple)) else [source]
    parts: list[Part] = []
    kinds: set[bool] = set()
    for path in [found for one in given for found in _listed(to_path(one))]:
        opened = _open(path, column)
        kinds |= {isinstance(part, Rows) or getattr(part, "is_vectors", False) for part in opened}
        parts += opened
        if len(kinds) > 1:
            raise NLAError(f"{path}: texts and vectors cannot be mixed in one job")
    return parts, kinds == {True}


def _listed(path: Path) -> list[Path]:
    """A file, or those of a folder whose kind is known, by name."""
    if not os.path.exists(path):
        raise NLAError(f"{path} is not there")
    if path.is_file():
        return [path]
    if not path.is_dir():
        # A pipe nobody writes to, a device without an end.
        raise NLAError(f"{path} is no regular file; save what it gives as one")
    found = sorted(
        p
        for p in path.rglob("*")
        if p.suffix.lower() in (*_TEXTS, *_VECTORS)
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    if not found:
        raise NLAError(f"{path} holds no {', '.join([*_TEXTS, *_VECTORS])} files")
    return found


def _open(path: Path, column: str | None) -> list[Part]:
    kind = path.suffix.lower()
    if kind in _VECTORS:
        return _VECTORS[kind](path)
    if kind == ".parquet":
        return [Parquet(path, column)]
    if kind in (".jsonl", ".ndjson"):
        return [JSONLines(path, column)]
    if kind in _TABLES:
        raise NLAError(
            f"{path} is a table of a kind that is not read; write it as .jsonl or .parquet, or "
            "pass a data frame (to have it explained as one text, name it .txt)"
        )
    return [TextFile(path)]


def file_digest(path: Path) -> str:
    """sha256 of a file.

    Raises:
        NLAError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise NLAError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
