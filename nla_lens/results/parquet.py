"""Explanations in one parquet file: rows as in a store, so that others read it without us."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nla_lens.disk.reading import open_regular
from nla_lens.disk.writing import write_whole
from nla_lens.errors import NLAError, first_line
from nla_lens.results.explanation import Explanation
from nla_lens.results.lines import Format, damaged
from nla_lens.results.rows import (
    OWN,
    import_arrow,
    stored,
    to_explanation,
    to_row,
    to_table,
)

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX: Final = ".parquet"
_MAGIC: Final = b"PAR1"
_HEADER: Final = b"nla_lens"


def write_table(path: str | Path, table: pa.Table) -> Path:
    """Writes a table, whole or not at all."""
    parquet = import_arrow().parquet
    return write_whole(path, lambda file: parquet.write_table(table, file, compression="zstd"))


def is_parquet(path: str | Path) -> bool:
    """Whether a file's content is parquet; what cannot be read is not."""
    try:
        with open_regular(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    # Of a pipe an NLAError, which is a ValueError.
    except (OSError, ValueError):
        return False


def write_records(
    path: str | Path, form: Format, about: Mapping[str, Any], records: Sequence[Explanation]
) -> Path:
    """Writes records: the columns of a store, and behind them what else the records hold.

    Args:
        path: The file.
        form: What it is.
        about: More for its header, which is in the schema's metadata.
        records: In order; all of one kind.
    """
    more = _more(records)
    rows = [
        to_row(record, document=0, row=i, user=_values(record, more))
        for i, record in enumerate(records)
    ]
    header = {_HEADER: form.header(about).encode()}
    table = to_table(rows, more).replace_schema_metadata(header)
    return write_table(path, table)


def read_records(
    path: str | Path, form: Format, kind: type[Explanation]
) -> tuple[dict[str, Any], list[Any]]:
    """The header and the records of a file; of a store's shard those that did not fail.

    Args:
        path: The file.
        form: What it must be, where it says anything.
        kind: Of the records.

    Raises:
        NLAError: Damaged, or of another kind.
    """
    arrow = import_arrow()
    try:
        table = arrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise NLAError(f"{path} is damaged: {first_line(error)}") from error
    about: dict[str, Any] = {}
    if missing := [name for name in kind.NEEDED if name not in table.column_names]:
        raise NLAError(f"{path} has no column {missing[0]!r}: it holds no explanations")
    with damaged(path, 1):
        if (header := (table.schema.metadata or {}).get(_HEADER)) is not None:
            about = json.loads(header)
            form.check(about)
    more = [name for name in table.column_names if name not in OWN] if about else []
    found = []
    for number, row in enumerate(table.to_pylist()):
        if row.get("error") is None:
            with damaged(path, number):
                found.append(to_explanation(_loaded(row, kind, more), kind, more))
    return about, found


def _more(records: Sequence[Explanation]) -> dict[str, str]:
    """Names and types of columns for what a store has none for, where any record has it."""
    if not records:
        return {}
    beyond = [f for f in fields(records[0]) if f.name not in OWN]
    return {
        f.name: _column_type(type(records[0]).TYPES[f.name])
        for f in beyond
        if any(_is_said(getattr(record, f.name), f.default) for record in records)
    }


def _is_said(value: Any, usual: Any) -> bool:
    return usual is MISSING or value != usual


def _column_type(types: Sequence[type]) -> str:
    if float in types:
        return "double"
    return "int64" if int in types else "string" if str in types else "json"


def _values(record: Explanation, columns: Mapping[str, str]) -> dict[str, Any]:
    plain = record.to_dict()
    return {name: stored(plain[name], kind) for name, kind in columns.items()}


def _loaded(row: Mapping[str, Any], kind: type[Explanation], more: Sequence[str]) -> dict[str, Any]:
    """A row with what is beyond a store's columns read, and left out where it says nothing."""
    found = {name: value for name, value in row.items() if name not in more}
    for name in more:
        value = row[name]
        if value is not None:
            is_list = isinstance(value, str) and list in kind.TYPES.get(name, ())
            found[name] = json.loads(value) if is_list else value
    return found
