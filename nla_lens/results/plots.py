"""Pictures of many explanations at once; needs the extra `plots`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from nla_lens.errors import NLAError
from nla_lens.results.explanation import Explanation
from nla_lens.stream.explainer import check_nla

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEDIANS: Final = 40
_LEAST_PER_MEDIAN: Final = 5
_LABELS: Final = ["its own text", "another's text (control)"]


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


def plot(explanations: Sequence[Explanation], nla: Any = None, vectors: Any = None) -> Figure:
    """Four panels: fidelity by position, norm against fidelity, cos against its control, flags.

    Fidelity is `fve_nrm`, and `cos` where var_nrm is not known. The control is each vector with the
    text of another one, half of all further on: what generic texts reach by themselves. Without
    `nla` and `vectors` the third panel is the distribution of fidelity.

    Args:
        explanations: In any order.
        nla: An NLA with a reconstructor.
        vectors: What was explained, `[n, d]`, in the same order.

    Raises:
        NLAError: matplotlib is not installed, nothing was scored, or there are not as many vectors.
    """
    name = "fve_nrm" if any(e.fve_nrm is not None for e in explanations) else "cos"
    scored = [e for e in explanations if getattr(e, name) is not None]
    if not scored:
        raise NLAError("none of these explanations is scored; a reconstructor is needed for a plot")
    if (nla is None) != (vectors is None):
        raise NLAError("the control needs both nla= and vectors=")
    control = None if nla is None else _control(explanations, nla, vectors)
    values = [getattr(e, name) for e in scored]
    figure, ((a, b), (c, d)) = import_pyplot().subplots(2, 2, figsize=(9, 6), layout="constrained")
    _by_position(a, scored, values, name)
    b.scatter([e.norm for e in scored], values, s=8, alpha=0.5, linewidths=0)
    b.set(xlabel="norm of the vector, ‖v‖", ylabel=name)
    if max(e.norm for e in scored) > 20 * min(e.norm for e in scored):
        b.set(xscale="log")
    if control is None:
        c.hist(values, bins=40)
        c.set(xlabel=name, ylabel="explanations")
    else:
        own, others = control
        c.hist([own, others], bins=40, histtype="stepfilled", alpha=0.6, label=_LABELS)
        c.set(xlabel="cos of the vector and what a text gives back", ylabel="explanations")
        c.legend(loc="upper left")
    _flags(d, explanations)
    return figure


def _control(
    explanations: Sequence[Explanation], nla: Any, vectors: Any
) -> tuple[list[float], list[float]]:
    """cos of each vector with its own text, and with that of another one."""
    check_nla(nla)
    n = len(explanations)
    if len(vectors) != n or n < 2:
        raise NLAError(f"{len(vectors)} vectors for {n} explanations; two or more, as many of each")
    texts = [e.text for e in explanations]
    others = [*texts[n // 2 :], *texts[: n // 2]]
    cos = nla.score([*texts, *others], [*vectors, *vectors]).cos
    return [float(x) for x in cos[:n]], [float(x) for x in cos[n:]]


def _by_position(
    axes: Axes, scored: Sequence[Explanation], values: Sequence[float], name: str
) -> None:
    located = sorted(
        (e.position, v) for e, v in zip(scored, values, strict=True) if e.position is not None
    )
    axes.set(xlabel="position", ylabel=name)
    if not located:
        axes.text(0.5, 0.5, "positions are not known", ha="center", transform=axes.transAxes)
        return
    axes.scatter([p for p, _ in located], [v for _, v in located], s=8, alpha=0.4, linewidths=0)
    # Of stretches with as many explanations each, so that no point stands for a single one.
    step = max(_LEAST_PER_MEDIAN, len(located) // _MEDIANS)
    parts = [located[i : i + step] for i in range(0, len(located), step)]
    if len(parts) > 1:
        at, middle = zip(*(map(median, zip(*part, strict=True)) for part in parts), strict=True)
        axes.plot(at, middle, color="black", linewidth=1.2, label=f"median of {step}")
        axes.legend(loc="lower left")


def _flags(axes: Axes, explanations: Sequence[Explanation]) -> None:
    n = len(explanations)
    counts = Counter(flag for e in explanations for flag in e.flags)
    axes.set(xlabel=f"of {n} explanations", title="flags", xlim=(0, n))
    if not counts:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
        return
    names, numbers = zip(*reversed(counts.most_common()), strict=True)
    bars = axes.barh(names, numbers, height=0.6)
    axes.bar_label(bars, [f"{k} ({k / n:.0%})" for k in numbers], padding=3)
    axes.set(ylim=(-0.6, max(2, len(names)) - 0.4))
