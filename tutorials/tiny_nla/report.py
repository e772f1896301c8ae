"""Evaluates the embedded pairs, and three that are broken on purpose, for docs/evaluating.md.

``python report.py --page docs/evaluating.md`` writes the two tables between the marks of the page.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import corpus
from broken import BROKEN

from nla_lens import NLA, evaluate

SEED = 777_003
"""Of documents that neither training nor calibration has seen."""
POSITIONS = ["from:4", "spread:4"]
PAIRS = ("tiny", "tiny-norm-matched")


def main() -> None:
    """Measures, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=150)
    args = parser.parse_args()
    texts = [document.text for document in corpus.documents(SEED, args.documents)]
    whole = {
        name: evaluate(NLA.from_pretrained(name), texts, positions=POSITIONS) for name in PAIRS
    }
    # A few dozen documents show what a fault of this size does.
    some = texts[: args.documents // 4]
    rows = [name for name, row in whole["tiny"].items() if row.verdict != "not measured"]
    broken = {
        name: evaluate(make(), some, positions=POSITIONS, rows=rows)
        for name, make in BROKEN.items()
    }
    page = args.page.read_text(encoding="utf-8")
    page = between(page, "whole pairs", measures_table(whole))
    page = between(page, "broken pairs", verdicts_table({"tiny": whole["tiny"], **broken}))
    args.page.write_text(page, encoding="utf-8")


def between(page: str, name: str, table: str) -> str:
    """Puts a table between two marks."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})"
    return re.sub(pattern, lambda _: f"{table}\n", page, count=1, flags=re.DOTALL)


def measures_table(reports: Mapping[str, Any]) -> str:
    """A row for each measure: value, interval and control of each pair."""
    (first, *_) = reports.values()
    head = ["measure", *(cell for name in reports for cell in (f"`{name}`", "control"))]
    lines = [head, ["---"] * len(head)]
    for name, row in first.items():
        cells = [f"`{name}`: {row.title}"]
        for report in reports.values():
            own = report[name]
            if own.value is None:
                cells += ["not measured", own.reason]
            else:
                value = f"**{own.value:.3f}** [{own.low:.3f}, {own.high:.3f}]"
                cells += [value, f"{own.control:.3f} {own.control_name}"]
        lines.append(cells)
    return markdown(lines)


def verdicts_table(reports: Mapping[str, Any]) -> str:
    """A row for each measure: its value with each pair, bold where it fell short."""
    *_, last = reports.values()
    lines = [["measure", *reports], ["---"] * (len(reports) + 1)]
    for name in last:
        own = [report[name] for report in reports.values()]
        cells = [
            "not measured"
            if row.value is None
            else f"**{row.value:.3f}**"
            if row.verdict == "fell short"
            else f"{row.value:.3f}"
            for row in own
        ]
        if any(row.verdict == "fell short" for row in own):
            lines.append([f"`{name}`", *cells])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A table's text."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
