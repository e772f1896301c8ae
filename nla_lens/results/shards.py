"""The files of a store as they are read: each is what its name says, or is named as damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from nla_lens.errors import NLAError, first_line
from nla_lens.results.rows import import_arrow, schema

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor


STORE: Final = "nla_lens.store"
"""In the metadata of shards: which store they were written for."""


def store_id(manifest: Mapping[str, Any]) -> str:
    """A hash of all that decides what a store holds."""
    deciding = {name: value for name, value in manifest.items() if name != "versions"}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def check_rows(path: Path, rows: range, store: str) -> None:
    """Looks at a shard without reading what was said.

    Args:
        path: The file.
        rows: Those that its name says.
        store: The `store_id` of the store it lies in.

    Raises:
        NLAError: It is damaged, holds other rows, or is another store's.
    """
    # An open file: names that are no Unicode are not for arrow.
    with _undamaged(path), path.open("rb") as file:
        _look(file, rows, store)


def _look(file: IO[bytes], rows: range, store: str) -> None:
    opened = import_arrow().parquet.ParquetFile(file)
    # Before anything is unpacked.
    if opened.metadata.num_rows != len(rows):
        raise ValueError(f"{opened.metadata.num_rows} rows, and its name says {len(rows)}")
    _check_store(opened.metadata.metadata or {}, store)
    if opened.read(["row"])["row"].to_pylist() != list(rows):
        raise ValueError("its rows are others than its name says, or in another order")


def _check_store(metadata: Mapping[Any, Any], store: str) -> None:
    # Of an earlier version there is nothing to be compared.
    of = metadata.get(STORE.encode(), metadata.get(STORE, store))
    if of not in (store, store.encode()):
        raise ValueError("it was written for another store, or the manifest is not what it was")


def read_rows(
    path: Path, rows: range, columns: Sequence[str] | None, user: Mapping[str, str], store: str
) -> pa.Table:
    """The rows of a shard.

    Args:
        path: The file.
        rows: Those that its name says.
        columns: Which columns; None for all.
        user: Names and types of the user's own.
        store: The `store_id` of the store it lies in.

    Raises:
        NLAError: As `check_rows`.
    """
    with _undamaged(path), path.open("rb") as file:
        _look(file, rows, store)
        return import_arrow().parquet.read_table(file, columns=columns, schema=schema(user))


def read_vectors(path: Path, n_rows: int, store: str) -> Tensor:
    """The vectors of a shard, `[n_rows, d]`.

    Raises:
        NLAError: It is damaged, holds others, or is another store's.
    """
    from safetensors import safe_open

    with _undamaged(path), safe_open(path, framework="pt") as file:
        _check_store(file.metadata() or {}, store)
        vectors_ND: Tensor = file.get_tensor("vectors")
        if vectors_ND.ndim != 2 or len(vectors_ND) != n_rows:
            raise ValueError(f"shape {tuple(vectors_ND.shape)} for {n_rows} rows")
    return vectors_ND


def read_around(path: Path, rows: range) -> dict[int, dict[str, list[str]]]:
    """The tokens `before` and `after` rows that were not explained, by the row they stand at.

    Raises:
        NLAError: It is damaged, or of other rows.
    """
    found = {}
    with _undamaged(path):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            around = json.loads(line)
            tokens = {name: list(map(str, around[name])) for name in ("before", "after")}
            if around["row"] not in rows:
                raise ValueError(f"row {around['row']} is not one of its own")
            found[int(around["row"])] = tokens
    return found


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Says which file is not what was written."""
    from safetensors import SafetensorError

    try:
        yield
    except (KeyError, OSError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        if isinstance(error, NLAError):
            raise
        reason = first_line(error)
        raise NLAError(
            f"{path} is damaged ({reason}); remove it, and the same command makes it again"
        ) from error
