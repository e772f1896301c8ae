"""What commands print: findings, tables."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import click
from rich.console import Console

from nla_lens.foreign import harmless, to_json


@dataclass(frozen=True)
class Finding:
    """One thing that was tested.

    Attributes:
        name: What was tested.
        passed: Whether it held; None for what is measured and not judged.
        detail: What was found.
    """

    name: str
    passed: bool | None
    detail: str


_NARROWEST: Final = 20
"""Columns under which a table shows nothing."""
_MARKS = {True: ("ok  ", "green"), False: ("FAIL", "red"), None: ("    ", None)}


def print_findings(findings: Iterable[Finding]) -> bool:
    """Prints findings as they come; says whether none of them failed."""
    passed = True
    for finding in findings:
        mark, colour = _MARKS[finding.passed]
        told = harmless(f"{finding.name}: {finding.detail}")
        click.echo(f"{click.style(mark, fg=colour)} {told}")
        passed &= finding.passed is not False
    return passed


def print_json(values: Any) -> None:
    """Prints one line of JSON: nothing in it steers a terminal, and no number that JSON lacks."""
    click.echo(to_json(_finite(values)))


def _finite(values: Any) -> Any:
    """The same with null for the numbers JSON does not have, such as the score of a NaN."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def print_table(table: Any) -> None:
    """Prints a rich table, as wide as the terminal."""
    console = Console()
    # Piped into a file there is no width to fit, and some editors and runners say 0: use a fixed
    # one that keeps rows readable.
    is_piped = not console.is_terminal and "COLUMNS" not in os.environ
    if is_piped or console.width < _NARROWEST:
        console = Console(width=120)
    console.print(table)
