"""Tokens of a model: chat messages to ids, an id to its text, the ids that end an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nla_lens.checks import is_int
from nla_lens.errors import NLAError, told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    content: str | Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of one user turn, or of a list of messages, in the model's chat format.

    Tokenized in one step: rendering to text first and tokenizing that again doubles the BOS.

    Raises:
        NLAError: The tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise NLAError(f"the tokenizer of {tokenizer.name_or_path} has no chat template")
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    try:
        ids: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=add_generation_prompt
        )
    # The template is a program that came with the checkpoint: it may raise anything.
    except Exception as error:
        raise NLAError(
            f"the chat template of {tokenizer.name_or_path} refuses these messages "
            f"({type(error).__name__}: {error})"
        ) from told(error)
    # transformers 5 answers a BatchEncoding, 4.x a list.
    return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)


def token_text(tokenizer: Any) -> Callable[[int], str]:
    """Text of single token ids."""
    return lambda token_id: str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))


def find_eos_ids(model: Any) -> frozenset[int]:
    """End-of-sequence ids of generation_config, else of the config; nothing else of either.

    Raises:
        NLAError: Something that is no token ids stands there.
    """
    for config in (model.generation_config, model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            listed = [found] if is_int(found) else found
            if not isinstance(listed, (list, tuple)) or not all(map(is_int, listed)):
                raise NLAError(
                    f"{model.name_or_path}: eos_token_id is {found!r:.80}; expected token ids"
                )
            return frozenset(listed)
    return frozenset()
