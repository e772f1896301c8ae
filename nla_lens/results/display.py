"""How explanations are shown: a table for terminals, one self-contained page for browsers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from nla_lens.foreign import harmless

if TYPE_CHECKING:
    import jinja2

    from nla_lens.results.explanation import Explanation

GOOD_FVE, FAIR_FVE = 0.75, 0.5
"""Shown green from the first on (released pairs reach 0.75), red below the second."""


def to_table(explanations: Sequence[Explanation], *, title: str | None = None) -> Table:
    """A terminal table: position, token, explanation, cos, fve_nrm, flags; columns in use only."""
    shown = None if title is None else _harmless(title)
    table = Table(title=shown, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    located = any(e.position is not None for e in explanations)
    scored = any(e.cos is not None for e in explanations)
    flagged = any(e.flags for e in explanations)
    if located:
        table.add_column("pos", justify="right", style="dim")
        table.add_column("token", style="bold cyan", no_wrap=True)
    table.add_column("explanation", ratio=1, overflow="fold")
    if scored:
        table.add_column("cos", justify="right")
        table.add_column("fve_nrm", justify="right")
    if flagged:
        table.add_column("flags", style="yellow")
    for e in explanations:
        row = [_harmless(e.text)]
        if located:
            row = [Text("" if e.position is None else str(e.position)), _token(e), *row]
        if scored:
            row += [_number(e.cos), _number(e.fve_nrm, colour=True)]
        if flagged:
            row.append(Text(" ".join(e.flags)))
        table.add_row(*row)
    return table


def _harmless(text: str) -> Text:
    """A text whose control characters do not reach the terminal."""
    return Text(harmless(text))


def _token(e: Explanation) -> Text:
    return Text("" if e.token is None else repr(e.token)[1:-1])


def _number(value: float | None, *, colour: bool = False) -> Text:
    if value is None:
        return Text("–", style="dim")
    style = {"good": "green", "fair": "yellow", "poor": "red"}[_grade(value)] if colour else ""
    return Text(f"{value:.2f}", style=style)


def _grade(fve: float) -> str:
    return "good" if fve >= GOOD_FVE else "fair" if fve >= FAIR_FVE else "poor"


def to_html(explanations: Sequence[Explanation], *, whole_page: bool) -> str:
    """The same table as HTML; every text is escaped by the template engine.

    Args:
        explanations: In the order they are shown.
        whole_page: A page of its own, rather than a fragment for a notebook.
    """
    return _template().render(
        explanations=explanations,
        whole_page=whole_page,
        grade=lambda e: "" if e.fve_nrm is None else _grade(e.fve_nrm),
        scored=any(e.cos is not None for e in explanations),
        located=any(e.position is not None for e in explanations),
    )


@cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nla_lens.results"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("explanations.html.jinja")
