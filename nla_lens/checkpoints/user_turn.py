"""What a verbalizer is told: the sidecar's template with the marker in it."""

from __future__ import annotations

import re
from typing import Final

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.errors import NLAError
from nla_lens.stream.template import fill

LAYER: Final = "{layer}"
"""Stands in a template where K goes: one verbalizer for several layers."""
# A name in braces is a place to fill in; anything else in braces is text.
_PLACEHOLDER: Final = re.compile(r"\{([a-z_]+)\}")


def user_turn(spec: NLASpec) -> str:
    """The sidecar's template with the marker and, where it asks for it, the layer put in.

    `{layer}` becomes K, the index from 0 of the block whose output is read: by the caller's
    `layer=`, or the sidecar. Of a template that numbers layers otherwise nothing here would know.

    Raises:
        NLAError: Not one place for the marker, or a place nobody knows what to put in.
    """
    template = spec.av_template
    unknown = set(_PLACEHOLDER.findall(template)) - {"injection_char", "layer"}
    if unknown:
        raise NLAError(
            f"the template has a place for {sorted(unknown)}, and nothing says what goes there "
            "(known are {injection_char} and {layer}, which becomes K)"
        )
    if LAYER in template:
        if spec.layer is None:
            raise NLAError(
                f"the template has a place for {LAYER}, and no layer is known; pass layer="
            )
        template = fill(template, LAYER, str(spec.layer))
    return fill(template, "{injection_char}", spec.injection_char)
