"""Explanations as rows of a table: the columns, their types, and the way there and back."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from nla_lens.foreign import well_formed, well_formed_in
from nla_lens.results.explanation import Explanation

if TYPE_CHECKING:
    import pyarrow as pa

OWN: Final = (
    "document",
    "row",
    "position",
    "token_id",
    "token",
    "hook_name",
    "text",
    "raw_text",
    "token_ids",
    "complete",
    "norm",
    "cos",
    "mse_nrm",
    "fve_nrm",
    "flags",
    "samples",
    "trust",
    "error",
)
"""The columns of a store, before the user's own."""
USER_TYPES: Final = ("string", "int64", "double", "bool", "json")
"""What a user's column may hold; `json` is text, of values that have no one type."""


def import_arrow() -> Any:
    """pyarrow, with its parquet reader and writer."""
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def schema(user: Mapping[str, str]) -> pa.Schema:
    """The columns of a store.

    Args:
        user: Names and types (`USER_TYPES`) of the columns that travel along.
    """
    pa = import_arrow()
    said = [
        ("text", pa.string()),
        ("raw_text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("complete", pa.bool_()),
        ("norm", pa.float32()),
        ("cos", pa.float32()),
        ("mse_nrm", pa.float32()),
        ("fve_nrm", pa.float32()),
        ("flags", pa.list_(pa.string())),
        ("trust", pa.float64()),
    ]
    types = {
        "document": pa.int64(),
        "row": pa.int64(),
        "position": pa.int32(),
        "token_id": pa.int32(),
        "token": pa.string(),
        "hook_name": pa.string(),
        "samples": pa.list_(pa.struct(said)),
        "error": pa.string(),
        **dict(said),
    }
    # A store of an earlier version may have a column of the user's that is called as one of ours.
    own = [pa.field(name, types[name]) for name in OWN if name not in user]
    theirs = [
        pa.field(name, pa.string() if kind == "json" else pa.type_for_alias(kind))
        for name, kind in user.items()
    ]
    return pa.schema(own + theirs)


def to_row(
    explanation: Explanation, *, document: int, row: int, user: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One explanation as a row; `user` are values of the user's own columns."""
    values = {name: getattr(explanation, name) for name in OWN if hasattr(explanation, name)}
    values["flags"] = list(explanation.flags)
    values["samples"] = [to_sample(sample) for sample in explanation.samples]
    return well_formed_in(
        {**(user or {}), **values, "document": document, "row": row, "error": None}
    )


def to_sample(sample: Explanation) -> dict[str, Any]:
    """One of several samples: what was said, without the place, which they share."""
    said = (
        "text", "raw_text", "token_ids", "complete", "norm", "cos", "mse_nrm", "fve_nrm", "trust",
    )  # fmt: skip
    return {**{name: getattr(sample, name) for name in said}, "flags": list(sample.flags)}


def failed_row(
    reason: str, *, document: int, row: int, user: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A row for what could not be explained."""
    return well_formed_in({**(user or {}), "document": document, "row": row, "error": reason})


def to_table(rows: Iterable[Mapping[str, Any]], user: Mapping[str, str]) -> pa.Table:
    """Rows as an arrow table."""
    return import_arrow().Table.from_pylist(list(rows), schema=schema(user))


def to_explanations(rows: Iterable[Mapping[str, Any]]) -> list[Explanation]:
    """The explanations of rows, without those that failed."""
    return [to_explanation(row) for row in rows if row.get("error") is None]


def to_explanation(
    row: Mapping[str, Any], kind: type[Explanation] = Explanation, more: Collection[str] = ()
) -> Any:
    """The explanation in a row; where it came from is shared by its samples.

    Args:
        row: Values of columns; a user's own may bear any name.
        kind: Of the record.
        more: Columns that are ours, beside those of a store.
    """
    place = {name: row.get(name) for name in ("token", "token_id", "position", "hook_name")}
    ours = {*OWN, *more}
    known = {f.name: row[f.name] for f in fields(kind) if f.name in row and f.name in ours}
    samples = [{**sample, **place} for sample in row.get("samples") or ()]
    return kind.from_dict({**known, "flags": row.get("flags") or [], "samples": samples})


def user_columns(found: Iterable[str]) -> dict[str, str]:
    """What the user's columns are called in a store: one that has a name of ours gets `input_`."""
    listed = list(found)
    taken = {*OWN, *listed}
    named: dict[str, str] = {}
    for name in listed:
        # Names in parquet are texts with a UTF-8; keys of a dict may be anything.
        called = well_formed(str(name))
        while called in OWN or (called != name and called in taken):
            called = f"input_{called}"
        taken.add(called)
        named[name] = called
    return named


def column_type(values: Iterable[Any]) -> str:
    """The narrowest of `USER_TYPES` that holds values, None left out."""
    given = [value for value in values if value is not None]
    kinds = {type(value) for value in given}
    if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in given):
        return "json"
    if not kinds or kinds == {str}:
        return "string"
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return "int64"
    return "double" if kinds <= {int, float} else "json"


def stored(value: Any, kind: str) -> Any:
    """A user's value as its column holds it; see `column_type`."""
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, ensure_ascii=False, default=str)
    return float(value) if kind == "double" else value
