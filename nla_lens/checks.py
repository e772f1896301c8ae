"""Small checks of what callers hand in."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def is_int(value: Any) -> bool:
    """Whether a value is an integer, numpy's included, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, numpy's included, and not a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)
