"""Intervals over documents: rows of one document are not independent of one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and where it would lie with other documents of the same kind.

    Attributes:
        value: Over all rows.
        low: 2.5 % of the resamples are lower.
        high: 97.5 % are.
        n: Rows.
    """

    value: float
    low: float
    high: float
    n: int

    def map(self, scale: float, shift: float) -> Interval:
        """`scale * x + shift` of all three."""
        ends = sorted((scale * self.low + shift, scale * self.high + shift))
        return Interval(scale * self.value + shift, ends[0], ends[1], self.n)


def mean(values: Any, documents: Any, *, seed: int = 0) -> Interval:
    """The mean of values, with the interval of a bootstrap over documents.

    Args:
        values: `[n]`; NaN is left out.
        documents: `[n]`, which document each belongs to.
        seed: Makes it repeatable.
    """
    kept = np.asarray(values, dtype=np.float64)
    return ratio(kept, np.ones_like(kept), documents, seed=seed)


def ratio(numerators: Any, denominators: Any, documents: Any, *, seed: int = 0) -> Interval:
    """`sum(numerators) / sum(denominators)`, both over the same resampled documents.

    Args:
        numerators: `[n]`; rows with NaN are left out.
        denominators: `[n]`.
        documents: `[n]`.
        seed: Makes it repeatable.
    """
    top, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    there = np.isfinite(top) & np.isfinite(below)
    top, below = top[there], below[there]
    if not len(top):
        return Interval(np.nan, np.nan, np.nan, 0)
    _, which = np.unique(np.asarray(documents)[there], return_inverse=True)
    n_documents = int(which.max()) + 1
    # Sums of each document once; a resample then only says how often each counts.
    tops = np.bincount(which, top, n_documents)
    belows = np.bincount(which, below, n_documents)
    counts = np.random.default_rng(seed).multinomial(
        n_documents, np.full(n_documents, 1 / n_documents), _RESAMPLES
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (counts @ tops) / (counts @ belows)
    drawn = drawn[np.isfinite(drawn)]
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (np.nan, np.nan)
    return Interval(float(top.sum() / below.sum()), float(low), float(high), len(top))
