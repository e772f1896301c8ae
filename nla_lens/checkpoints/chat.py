"""A verbalizer's prompt: the sidecar's template in the tokenizer's chat format, and its marker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.checkpoints.user_turn import user_turn
from nla_lens.checks import naming
from nla_lens.errors import NLAError
from nla_lens.models.tokens import check_steady, render_chat, token_text, tokenize
from nla_lens.stream.injection import find_marker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with its one injection site."""

    ids: tuple[int, ...]
    marker: int


def canonical_prompt(spec: NLASpec, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The sidecar's prompt, checked against the live tokenizer.

    Raises:
        NLAError: The marker is not one token or not the sidecar's, or its neighbours differ; or
            the chat template writes another prompt each time.
    """
    marker_ids = tokenize(tokenizer, spec.injection_char, add_special_tokens=False)
    # SentencePiece puts a blank before a text, which is not before the marker in the prompt.
    if len(marker_ids) == 2 and not spec.injection_char[:1].isspace():
        marker_ids = marker_ids[1 if not token_text(tokenizer)(marker_ids[0]).strip() else 0 :]
    if marker_ids != [spec.injection_token_id]:
        raise NLAError(
            f"tokens.injection_token_id: the marker {spec.injection_char!r} is {marker_ids} for "
            f"this tokenizer, the sidecar says [{spec.injection_token_id}]: it must be that one "
            "token; the tokenizer is not the verbalizer's own"
        )
    with naming("prompt_templates.av"):
        content = user_turn(spec)
    ids = render_chat(tokenizer, content, options=spec.chat_template_kwargs)
    check_steady(tokenizer, content, ids, spec.chat_template_kwargs)
    sides = (spec.injection_left_neighbor_id, spec.injection_right_neighbor_id)
    return Prompt(tuple(ids), find_marker(ids, spec.injection_token_id, *sides))
