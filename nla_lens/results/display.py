"""How explanations are shown: a table for terminals, one self-contained page for browsers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from nla_lens.foreign import harmless
from nla_lens.results.columns import Kind, in_use
from nla_lens.results.templating import template

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

GOOD_FVE, FAIR_FVE = 0.75, 0.5
"""Shown green from the first on (released pairs reach 0.75), red below the second."""


def to_table(records: Sequence[Any], *, title: str | None = None) -> Table:
    """A terminal table of explanations, or of other records of one kind; columns in use only."""
    from rich import box
    from rich.table import Table

    shown = None if title is None else _harmless(title)
    table = Table(title=shown, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    columns = in_use(records)
    for column in columns:
        table.add_column(column.name, **_SET[column.kind])
    for record in records:
        table.add_row(*(_cell(column.kind, column.value(record)) for column in columns))
    return table


_SET: Final[dict[Kind, dict[str, Any]]] = {
    "place": {"justify": "right", "style": "dim"},
    "token": {"style": "bold cyan", "no_wrap": True},
    "name": {"no_wrap": True},
    "text": {"ratio": 1, "overflow": "fold"},
    "plain": {},
    "verdict": {},
    "number": {"justify": "right"},
    "score": {"justify": "right"},
    "flags": {"style": "yellow"},
}


def _harmless(text: str) -> Text:
    """A text whose control characters do not reach the terminal."""
    from rich.text import Text

    return Text(harmless(text))


def _cell(kind: Kind, value: Any) -> Text:
    from rich.text import Text

    if kind in ("number", "score"):
        style = _STYLES[_grade(value)] if kind == "score" and value is not None else ""
        return Text("–", style="dim") if value is None else Text(f"{value:.2f}", style=style)
    if value is None:
        return Text("")
    if kind == "token":
        return Text(repr(value)[1:-1])
    if kind == "verdict":
        return Text(value, style=_VERDICTS.get(value, ""))
    return _harmless(" ".join(value) if kind == "flags" else str(value))


_VERDICTS: Final = {
    **{"held": "green", "fell short": "red", "not measured": "dim"},
    **{"yes": "green", "not there": "red"},
}
_STYLES: Final = {"good": "green", "fair": "yellow", "poor": "red"}


def _grade(fve: float) -> str:
    return "good" if fve >= GOOD_FVE else "fair" if fve >= FAIR_FVE else "poor"


def to_html(records: Sequence[Any], *, whole_page: bool) -> str:
    """The same table as HTML; every text is escaped by the template engine.

    Args:
        records: In the order they are shown.
        whole_page: A page of its own, rather than a fragment for a notebook.
    """
    return template("explanations.html.jinja").render(
        records=records,
        columns=in_use(records),
        whole_page=whole_page,
        grade=lambda score: "" if score is None else _grade(score),
        labelled=any(record.label is not None for record in records),
    )
