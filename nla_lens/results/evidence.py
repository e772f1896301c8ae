"""What speaks for or against one explanation, as numbers: the features of a calibration.

All of it is known when an explanation is finished: no model runs again. What is not known is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from nla_lens.checks import is_number
from nla_lens.results.sentences import folded, names_and_numbers, quotes, sentences

Record = Mapping[str, Any]
"""An explanation's fields, or a row of a table with columns of these names."""


def evidence(record: Record, names: Iterable[str]) -> dict[str, float | None]:
    """Features of an explanation, by name.

    Args:
        record: Its fields; what is missing is not known.
        names: Keys of `FEATURES`.
    """
    return {name: FEATURES[name](record) for name in names}


def _number(name: str) -> Callable[[Record], float | None]:
    def read(record: Record) -> float | None:
        value: Any = record.get(name)
        return float(value) if is_number(value) and math.isfinite(value) else None

    return read


def _complete(record: Record) -> float | None:
    value: Any = record.get("complete")
    is_said = isinstance(value, (bool, np.bool_)) or (is_number(value) and value in (0, 1))
    return float(value) if is_said else None


def _tokens(record: Record) -> float | None:
    return float(len(_listed(record, "token_ids"))) or None


def _token_quoted(record: Record) -> float | None:
    """Whether the token that the vector stands at is in a quotation."""
    token = record.get("token")
    wanted = folded(token) if isinstance(token, str) else ""
    if not wanted:
        return None
    return float(any(wanted in folded(quoted) for quoted in quotes(record["text"])))


def _agreement(record: Record) -> float | None:
    """How far the other samples say each of its sentences, too."""
    found = _listed(record, "samples")
    texts = [said if isinstance(said, str) else _field(said, "text") for said in found]
    if record["text"] in texts:
        texts.remove(record["text"])
    parts = sentences(record["text"])
    if not texts or not parts:
        return None
    return sum(said_again(part, texts) for part in parts) / len(parts)


def said_again(sentence: str, texts: Sequence[str]) -> float:
    """How far other texts say a sentence, too: the words it shares with the nearest of each."""
    wanted = set(folded(sentence).split())
    overlaps = []
    for text in texts:
        said = [set(folded(other).split()) for other in sentences(text)]
        overlaps.append(max((len(wanted & s) / len(wanted | s) for s in said), default=0.0))
    return sum(overlaps) / len(overlaps)


def _support(pick: Callable[[list[float]], float]) -> Callable[[Record], float | None]:
    def read(record: Record) -> float | None:
        found = [
            _field(claim, "support")
            for claim in _listed(record, "claims")
            if _field(claim, "kind") == "sentence"
        ]
        known = [value for value in found if value is not None]
        return pick(known) if known and len(known) == len(found) else None

    return read


def _listed(record: Record, name: str) -> Sequence[Any]:
    found: Any = record.get(name)
    # A data frame has a float where a row has nothing, a file without types a text.
    return found if hasattr(found, "__len__") and not isinstance(found, (str, bytes)) else ()


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


SCORES: Final = ("fve_nrm", "cos", "mse_nrm", "score")
"""Without the one that a calibration was fitted with there is no trust. `score`: of tables."""
FEATURES: Final[Mapping[str, Callable[[Record], float | None]]] = {
    **{name: _number(name) for name in (*SCORES, "norm", "position")},
    "length": lambda record: float(len(record["text"].split())),
    "tokens": _tokens,
    "complete": _complete,
    "quotations": lambda record: float(len(quotes(record["text"]))),
    "names": lambda record: float(len(names_and_numbers(record["text"]))),
    "token_quoted": _token_quoted,
    "agreement": _agreement,
    "support_least": _support(min),
    "support_last": _support(lambda falls: falls[-1]),
}
"""Every feature there is: the scores, the place, the text's length and what it names, and, where
they are known, agreement of samples and support of sentences."""
