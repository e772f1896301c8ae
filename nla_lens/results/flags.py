"""Machine-readable warnings on an explanation: when not to trust it, and why."""

from __future__ import annotations

import unicodedata
from typing import Final

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.results.explanation import Explanation
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.origin import PADDING

PARTIAL: Final = "partial"
"""Still being written; what comes of it follows."""
TRUNCATED: Final = "truncated"
"""No closing tag within max_new_tokens: the text stops in the middle."""
EARLY_POSITION: Final = "early_position"
"""Read at a position earlier than the NLA was trained on."""
OUTLIER_NORM: Final = "outlier_norm"
"""||v|| is ten times larger or smaller than usual: BOS, early newlines, no residual vector."""
OTHER_LAYER: Final = "other_layer"
"""Read at another place than the NLA was trained on."""
INJECTION_SUSPECT: Final = "injection_suspect"
"""Mostly Chinese, Japanese or Korean, or about the marker: what a failed injection looks like."""
LOW_FIDELITY: Final = "low_fidelity"
"""The text reconstructs less than half of what it should; or, where there is a calibration, so
little that it is likelier wrong than right."""
PADDING_TOKEN: Final = "padding"
"""The vector stands at a padding token."""

_USUAL_NORM_FACTOR: Final = 10.0
_LEAST_FVE: Final = 0.5
_LEAST_COS: Final = 0.5
_CJK: Final = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")


def find_flags(
    explanation: Explanation, spec: NLASpec, least: tuple[str, float] | None = None
) -> tuple[str, ...]:
    """All flags that hold for an explanation.

    Args:
        explanation: The explanation.
        spec: Of the NLA that wrote it.
        least: A calibration's: the score, and below which value of it fidelity is low.
    """
    usual, position = spec.usual_norm, explanation.position
    ratio = None if usual is None else explanation.norm / usual
    holds = {
        TRUNCATED: not explanation.complete,
        EARLY_POSITION: position is not None and PADDING < position < spec.min_position,
        OUTLIER_NORM: ratio is not None
        and not 1 / _USUAL_NORM_FACTOR <= ratio <= _USUAL_NORM_FACTOR,
        OTHER_LAYER: _is_other_layer(explanation.hook_name, spec),
        INJECTION_SUSPECT: is_injection_suspect(explanation, spec),
        LOW_FIDELITY: _is_low_fidelity(explanation, least),
        PADDING_TOKEN: position == PADDING,
    }
    return tuple(flag for flag, held in holds.items() if held)


def _is_other_layer(hook_name: str | None, spec: NLASpec) -> bool:
    if hook_name is None or spec.place is None:
        return False
    return ResidPost.find(hook_name) != spec.place


def _is_low_fidelity(explanation: Explanation, least: tuple[str, float] | None) -> bool:
    # Negated, so that a NaN is low, too.
    if least is not None and (score := getattr(explanation, least[0])) is not None:
        return not score >= least[1]
    if explanation.fve_nrm is not None:
        return not explanation.fve_nrm >= _LEAST_FVE
    return explanation.cos is not None and not explanation.cos >= _LEAST_COS


def is_injection_suspect(explanation: Explanation, spec: NLASpec) -> bool:
    """Whether the text reads as if the model had seen the marker character instead of a vector.

    A text that is Chinese because its source is Chinese is not suspect where the token is known.
    """
    if spec.injection_char in explanation.text or "chinese character" in explanation.text.lower():
        return True
    return is_cjk(explanation.text) and not is_cjk(explanation.token or "")


def is_cjk(text: str) -> bool:
    """Whether more than half of the letters are Chinese, Japanese or Korean."""
    letters = [c for c in text if c.isalpha()]
    cjk = sum(unicodedata.name(c, "").startswith(_CJK) for c in letters)
    return 2 * cjk > len(letters)
