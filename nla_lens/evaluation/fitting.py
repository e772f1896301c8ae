"""Fitting a calibration: curves by logistic regression, tested on documents it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from nla_lens.errors import NLAError
from nla_lens.results.calibration import Calibration
from nla_lens.results.curve import Curve
from nla_lens.results.evidence import SCORES

_QUANTILES: Final = (0, 0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99, 1)
"""Points of a curve: closer at the ends, where the wrong ones are."""
_FOLDS: Final = 5
_DIGITS: Final = 6
LEAST_OF_EACH: Final = 10
"""With fewer right or wrong ones nothing is learned about them."""

Columns = Mapping[str, np.ndarray[Any, Any]]
"""Features `[n]` by name; NaN is not known."""


def import_sklearn() -> Any:
    """scikit-learn, with what is used of it.

    Raises:
        NLAError: It is not installed.
    """
    try:
        import sklearn.isotonic
        import sklearn.linear_model
        import sklearn.metrics
        import sklearn.model_selection
    except ImportError as error:
        raise NLAError(
            "calibrate needs scikit-learn: pip install 'nla-lens[trust]'; a calibration that is "
            "there already is used without it"
        ) from error
    return sklearn


def fit(columns: Columns, right_N: Any) -> Calibration:
    """A calibration of features; those that are the same everywhere are left out.

    Args:
        columns: The features.
        right_N: Whether each explanation is right.
    """
    at = {name: _points(values_N) for name, values_N in columns.items()}
    used = [name for name, points in at.items() if len(points) > 1]
    made = [_piece(columns[name], at[name]) for name in used]
    pieces = [piece_NP for piece_NP, _ in made]
    model = import_sklearn().linear_model.LogisticRegression(C=1.0, max_iter=10_000)
    model.fit(np.concatenate(pieces, 1) if pieces else np.zeros((len(right_N), 1)), right_N)
    curves, place = [], 0
    for name, (piece_NP, mean_P) in zip(used, made, strict=True):
        weights_P = model.coef_[0][place : place + piece_NP.shape[1]]
        place += piece_NP.shape[1]
        steps = weights_P[:-1]
        adds = np.concatenate([[0.0], np.cumsum(steps)]) - mean_P @ steps
        curves.append(Curve(name, _plain(at[name]), _plain(adds), _plain([weights_P[-1]])[0]))
    return Calibration(tuple(curves), _plain(model.intercept_)[0])


def _points(values_N: Any) -> Any:
    known = values_N[~np.isnan(values_N)]
    values = np.unique(known)
    if len(values) > len(_QUANTILES):
        values = np.quantile(known, _QUANTILES)
    return np.unique(_plain(values))


def _ramps(values_N: Any, at_P: Any) -> np.ndarray[Any, Any]:
    """`[n, p - 1]`: how far each known value is on its way from each point to the next, 0 to 1."""
    known_N1 = values_N[~np.isnan(values_N)][:, None]
    return np.clip((known_N1 - at_P[:-1]) / np.diff(at_P), 0, 1)


def _piece(values_N: Any, at_P: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """`[n, p]`: ramps from their mean, and whether a value is not known; beside it the means.

    The weight of a ramp is a curve's step. Steps are what is kept small: where few values lie, a
    curve stays as it is nearby, as it would not if its height were; nothing is added by what is not
    known, unless that tells something.
    """
    unknown_N = np.isnan(values_N)
    piece_NP = np.zeros((len(values_N), len(at_P)))
    ramps_NP = _ramps(values_N, at_P)
    mean_P = ramps_NP.mean(0)
    piece_NP[~unknown_N, :-1] = ramps_NP - mean_P
    piece_NP[:, -1] = unknown_N
    return piece_NP, mean_P


def _plain(values: Any) -> tuple[float, ...]:
    """As they are written down: what was measured is then what is loaded."""
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)


def folds(
    right_N: Any, documents_N: Any, seed: int
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Rows to fit on and rows to test on; no document is in both, every row is tested once.

    Raises:
        NLAError: Too few documents to hold any out.
    """
    n = min(_FOLDS, len(np.unique(documents_N)))
    if n < 2:
        raise NLAError(
            "all explanations are of one document: none can be held out; give more documents, or "
            "a column `document` that tells them apart"
        )
    split = import_sklearn().model_selection.StratifiedGroupKFold(
        n, shuffle=True, random_state=seed
    )
    yield from split.split(np.zeros(len(right_N)), right_N, documents_N)


def held_out(columns: Columns, right_N: Any, documents_N: Any, seed: int) -> Any:
    """`[n]` probabilities, each by a calibration that has not seen its document."""
    trust_N = np.empty(len(right_N))
    for fitted, tested in folds(right_N, documents_N, seed):
        if len(np.unique(right_N[fitted])) < 2:
            raise NLAError(
                "all that is right, or all that is wrong, is in one document: none can be held out"
            )
        calibration = fit({name: c[fitted] for name, c in columns.items()}, right_N[fitted])
        rest = {name: c[tested] for name, c in columns.items()}
        trust_N[tested] = calibration.predict(rest)
    return trust_N


def least_score(columns: Columns, right_N: Any) -> tuple[str, float] | None:
    """Below which score an explanation is likelier wrong than right; None: below none."""
    name = next((n for n in SCORES[:2] if n in columns), None)
    if name is None:
        return None
    known = ~np.isnan(columns[name])
    isotonic = import_sklearn().isotonic.IsotonicRegression(out_of_bounds="clip")
    score_N, said_N = columns[name][known], right_N[known]
    share_N = isotonic.fit_transform(score_N, said_N)
    if (share_N < 0.5).sum() < LEAST_OF_EACH:
        return None
    # Half way to the first that is likelier right; beyond the last where none is.
    wrong = float(score_N[share_N < 0.5].max())
    trusted = score_N[share_N >= 0.5]
    return name, _plain([(wrong + float(trusted.min())) / 2 if len(trusted) else wrong])[0]
