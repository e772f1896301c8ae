"""Tokens of a model: chat messages to ids, an id to its text, the ids that end an answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from nla_lens.checks import is_int
from nla_lens.errors import NLAError, NLAWarning, told
from nla_lens.models.templates import apply_template, is_dated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Arguments of apply_chat_template that are not the template's.
_RESERVED: Final = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
        "documents", "max_length", "messages", "padding", "processor_kwargs",
        "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
        "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip


def check_template_options(options: Any, where: str) -> dict[str, Any]:
    """What a chat template is given beside the messages, as `enable_thinking`.

    Args:
        options: Names and plain values; None is nothing.
        where: The argument or key, for messages.

    Raises:
        NLAError: Not such a mapping, or the name of something else.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(k, str) for k in options):
        raise NLAError(
            f'{where} is {options!r:.80}; expected a mapping as in {{"enable_thinking": False}}'
        )
    for name, value in options.items():
        if name in _RESERVED or not name.isidentifier():
            raise NLAError(f"{where} has {name!r:.80}, which is not the template's to be given")
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise NLAError(
                f"{where}: {name} is {value!r:.80}; expected a truth value, number or text"
            )
    return dict(options)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    content: str | Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of one user turn, or of a list of messages, in the model's chat format.

    Tokenized in one step: rendering to text first and tokenizing that again doubles the BOS.

    Args:
        tokenizer: The model's, with a chat template.
        content: The user's turn, or messages.
        add_generation_prompt: Open the assistant's turn.
        options: What the template is given besides; see `check_template_options`.

    Raises:
        NLAError: The tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise NLAError(f"the tokenizer of {tokenizer.name_or_path} has no chat template")
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    try:
        ids: Any = apply_template(
            tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            **(options or {}),
        )
    # The template is a program that came with the checkpoint: it may raise anything.
    except Exception as error:
        raise NLAError(
            f"the chat template of {tokenizer.name_or_path} refuses these messages "
            f"({type(error).__name__}: {error})"
        ) from told(error)
    # transformers 5 answers a BatchEncoding, 4.x a list.
    return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)


def check_steady(
    tokenizer: PreTrainedTokenizerBase, content: str, ids: list[int], options: Mapping[str, Any]
) -> None:
    """Looks whether a chat template writes the same each time; says where it writes the date.

    Args:
        tokenizer: As in `render_chat`, as are `content` and `options`.
        content: The user's turn.
        ids: What it was rendered to before.
        options: What the template is given besides.

    Raises:
        NLAError: It does not, so that nothing could be repeated.
    """
    if render_chat(tokenizer, content, options=options) != ids:
        raise NLAError(
            f"the chat template of {tokenizer.name_or_path} writes another prompt each time it is "
            "asked (chance, or the time of day): put a fixed text in its place"
        )
    turn = [{"role": "user", "content": content}]
    if is_dated(tokenizer, turn, add_generation_prompt=True, **options):
        warnings.warn(
            f"the chat template of {tokenizer.name_or_path} writes the date into the prompt, so "
            "texts may differ from day to day: where it takes one, pass "
            'chat_template_kwargs={"date_string": "26 Jul 2024"}',
            NLAWarning,
            stacklevel=5,
        )


def tokenize(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text.

    Raises:
        NLAError: The tokenizer's files do not belong together.
    """
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    # The tokenizers library raises bare Exceptions.
    except Exception as error:
        raise NLAError(
            f"the tokenizer of {tokenizer.name_or_path} fails on {text!r:.80} "
            f"({type(error).__name__}: {error})"
        ) from told(error)


def check_ids(tokenizer: Any, ids: Sequence[int], rows: int | None) -> None:
    """Refuses tokens that a model does not know, before its embedding fails on them.

    Args:
        tokenizer: Where they came from.
        ids: Token ids.
        rows: How many tokens the model knows; None where nobody says.

    Raises:
        NLAError: Names the first.
    """
    if rows is None or max(ids, default=0) < rows:
        return
    beyond = next(token for token in ids if token >= rows)
    raise NLAError(
        f"the tokenizer of {tokenizer.name_or_path} makes the token {beyond} "
        f"({token_text(tokenizer)(beyond)!r:.80}), and the model knows {rows}: tokens were added "
        "to one and not to the other"
    )


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
