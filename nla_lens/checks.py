"""Small checks of what callers hand in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

from nla_lens.errors import NLAError


def is_int(value: Any) -> bool:
    """Whether a value is an integer, numpy's included, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, numpy's included, and not a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_unicode(text: str) -> bool:
    """Whether a text can be tokenized: half of a surrogate pair, as from broken bytes, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Puts the file or key at fault in front of what an NLAError says."""
    try:
        yield
    except NLAError as error:
        raise NLAError(f"{where}: {error}") from error
