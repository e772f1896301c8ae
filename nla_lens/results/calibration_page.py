"""How a calibration is shown: in a few lines, as a page, as pictures; from what its file says."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nla_lens.checks import is_number
from nla_lens.disk.writing import write_whole
from nla_lens.foreign import harmless
from nla_lens.results.plots import import_pyplot
from nla_lens.results.templating import template

_LEFT_OUT: Final = 0.2


def lines(calibration: Mapping[str, Any]) -> list[str]:
    """What it is and how good, line by line.

    Args:
        calibration: As `Calibration.to_dict` gives it; so in the other functions here.
    """
    fitted, tested = calibration["fitted_on"], calibration["held_out"]
    said = [
        f"Calibration: {_count(fitted, 'rows')} explanations of {_count(fitted, 'documents')} "
        f"documents, {_percent(fitted.get('wrong'))} wrong (labels: {fitted.get('labels')})",
        "on documents it had not seen: "
        + ", ".join(f"{name} {_spelled(tested, name)}" for name in ("auroc", "ece", "brier")),
    ]
    if is_number(share := tested.get("brier_of_the_share_alone")):
        said[-1] += f" (the same trust for all: {share:.3f})"
    alone = [f"{n} {_number(s.get('auroc'))}" for n, s in _alone(calibration)]
    if alone:
        said.append(f"auroc of one feature alone: {', '.join(alone)}")
    curve = points(tested, "risk_coverage", ("kept", "wrong"))
    fewer = [p for p in curve if p["kept"] <= 1 - _LEFT_OUT + 1e-6]
    if fewer:
        said.append(
            f"without the least trusted {1 - fewer[0]['kept']:.0%}, {_percent(fewer[0]['wrong'])} "
            f"are wrong instead of {_percent(curve[0]['wrong'])}"
        )
    if (least := calibration["low_fidelity"]) is not None:
        said.append(f"low_fidelity: {least['score']} below {least['below']:.3f}")
    said.append(f"looks at: {', '.join(feature['name'] for feature in calibration['features'])}")
    return [harmless(line) for line in said]


def points(
    held_out: Mapping[str, Any], name: str, keys: Sequence[str]
) -> list[Mapping[str, float]]:
    """A curve of what was measured; without what is not of its form."""
    found = held_out.get(name)
    listed = found if isinstance(found, list) else []
    return [p for p in listed if isinstance(p, Mapping) and all(is_number(p.get(k)) for k in keys)]


def _alone(calibration: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = calibration["held_out"].get("alone")
    listed = found.items() if isinstance(found, Mapping) else ()
    return [(str(name), scores) for name, scores in listed if isinstance(scores, Mapping)]


def _count(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return f"{value:,}" if is_number(value) else "?"


def _percent(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else "?"


def _number(value: Any) -> str:
    return f"{value:.3f}" if is_number(value) else "–"


def _spelled(tested: Mapping[str, Any], name: str) -> str:
    """A measure with its interval."""
    found = tested.get("intervals")
    interval = found.get(name) if isinstance(found, Mapping) else None
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))):
        return _number(tested.get(name))
    return f"{_number(tested.get(name))} [{interval[0]:.3f}, {interval[1]:.3f}]"


def page(calibration: Mapping[str, Any], *, whole_page: bool) -> str:
    """Both curves and the numbers as HTML; every text is escaped by the template engine.

    Args:
        calibration: As in `lines`.
        whole_page: A page of its own, rather than a fragment for a notebook.
    """
    tested = calibration["held_out"]
    whole = {name: tested.get(name) for name in ("auroc", "ece", "brier")}
    return template("calibration.html.jinja").render(
        lines=lines(calibration),
        rows=[
            (name, [_number(scores.get(m)) for m in whole])
            for name, scores in [
                ("trust", whole),
                *((f"{n} alone", s) for n, s in _alone(calibration)),
            ]
        ],
        reliability=points(tested, "reliability", ("trust", "right", "rows")),
        risk=points(tested, "risk_coverage", ("kept", "wrong")),
        highest=max(
            [0.01, *(p["wrong"] for p in points(tested, "risk_coverage", ("kept", "wrong")))]
        ),
        whole_page=whole_page,
    )


def draw(calibration: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws `reliability.png` and `risk_coverage.png`.

    Raises:
        NLAError: matplotlib (extra `plots`) is not installed.
    """
    pyplot = import_pyplot()
    tested = calibration["held_out"]
    written = []
    figure, axes = pyplot.subplots(figsize=(4, 3.6), layout="constrained")
    found = points(tested, "reliability", ("trust", "right", "rows"))
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    axes.plot([p["trust"] for p in found], [p["right"] for p in found], "o-")
    for p in found:
        at, side = (p["trust"], p["right"]), "right" if p["trust"] > 0.9 else "left"
        shift = {"xytext": (0, -12), "textcoords": "offset points"}
        axes.annotate(f"{p['rows']:,.0f}", at, ha=side, fontsize=7, **shift)
    axes.set(xlabel="trust", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
    written.append(_saved(figure, folder / "reliability.png"))
    figure, axes = pyplot.subplots(figsize=(4, 3.6), layout="constrained")
    curve = points(tested, "risk_coverage", ("kept", "wrong"))
    axes.plot([p["kept"] for p in curve], [p["wrong"] for p in curve], ".-")
    axes.set(xlabel="share kept, the most trusted first", ylabel="share of these that is wrong")
    axes.set(xlim=(0, 1.02), ylim=(0, None))
    written.append(_saved(figure, folder / "risk_coverage.png"))
    return written


def _saved(figure: Any, path: Path) -> Path:
    held = io.BytesIO()
    # Without the version that drew it, which would make another file of the same picture.
    figure.savefig(held, format="png", dpi=110, metadata={"Software": None})
    import_pyplot().close(figure)
    return write_whole(path, held.getvalue())
