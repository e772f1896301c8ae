"""What came of a comparison: two sides' texts, crosswise scores, and what tells them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, TypeAlias

from torch import Tensor

from nla_lens.evaluation.shown import Shown
from nla_lens.results.columns import Column
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations

_SHOWN: Final = 20
Explained: TypeAlias = "Explanation | Explanations"


@dataclass(frozen=True)
class Separating:
    """A text, or one of its sentences, held against both vectors.

    Attributes:
        side: Whose text it is: "a" or "b".
        text: The sentence.
        a: How much a's score falls without it.
        b: How much b's does.
        pair: Which pair of vectors, from 0.
    """

    side: str
    text: str
    a: float
    b: float
    pair: int = 0

    @property
    def apart(self) -> float:
        """`a - b`: above 0 it speaks for a, below 0 for b."""
        return self.a - self.b

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "apart": self.apart}


@dataclass(frozen=True)
class Word:
    """A word that one side's texts have more often.

    Attributes:
        text: The word, in lower case.
        a: Share of a's texts that have it.
        b: Share of b's.
    """

    text: str
    a: float
    b: float

    @property
    def apart(self) -> float:
        """`a - b`."""
        return self.a - self.b


@dataclass(frozen=True)
class _Line:
    """A line of what is shown."""

    what: str
    text: str
    a: float | None
    b: float | None

    columns: ClassVar[Sequence[Column]] = (
        Column("", "plain", lambda s: s.what),
        Column("text", "text", lambda s: s.text, always=True),
        Column("for a", "number", lambda s: s.a),
        Column("for b", "number", lambda s: s.b),
        Column("apart", "number", lambda s: None if s.a is None or s.b is None else s.a - s.b),
    )
    position: ClassVar[None] = None
    label: ClassVar[None] = None


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Two vectors, or n pairs of them, in words.

    Attributes:
        a: What is said of a: an `Explanation`, or `Explanations` of n pairs.
        b: What is said of b.
        difference: What is said of `b - a`: what leads from a to b.
        cross: `[2, 2]`: the score of a's texts (row 0) and b's (row 1) against a's vectors (column
            0) and b's, mean over pairs.
        sentences: Sentences of both, those that tell a and b apart most first.
        words: Words that one side's texts have more often than the other's, likewise.
        cos: Mean cosine of the two vectors of a pair.
        unit: What is scored in: "fve_nrm", or "cos" where var_nrm is not known.
    """

    a: Explained
    b: Explained
    difference: Explained
    cross: Tensor
    sentences: tuple[Separating, ...]
    words: tuple[Word, ...]
    cos: float
    unit: str = "fve_nrm"

    def __iter__(self) -> Iterator[Separating]:
        return iter(self.sentences)

    def rows_shown(self) -> Sequence[Any]:
        """See `Shown`."""
        (aa, ab), (ba, bb) = self.cross.tolist()
        if isinstance(self.a, Explanation):
            lines = [_Line("a", str(self.a), aa, ab), _Line("b", str(self.b), ba, bb)]
            lines.append(_Line("b - a", str(self.difference), None, None))
        else:
            n = len(self.a)
            lines = [
                _Line("a", f"({n} texts)", aa, ab),
                _Line("b", f"({n} texts)", ba, bb),
                *(_Line("word", w.text, w.a, w.b) for w in self.words[:_SHOWN]),
            ]
        told = [_Line(f"sentence of {s.side}", s.text, s.a, s.b) for s in self.sentences]
        return [*lines, *told[:_SHOWN]]

    def title(self) -> str:
        """See `Shown`."""
        return f"a and b, cos {self.cos:.3f}; {self.unit} of texts, and its fall without a sentence"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        texts = {name: getattr(self, name).to_dict() for name in ("a", "b", "difference")}
        return {
            **texts,
            "cross": self.cross.tolist(),
            "sentences": [s.to_dict() for s in self.sentences],
            "words": [asdict(w) for w in self.words],
            "cos": self.cos,
            "unit": self.unit,
        }
