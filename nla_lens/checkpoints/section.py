"""One mapping of a sidecar, read key by key with its types checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nla_lens.errors import NLAError

SCALES: Final = (1e-15, 1e15)
"""Squares of norms outside leave float32's range."""
# Stems of words in the names of keys that say something is done to a vector before or after the
# model; a key with one of them that is not known here would be left out of the arithmetic.
_MATHS: Final = re.compile(
    r"norm(al|$)|whiten|zca|pca|centr|center|standardi|z_?score|rotat|projection|transform(?!er)"
    r"|preproc|postproc|scale|scaling|subtract|inject|steer|coeff"
    r"|(^|_)(mean|std|bias|offset|clip|unit|pooling)($|_)",
    re.IGNORECASE,
)
# Of the training, or of the value head's file.
_ELSEWHERE: Final = re.compile(
    r"loss|grad|reward|advantage|lora|entropy|optim|train|data|(^|_)(kl|lr|ppo|grpo|head)($|_)",
    re.IGNORECASE,
)
_LEADING_ZERO: Final = re.compile(r"\s*[-+]?0[\d_]")
_NOTHING: Final = (None, False, 0, "", "none", "None", "null", "identity", "raw", "off", "false")


def shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:
        # Python refuses to write out integers of thousands of digits.
        return f"a {type(value).__name__} too large to show"


def _is_nothing(key: str, value: Any) -> bool:
    """Whether a value says that nothing is done."""
    if isinstance(value, (list, Mapping)):
        return not value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1:
        return "scal" in key.lower() or "coeff" in key.lower()
    return value in _NOTHING


class Section:
    """One mapping of the file.

    Attributes:
        raw: As it was read.
        path: The file, for messages.
        prefix: Its keys' place in the file, as "extraction.".
    """

    def __init__(self, raw: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.raw, self.path, self.prefix = raw, path, prefix

    def wrong(self, key: str, value: object, expected: str) -> NLAError:
        """What is wrong with a value."""
        return NLAError(f"{self.path}: {self.prefix}{key} is {shown(value)}; expected {expected}")

    def check_maths(self, known: frozenset[str]) -> None:
        """Refuses keys that would change what is computed, and that nothing here computes.

        Raises:
            NLAError: Names the first.
        """
        for key, value in self.raw.items():
            if not isinstance(key, str) or key in known or not _MATHS.search(key):
                continue
            if not _ELSEWHERE.search(key) and not _is_nothing(key, value):
                raise NLAError(
                    f"{self.path}: {self.prefix}{key} is {shown(value)}: it would change what is "
                    "computed, and this nla_lens does not know how; a newer one may"
                )

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping of names to plain values; empty where there is none."""
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise self.wrong(key, value, "a mapping of names")
        return dict(value)

    def section(self, *spellings: str) -> Section:
        """A mapping under the first of these keys that is there; an empty one without."""
        key = next((k for k in spellings if self.raw.get(k) is not None), spellings[0])
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, value, "a mapping")
        return Section(value or {}, self.path, f"{self.prefix}{key}.")

    def text(self, *spellings: str) -> str | None:
        """Text under one of these keys."""
        known = {key: self.raw[key] for key in spellings if self.raw.get(key) is not None}
        for key, value in known.items():
            if not isinstance(value, str):
                raise self.wrong(key, value, "text")
        if len(set(known.values())) > 1:
            names = " and ".join(f"{self.prefix}{key}" for key in known)
            raise NLAError(f"{self.path}: {names} are two spellings of one key, and differ")
        return next(iter(known.values()), None)

    def integer(self, key: str, *, least: int) -> int | None:
        """An integer that fits 32 bits."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self.wrong(key, value, f"an integer of at least {least}")
        return value

    def integers(self, key: str) -> tuple[int, ...] | None:
        """A list of token ids."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            raise self.wrong(key, value, "a list of token ids")
        return tuple(value)

    def scale(self, key: str, d_model: int | None) -> float | None:
        """A positive number, a numeric string, "sqrt_d_model", or nothing ("raw", "none")."""
        value = self.raw.get(key)
        if value is None or value in ("raw", "none"):
            return None
        if value == "sqrt_d_model":
            if d_model is None:
                raise self.wrong(key, value, "a number, since the sidecar has no d_model")
            return math.sqrt(d_model)
        try:
            number = float(value) if isinstance(value, (int, float, str)) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        least, most = SCALES
        # 020 is 16 to some readers of YAML, and 20 to others.
        unclear = isinstance(value, str) and _LEADING_ZERO.match(value)
        if isinstance(value, bool) or unclear or not least <= number <= most:
            raise self.wrong(key, value, 'a positive number, "sqrt_d_model" or null')
        return number
