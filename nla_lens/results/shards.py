"""The files of a store as they are read: each is what its name says, or is named as damaged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nla_lens.errors import NLAError
from nla_lens.results.rows import import_arrow, schema

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor


def read_rows(
    path: Path, n_rows: int, columns: Sequence[str] | None, user: Mapping[str, str]
) -> pa.Table:
    """The rows of a shard.

    Args:
        path: The file.
        n_rows: How many rows its name says.
        columns: Which columns; None for all.
        user: Names and types of the user's own.

    Raises:
        NLAError: It is damaged, or holds another number of rows.
    """
    parquet = import_arrow().parquet
    # An open file: names that are no Unicode are not for arrow.
    with _undamaged(path), path.open("rb") as file:
        found = parquet.ParquetFile(file).metadata.num_rows
        # Before anything is unpacked.
        if found != n_rows:
            raise ValueError(f"{found} rows, and its name says {n_rows}")
        return parquet.read_table(file, columns=columns, schema=schema(user))


def read_vectors(path: Path, n_rows: int) -> Tensor:
    """The vectors of a shard, `[n_rows, d]`.

    Raises:
        NLAError: It is damaged, or holds others.
    """
    from safetensors.torch import load_file

    with _undamaged(path):
        vectors_ND: Tensor = load_file(path)["vectors"]
        if vectors_ND.ndim != 2 or len(vectors_ND) != n_rows:
            raise ValueError(f"shape {tuple(vectors_ND.shape)} for {n_rows} rows")
    return vectors_ND


def read_around(path: Path) -> dict[int, dict[str, list[str]]]:
    """The tokens `before` and `after` rows that were not explained, by the row they stand at.

    Raises:
        NLAError: It is damaged.
    """
    found = {}
    with _undamaged(path):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            around = json.loads(line)
            tokens = {name: list(map(str, around[name])) for name in ("before", "after")}
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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NLAError(
            f"{path} is damaged ({reason}); remove it, and the same command makes it again"
        ) from error
