"""What of a record is shown, and how: one list of columns for the terminal's table and the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal[
    "place", "token", "name", "text", "plain", "number", "score", "flags", "verdict"
]
"""How a value is set: a token keeps its blanks and shows its line breaks, a score has a colour."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its heading.
        kind: How its values are set.
        value: What a record has there; None: nothing.
        always: Shown even where no record has anything there.
    """

    name: str
    kind: Kind
    value: Callable[[Any], Any]
    always: bool = False


def in_use(records: Sequence[Any]) -> list[Column]:
    """The columns of records of one kind in which any of them has something."""
    if not records:
        return []
    columns: Sequence[Column] = records[0].columns
    return [c for c in columns if c.always or any(_has(c.value(record)) for record in records)]


def _has(value: Any) -> bool:
    return value is not None and value != ()
