"""How vectors are injected, and at which scale: of all that say so, who is believed."""

from __future__ import annotations

import math
import warnings
from typing import Any

from nla_lens.checkpoints.releases import RULES, KnownRelease, Rule
from nla_lens.checkpoints.section import SCALES
from nla_lens.checkpoints.sidecar import Sidecar
from nla_lens.checkpoints.statements import Sources
from nla_lens.checks import is_number
from nla_lens.errors import NLAError, NLAWarning


def settle_rule(
    injection: str | None,
    side: Sidecar,
    release: KnownRelease | None,
    values: dict[str, Any],
    origins: dict[str, str],
    name: str,
) -> Rule:
    """The rule: from the caller, the sidecar (a scale is used by `replace` alone), or the table."""
    if injection is not None and injection not in RULES:
        raise NLAError(f"injection={injection!r} is not a known rule; known are {list(RULES)}")
    stated = side.injection_rule
    if stated is None and side.kind == "nla_model" and side.injection_scale is not None:
        stated = "replace"
    if injection is not None:
        if stated is not None and injection != stated:
            warnings.warn(
                f"injection={injection!r} was asked for, but {side.path} means {stated!r}: the "
                "verbalizer will read vectors in a way it was not trained with",
                NLAWarning,
                stacklevel=5,
            )
        rule, origin = injection, "caller"
    elif stated is not None:
        rule, origin = stated, "sidecar"
    elif release is not None:
        rule, origin = release.injection, "known release"
    else:
        raise NLAError(
            f"{name}: nothing says how vectors are injected (no injection_scale in {side.path}, "
            f'and not a known release); pass injection="replace" or injection="norm_matched_add"'
        )
    values["injection"], origins["injection"] = rule, origin
    return rule


def settle_scale(
    rule: Rule, asked: float | None, side: Sidecar, sources: Sources, settle: Any
) -> None:
    if rule == "norm_matched_add":
        if asked is not None:
            raise NLAError(f"injection_scale={asked!r}: norm_matched_add uses none; leave it out")
        settle("injection_scale")
        return
    least, most = SCALES
    if asked is not None and not (is_number(asked) and least <= asked <= most):
        raise NLAError(f"injection_scale={asked!r} must be a positive norm")
    settle(
        "injection_scale",
        ("caller", asked),
        ("sidecar", side.injection_scale),
        sources.known("injection_scale"),
        need=f"the rule `replace` needs it and {side.path} has none; pass injection_scale=",
    )


def settle_mse_scale(
    d_model: int,
    side: Sidecar,
    ar_side: Sidecar | None,
    values: dict[str, Any],
    origins: dict[str, str],
) -> None:
    """The AR's word before the AV's; an absent key means sqrt(d), an explicit null means raw."""
    for sidecar in filter(None, (ar_side, side)):
        if sidecar.mse_scale_given and (sidecar is ar_side or sidecar.mse_scale is not None):
            values["mse_scale"], origins["mse_scale"] = sidecar.mse_scale, "sidecar"
            return
    values["mse_scale"], origins["mse_scale"] = math.sqrt(d_model), "default"
