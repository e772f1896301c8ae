"""How good probabilities are: do they tell right from wrong, and mean what they say."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

_BINS: Final = 10
_STEPS: Final = 20
_RESAMPLES: Final = 300


def measure(trust_N: Any, right_N: Any, documents_N: Any, seed: int) -> dict[str, Any]:
    """All that is reported of probabilities `[n]` for `right` `[n]`.

    Args:
        trust_N: Probabilities of being right.
        right_N: Whether each is.
        documents_N: Which document each is of: intervals are bootstraps over documents.
        seed: Makes the intervals repeatable.
    """
    share = float(right_N.mean())
    return {
        **scores(trust_N, right_N),
        "brier_of_the_share_alone": share * (1 - share),
        "ece_of_bins_of_equal_size": _ece(trust_N, right_N, _by_size(trust_N)),
        "intervals": _intervals(trust_N, right_N, documents_N, seed),
        "rows": len(right_N),
        "documents": len(np.unique(documents_N)),
        "wrong": 1 - share,
        "reliability": bins(trust_N, right_N),
        "risk_coverage": risk_coverage(trust_N, right_N),
    }


def scores(trust_N: Any, right_N: Any) -> dict[str, float]:
    """AUROC, ECE over ten bins of equal width, Brier."""
    return {
        "auroc": _auroc(trust_N, right_N),
        "ece": _ece(trust_N, right_N, _by_width(trust_N)),
        "brier": float(np.square(trust_N - right_N).mean()),
    }


def _auroc(trust_N: Any, right_N: Any) -> float:
    """How often a right one has more trust than a wrong one; as often as not counts half.

    By ranks (Mann and Whitney): each interval takes hundreds, and what scikit-learn's own checks of
    its arguments took was most of a calibration.
    """
    # scikit-learn, which fits calibrations, brings it.
    from scipy.stats import rankdata

    rank_N = rankdata(trust_N)
    n_right = int(np.count_nonzero(right_N))
    above = rank_N[right_N.astype(bool)].sum() - n_right * (n_right + 1) / 2
    return float(above / (n_right * (len(right_N) - n_right)))


def _by_width(trust_N: Any) -> Any:
    return np.minimum((trust_N * _BINS).astype(int), _BINS - 1)


def _by_size(trust_N: Any) -> Any:
    ranks_N = np.argsort(np.argsort(trust_N, kind="stable"), kind="stable")
    return ranks_N * _BINS // len(trust_N)


def _ece(trust_N: Any, right_N: Any, bin_N: Any) -> float:
    """Mean distance of mean trust and share right in each bin, weighted by the bins' sizes."""
    said = np.bincount(bin_N, trust_N, _BINS)
    found = np.bincount(bin_N, right_N, _BINS)
    return float(np.abs(said - found).sum() / len(trust_N))


def bins(trust_N: Any, right_N: Any) -> list[dict[str, Any]]:
    """For each bin of equal width that has rows: mean trust, share right, rows."""
    bin_N = _by_width(trust_N)
    return [
        {
            "trust": float(trust_N[bin_N == b].mean()),
            "right": float(right_N[bin_N == b].mean()),
            "rows": int((bin_N == b).sum()),
        }
        for b in range(_BINS)
        if (bin_N == b).any()
    ]


def risk_coverage(trust_N: Any, right_N: Any) -> list[dict[str, float]]:
    """The share that is wrong among the most trusted, as fewer are kept."""
    order_N = np.argsort(-trust_N, kind="stable")
    wrong_N = 1.0 - right_N[order_N]
    kept = [max(1, round(len(wrong_N) * k / _STEPS)) for k in range(_STEPS, 0, -1)]
    return [{"kept": n / len(wrong_N), "wrong": float(wrong_N[:n].mean())} for n in kept]


def _intervals(trust_N: Any, right_N: Any, documents_N: Any, seed: int) -> dict[str, list[float]]:
    """2.5 and 97.5 % of a bootstrap over documents; one without both classes is drawn anew."""
    rng = np.random.default_rng(seed)
    _, which_N = np.unique(documents_N, return_inverse=True)
    rows = [np.flatnonzero(which_N == d) for d in range(int(which_N.max()) + 1)]
    drawn: list[dict[str, float]] = []
    while len(drawn) < _RESAMPLES:
        picked = np.concatenate([rows[d] for d in rng.integers(len(rows), size=len(rows))])
        if 0 < right_N[picked].sum() < len(picked):
            drawn.append(scores(trust_N[picked], right_N[picked]))
    return {
        name: [float(q) for q in np.quantile([d[name] for d in drawn], [0.025, 0.975])]
        for name in drawn[0]
    }
