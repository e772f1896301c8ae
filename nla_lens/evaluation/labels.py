"""Which explanations are right: what a calibration learns from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from nla_lens.checks import is_missing, is_number
from nla_lens.errors import NLAError
from nla_lens.results.sentences import quotes, stands_in

QUOTES: Final = "quotes"
"""Labels by the quotation check."""
_SPELLED: Final = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
Row = Mapping[str, Any]


def labels_of(rows: Sequence[Row], labels: Any) -> list[bool | None]:
    """Whether each explanation is right; None where that is not known.

    Args:
        rows: The explanations.
        labels: As `calibrate` takes them.

    Raises:
        NLAError: No such column, another number of values, or values that are neither.
    """
    if isinstance(labels, str) and any(labels in row for row in rows):
        values: Any = [row.get(labels) for row in rows]
    elif labels == QUOTES if isinstance(labels, str) else False:
        values = list(_quotations_stand(rows))
    elif isinstance(labels, str):
        there = ", ".join(map(str, rows[0])) if rows else "none"
        raise NLAError(f"labels={labels!r}: there is no such column; there are {there}")
    elif callable(labels):
        values = [labels(row) for row in rows]
    else:
        values = labels.tolist() if hasattr(labels, "tolist") else labels
        if isinstance(values, Mapping) or not isinstance(values, Iterable):
            raise NLAError(
                f"labels={labels!r:.80} is none; expected the name of a column, one value a row, "
                'a function of a row, or "quotes"'
            )
        values = list(values)
    if len(values) != len(rows):
        raise NLAError(f"labels= has {len(values)} values for {len(rows)} explanations")
    return [_truth(i, value) for i, value in enumerate(values)]


def _truth(i: int, value: Any) -> bool | None:
    if is_missing(value):
        return None
    if isinstance(value, str):
        # As files without types have it.
        value = _SPELLED.get(value.strip().lower(), value)
    if isinstance(value, (bool, np.bool_)) or (is_number(value) and value in (0, 1)):
        return bool(value)
    raise NLAError(
        f"the label of row {i} is {value!r:.80}; expected true or 1 where the explanation is "
        "right, false or 0 where it is wrong, None where that is not known"
    )


def _quotations_stand(rows: Sequence[Row]) -> Iterator[bool | None]:
    if not any(isinstance(row.get("context"), str) for row in rows):
        raise NLAError(
            'labels="quotes" looks quotations up in the text that was read, which is not known: '
            "give a column or argument `context`, or labels of your own"
        )
    for row in rows:
        quoted, read = quotes(row["text"]), row.get("context")
        known = quoted and isinstance(read, str)
        yield all(stands_in(q, str(read)) for q in quoted) if known else None


def told(labels: Any) -> str:
    """How it was known what is right, in a few words."""
    if isinstance(labels, str):
        return "quotations stand in the text" if labels == QUOTES else f"column {labels}"
    said = (getattr(labels, "__doc__", None) or "") if callable(labels) else ""
    return said.strip().split("\n")[0].rstrip(".") or "given by the caller"
