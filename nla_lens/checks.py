"""Small checks of what callers hand in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from nla_lens.errors import NLAError


def is_int(value: Any) -> bool:
    """Whether a value is an integer, numpy's included, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, numpy's included, and not a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_missing(value: Any) -> bool:
    """Whether a table's cell holds nothing: None, NaN, or what pandas has for either."""
    if value is None:
        return True
    try:
        return bool(value != value)
    # pandas.NA is neither equal nor unequal to itself; an array is so entry by entry.
    except (TypeError, ValueError):
        return type(value).__name__ == "NAType"


def plain(value: Any) -> Any:
    """What arrays, tensors and columns hold as Python's own numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_seed(seed: Any, *, may_be_none: bool = True) -> None:
    """Refuses what is no seed.

    Raises:
        NLAError: Names it.
    """
    if seed is None and may_be_none:
        return
    if not (is_int(seed) and 0 <= seed < 2**32):
        raise NLAError(f"seed={seed!r:.80} must be an integer from 0 to 2**32 - 1")


def to_path(path: Any) -> Path:
    """A path that a caller names: a text, or what has one for a path; `~` is who they are.

    Raises:
        NLAError: Something else; bytes, too.
    """
    # As os.fspath has it, whose own words are about bytes and PathLike.
    found = path if isinstance(path, str) else getattr(path, "__fspath__", lambda: None)()
    if not isinstance(found, str):
        raise NLAError(f"{path!r:.80} is no path; expected a text or a pathlib.Path")
    # Path.expanduser raises where there is no such user; this leaves the name as it is.
    return Path(os.path.expanduser(found))


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
