"""A report: measures with their controls, as a table, JSON, a page and pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from nla_lens.disk.writing import make_folder, write_whole
from nla_lens.errors import NLAError
from nla_lens.evaluation.bootstrap import Interval
from nla_lens.results.columns import Column
from nla_lens.results.display import to_html, to_table
from nla_lens.results.plots import import_pyplot

if TYPE_CHECKING:
    from collections.abc import Sequence

Verdict = Literal["held", "fell short", "not measured"]
_WIDTH: Final = 150


@dataclass(frozen=True)
class Measure:
    """One row of a report.

    Attributes:
        name: As in evaluation.md's table: `fve_nrm`, `retrieval`, ...
        title: What it measures, in a few words.
        value: None where it was not measured.
        low: 2.5 % of a bootstrap over documents.
        high: 97.5 %.
        n: How many rows it is over.
        control: The same for something that should not do as well.
        control_name: What that is.
        verdict: "held", "fell short" or "not measured".
        reason: Why.
        public: A published figure to see it beside.
        details: More numbers of the same kind.
    """

    name: str
    title: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    control: float | None = None
    control_name: str = ""
    verdict: Verdict = "not measured"
    reason: str = ""
    public: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    columns: ClassVar[Sequence[Column]] = (
        Column("measure", "name", lambda m: m.name),
        Column("what", "text", lambda m: m.title),
        Column("value", "plain", lambda m: _spelled(m.value)),
        Column("95 %", "plain", lambda m: _between(m)),
        Column("n", "plain", lambda m: str(m.n) if m.n else ""),
        Column("control", "plain", lambda m: _control(m)),
        Column("verdict", "verdict", lambda m: m.verdict),
        Column("why", "text", lambda m: m.reason),
        Column("published", "text", lambda m: m.public or None),
    )
    position: ClassVar[None] = None
    label: ClassVar[None] = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return _finite({**asdict(self), "details": dict(self.details)})


def measured(
    name: str,
    title: str,
    found: Interval,
    *,
    control: Interval | float | None = None,
    control_name: str = "",
    holds: bool,
    reason: str,
    public: str = "",
    **details: Any,
) -> Measure:
    """A measure that was taken."""
    beside = control.value if isinstance(control, Interval) else control
    return Measure(
        name,
        title,
        found.value,
        found.low,
        found.high,
        found.n,
        beside,
        control_name,
        "held" if holds else "fell short",
        reason,
        public,
        details,
    )


def _spelled(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _between(m: Measure) -> str:
    return "" if m.low is None or m.high is None else f"{_spelled(m.low)} to {_spelled(m.high)}"


def _control(m: Measure) -> str:
    return "" if m.control is None else f"{_spelled(m.control)} ({m.control_name})"


def _finite(value: Any) -> Any:
    if isinstance(value, Interval):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Report(Mapping[str, Measure]):
    """What was measured, by name; its repr is the table.

    Attributes:
        about: What it was measured on.
    """

    def __init__(self, measures: Mapping[str, Measure], about: Mapping[str, Any]) -> None:
        """Args:
        measures: In the order they are shown.
        about: What it was measured on; values JSON has.
        """
        self._measures, self.about = dict(measures), dict(about)

    def __getitem__(self, name: str) -> Measure:
        if name not in self._measures:
            raise NLAError(f"no row {name!r}; there are {', '.join(self._measures)}")
        return self._measures[name]

    def __contains__(self, name: object) -> bool:
        return name in self._measures

    def __iter__(self) -> Iterator[str]:
        return iter(self._measures)

    def __len__(self) -> int:
        return len(self._measures)

    def to_table(self) -> Any:
        """A table for terminals."""
        return to_table(list(self.values()), title=self.title())

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=_WIDTH, file=io.StringIO())
        console.print(self.to_table())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def title(self) -> str:
        """What it is about, in a line."""
        return ", ".join(
            f"{key}: {value}" for key, value in self.about.items() if value is not None
        )

    def _repr_html_(self) -> str:
        return to_html(list(self.values()), whole_page=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        rows = {name: measure.to_dict() for name, measure in self.items()}
        return {"about": _finite(self.about), "rows": rows}

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page, everything escaped."""
        return write_whole(path, to_html(list(self.values()), whole_page=True))

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws every measure beside its control, and those that have more to show.

        Raises:
            NLAError: matplotlib (extra `plots`) is not installed.
        """
        pyplot = import_pyplot()
        folder = make_folder(folder)
        written = []
        shown = [m for m in self.values() if m.value is not None and math.isfinite(m.value)]
        figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(shown) + 1), layout="constrained")
        for y, m in enumerate(reversed(shown)):
            axes.plot([m.low, m.high], [y, y], color="tab:blue")
            axes.plot(m.value, y, "o", color="tab:blue", label="measured" if y == 0 else None)
            if m.control is not None:
                axes.plot(
                    m.control, y, "x", color="tab:orange", label="control" if y == 0 else None
                )
        axes.set_yticks(range(len(shown)), [m.name for m in reversed(shown)])
        axes.axvline(0, color="gray", linewidth=0.5)
        axes.legend(loc="best")
        written.append(_saved(figure, folder / "measures.png"))
        pyplot.close(figure)
        for m in shown:
            curves = {k: v for k, v in m.details.items() if isinstance(v, Mapping) and v}
            if curves:
                written.append(_draw_details(m, curves, folder))
        return written


def _draw_details(m: Measure, curves: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(4.5 * len(curves), 3), layout="constrained", squeeze=False
    )
    for ax, (name, curve) in zip(axes[0], curves.items(), strict=True):
        ax.bar(list(map(str, curve)), [0.0 if v is None else float(v) for v in curve.values()])
        ax.set_title(name)
        ax.tick_params(axis="x", rotation=45)
    figure.suptitle(m.name)
    written = _saved(figure, folder / f"{m.name}.png")
    pyplot.close(figure)
    return written


def _saved(figure: Any, path: Path) -> Path:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=150)
    return write_whole(path, held.getvalue())
