"""Pictures of many explanations at once; needs the extra `plots`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nla_lens.errors import NLAError
from nla_lens.results.explanation import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def import_pyplot() -> Any:
    """matplotlib's pyplot.

    Raises:
        NLAError: It is not installed.
    """
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise NLAError("plots need matplotlib: pip install 'nla-lens[plots]'") from error
    return matplotlib.pyplot


def plot(explanations: Sequence[Explanation]) -> Figure:
    """Four panels: fidelity by position, norm against fidelity, its distribution, flags.

    Fidelity is `fve_nrm`, and `cos` where var_nrm is not known.

    Args:
        explanations: In any order.

    Raises:
        NLAError: matplotlib is not installed, or nothing was scored.
    """
    name = "fve_nrm" if any(e.fve_nrm is not None for e in explanations) else "cos"
    scored = [e for e in explanations if getattr(e, name) is not None]
    if not scored:
        raise NLAError("none of these explanations is scored; a reconstructor is needed for a plot")
    values = [getattr(e, name) for e in scored]
    figure, ((a, b), (c, d)) = import_pyplot().subplots(2, 2, figsize=(9, 6), layout="constrained")
    _by_position(a, scored, values, name)
    b.scatter([e.norm for e in scored], values, s=8, alpha=0.5, linewidths=0)
    b.set(xscale="log", xlabel="norm of the vector", ylabel=name)
    c.hist(values, bins=40)
    c.set(xlabel=name, ylabel="explanations")
    _flags(d, explanations)
    return figure


def _by_position(
    axes: Axes, scored: Sequence[Explanation], values: Sequence[float], name: str
) -> None:
    located = [
        (e.position, v) for e, v in zip(scored, values, strict=True) if e.position is not None
    ]
    axes.set(xlabel="position", ylabel=name)
    if not located:
        axes.text(0.5, 0.5, "positions are not known", ha="center", transform=axes.transAxes)
        return
    axes.scatter([p for p, _ in located], [v for _, v in located], s=8, alpha=0.4, linewidths=0)
    by_position: dict[int, list[float]] = {}
    for position, value in located:
        by_position.setdefault(position, []).append(value)
    at = sorted(by_position)
    axes.plot(
        at, [sorted(v)[len(v) // 2] for v in map(by_position.__getitem__, at)], label="median"
    )
    axes.legend(loc="lower right")


def _flags(axes: Axes, explanations: Sequence[Explanation]) -> None:
    counts = Counter(flag for e in explanations for flag in e.flags)
    axes.set(
        xlabel=f"of {len(explanations)} explanations", title="flags", xlim=(0, len(explanations))
    )
    if counts:
        names, numbers = zip(*counts.most_common(), strict=True)
        axes.barh(names[::-1], numbers[::-1])
    else:
        axes.set_yticks([])
