"""The options of `explain`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nla_lens.checks import is_int, is_number
from nla_lens.errors import NLAError


@dataclass(frozen=True)
class Options:
    """What a caller of `explain` asked for; see `NLA.explain`."""

    max_new_tokens: int = 200
    temperature: float = 0.0
    num_samples: int = 1
    seed: int | None = None
    batch_size: int | None = None
    prompt: str | None = None
    score: bool | None = None
    progress: bool | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """From a caller's keyword arguments."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"unknown options {unknown}; known are {sorted(known)}")
        return cls(**options)

    def check(self, *, has_reconstructor: bool) -> None:
        """Refuses what cannot work.

        Raises:
            NLAError: Names the option and the remedy.
        """
        for name in ("max_new_tokens", "num_samples", "batch_size"):
            value = getattr(self, name)
            if not (is_int(value) and value >= 1) and (name != "batch_size" or value is not None):
                raise NLAError(f"{name}={value!r} must be a positive integer")
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise NLAError(f"temperature={self.temperature!r} must be 0 (argmax) or positive")
        if self.num_samples > 1 and self.temperature == 0:
            raise NLAError(
                f"num_samples={self.num_samples} at temperature 0 would give the same text each "
                "time; pass temperature=1.0"
            )
        if self.seed is not None and not (is_int(self.seed) and 0 <= self.seed < 2**63):
            raise NLAError(f"seed={self.seed!r} must be an integer from 0 to 2**63 - 1")
        if self.score and not has_reconstructor:
            raise NLAError("score=True needs a reconstructor; load one with ar=")
