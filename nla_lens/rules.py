"""The names of the injection rules; their arithmetic is in `injection`, which needs torch."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

Rule: TypeAlias = Literal["replace", "norm_matched_add"]
RULES: Final[tuple[Rule, ...]] = ("replace", "norm_matched_add")
