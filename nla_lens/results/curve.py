"""What one feature adds to a calibration's log-odds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from nla_lens.checks import is_number
from nla_lens.errors import NLAError
from nla_lens.results.evidence import FEATURES

_MOST_POINTS: Final = 1000
LARGEST: Final = 1e12


@dataclass(frozen=True)
class Curve:
    """What one feature adds to the log odds: straight between points, level beyond the ends.

    Attributes:
        name: A key of `evidence.FEATURES`.
        at: The feature at each point, rising.
        adds: What it adds there.
        unknown: What is added where the feature is not known.
    """

    name: str
    at: tuple[float, ...]
    adds: tuple[float, ...]
    unknown: float

    def __call__(self, values_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`[n]` log odds; NaN is not known."""
        added_N = np.interp(values_N, self.at, self.adds)
        return np.where(np.isnan(values_N), self.unknown, added_N)


def read_curve(entry: Any) -> Curve:
    if not isinstance(entry, Mapping):
        raise NLAError(f"a feature is {entry!r:.80}; expected an object")
    name = entry.get("name")
    if not isinstance(name, str) or name not in FEATURES:
        raise NLAError(
            f"feature {name!r:.80} is not known here, only {', '.join(FEATURES)}; a later version "
            "of nla_lens may know it"
        )
    at, adds = (_points(entry.get(key), name) for key in ("at", "adds"))
    if len(at) != len(adds) or any(b <= a for a, b in pairwise(at)):
        raise NLAError(f"feature {name}: `at` must rise, and be as long as `adds`")
    return Curve(name, at, adds, finite(entry.get("unknown"), name))


def _points(listed: Any, name: str) -> tuple[float, ...]:
    if not isinstance(listed, list) or not 1 < len(listed) <= _MOST_POINTS:
        raise NLAError(f"feature {name} needs lists `at` and `adds` of 2 to {_MOST_POINTS} numbers")
    return tuple(finite(value, name) for value in listed)


def finite(value: Any, name: str) -> float:
    if not is_number(value) or not abs(value) <= LARGEST:
        raise NLAError(f"{name} holds {value!r:.80}; expected a finite number")
    return float(value)
