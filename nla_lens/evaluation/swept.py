"""What came of a sweep: a row for each direction and strength, as tables and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nla_lens.errors import NLAError
from nla_lens.evaluation.shown import Shown
from nla_lens.results.columns import Column
from nla_lens.results.explanation import Explanation
from nla_lens.results.plots import import_pyplot

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

VECTOR, RANDOM, SHUFFLED, NONE = "vector", "random direction", "shuffled edit", "not steered"


@dataclass(frozen=True)
class Swept:
    """One direction at one strength.

    Attributes:
        direction: "vector", "random direction", "shuffled edit", or "not steered".
        strength: In units of the residual's norm.
        text: What the model goes on to write, argmax.
        kl: Of the next token: KL(not steered || steered), in nats.
        top: The likeliest next tokens and their probabilities.
        toward: Probability of the token asked for; None without one.
        explanation: What the steered residual says; None without an NLA.
    """

    direction: str
    strength: float
    text: str
    kl: float
    top: tuple[tuple[str, float], ...]
    toward: float | None = None
    explanation: Explanation | None = None

    columns: ClassVar[Sequence[Column]] = (
        Column("direction", "plain", lambda s: s.direction),
        Column("strength", "number", lambda s: s.strength),
        Column("KL", "number", lambda s: s.kl),
        Column("toward", "number", lambda s: s.toward),
        Column("next", "text", lambda s: "  ".join(f"{t!r} {p:.2f}" for t, p in s.top[:3])),
        Column("goes on", "text", lambda s: s.text or None),
        Column("residual", "text", lambda s: s.explanation and s.explanation.text),
        Column("fve_nrm", "score", lambda s: s.explanation and s.explanation.fve_nrm),
    )
    position: ClassVar[None] = None
    label: ClassVar[None] = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        said = None if self.explanation is None else self.explanation.to_dict()
        return {**asdict(self), "top": [list(pair) for pair in self.top], "explanation": said}


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """What came of a sweep, beginning with the model as it is.

    Attributes:
        rows: In order of direction and strength.
        prompt: What the model read.
        place: Where it was steered.
        token: The token whose probability is `toward`; None without one.
    """

    rows: tuple[Swept, ...]
    prompt: str
    place: str
    token: str | None = None

    def __iter__(self) -> Iterator[Swept]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Swept:
        return self.rows[index]

    def rows_shown(self) -> Sequence[Swept]:
        """See `Shown`."""
        return self.rows

    def title(self) -> str:
        """See `Shown`."""
        toward = "" if self.token is None else f", toward {self.token!r}"
        return f"{self.prompt!r:.80} steered at {self.place}{toward}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        rows = [row.to_dict() for row in self.rows]
        return {"prompt": self.prompt, "place": self.place, "token": self.token, "rows": rows}

    def to_pandas(self) -> pd.DataFrame:
        """One row for each direction and strength; the explanation's text and scores are columns.

        Raises:
            NLAError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise NLAError("to_pandas needs pandas: pip install pandas") from error
        return pd.DataFrame([_flat(row) for row in self.rows])

    def plot(self) -> Figure:
        """KL by strength for each direction, and the probability of the token asked for.

        Raises:
            NLAError: matplotlib (extra `plots`) is not installed.
        """
        n = 1 if self.token is None else 2
        figure, axes = import_pyplot().subplots(
            1, n, figsize=(5 * n, 3.5), layout="constrained", squeeze=False
        )
        base = self.rows[0]
        for name in dict.fromkeys(row.direction for row in self.rows[1:]):
            rows = sorted((r for r in self.rows if r.direction == name), key=lambda r: r.strength)
            at = [row.strength for row in rows]
            axes[0, 0].plot(at, [row.kl for row in rows], "o-", label=name)
            if self.token is not None:
                axes[0, 1].plot(at, [row.toward for row in rows], "o-", label=name)
        axes[0, 0].set(xlabel="strength, in norms of the residual", ylabel="KL to not steered")
        if self.token is not None and base.toward is not None:
            axes[0, 1].axhline(base.toward, color="gray", linewidth=0.8, label=NONE)
            axes[0, 1].set(xlabel="strength", ylabel=f"probability of {self.token!r}", ylim=(0, 1))
        for ax in axes[0]:
            ax.legend(loc="best")
        return figure


def _flat(row: Swept) -> dict[str, Any]:
    said = row.explanation
    scores = {name: None if said is None else getattr(said, name) for name in ("cos", "fve_nrm")}
    held = {name: value for name, value in vars(row).items() if name != "explanation"}
    return {**held, "explanation": None if said is None else said.text, **scores}
