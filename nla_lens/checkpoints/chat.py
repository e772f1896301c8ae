"""A verbalizer's prompt: the sidecar's template in the tokenizer's chat format, and its marker."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.checks import naming
from nla_lens.errors import NLAError
from nla_lens.models.tokens import render_chat
from nla_lens.stream.injection import fill, find_marker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with its one injection site."""

    ids: tuple[int, ...]
    marker: int


LAYER: Final = "{layer}"
"""Stands in a template where K goes: one verbalizer for several layers."""
# A name in braces is a place to fill in; anything else in braces is text.
_PLACEHOLDER: Final = re.compile(r"\{([a-z_]+)\}")


def user_turn(spec: NLASpec) -> str:
    """The sidecar's template with the marker and, where it asks for it, the layer put in.

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


def canonical_prompt(spec: NLASpec, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The sidecar's prompt, checked against the live tokenizer.

    Raises:
        NLAError: The marker is not one token or not the sidecar's, or its neighbours differ.
    """
    marker_ids = tokenizer.encode(spec.injection_char, add_special_tokens=False)
    if marker_ids != [spec.injection_token_id]:
        raise NLAError(
            f"tokens.injection_token_id: the marker {spec.injection_char!r} is {marker_ids} for "
            f"this tokenizer, the sidecar says [{spec.injection_token_id}]: it must be that one "
            "token; the tokenizer is not the verbalizer's own"
        )
    with naming("prompt_templates.av"):
        content = user_turn(spec)
    ids = render_chat(tokenizer, content, options=spec.chat_template_kwargs)
    sides = (spec.injection_left_neighbor_id, spec.injection_right_neighbor_id)
    return Prompt(tuple(ids), find_marker(ids, spec.injection_token_id, *sides))
