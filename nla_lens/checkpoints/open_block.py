"""Does a prompt end inside a block of thought? The answer would then be thought, not said.

A chat template may open `<think>` for the assistant unless it is told not to. What it writes behind
the user's turn is looked at: a tag that is opened there and not closed. Names of roles and of
answers open nothing; of the others, those count that speak of thought, or that the template itself
closes somewhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.checkpoints.template import own_template, read_tokenizer_config, template_of
from nla_lens.checkpoints.user_turn import user_turn
from nla_lens.errors import NLAError
from nla_lens.models.templates import render_text

_THOUGHT: Final = re.compile(
    r"think|thought|reason|analysis|scratch_?pad|reflect|ruminat|deliberat|monolog|(^|_)cot($|_)",
    re.IGNORECASE,
)
_ROLES: Final = frozenset(
    {
        "ai", "answer", "assistant", "bos", "bot", "explanation", "gpt", "human", "inst", "model",
        "output", "response", "role", "s", "sys", "system", "turn", "user",
    }
)  # fmt: skip
# <name>, [NAME], and with bars or triangles: <|name|>, <name|>, <|name>, ◁name▷.
_TAG: Final = re.compile(
    r"(?P<open><[|\uff5c]?|\[|◁)(?P<slash>/?)(?P<name>[A-Za-z][\w:▁-]*)(?P<close>[|\uff5c]?>|\]|▷)"
)
# gpt-oss: <|channel|>analysis<|message|>, ended by <|end|>; another channel follows.
_HARMONY: Final = re.compile(r"<\|channel\|>\s*(\w+)|<\|(?:end|return)\|>")
_START: Final = re.compile(r"^(begin|start)(_of)?_|_(begin|start)$", re.IGNORECASE)
_END: Final = re.compile(r"^(end)(_of)?_|_end$", re.IGNORECASE)


def open_block(written: str, template: str = "") -> str | None:
    """The tag that a text opens last and does not close.

    Args:
        written: What the chat template writes behind the user's turn.
        template: The chat template itself.

    Returns:
        The tag as it stands there, as `<think>`; None where nothing is open.
    """
    channels = [found[1] for found in _HARMONY.finditer(written)]
    if channels and channels[-1] not in (None, "final"):
        return f"<|channel|>{channels[-1]}"
    opened: list[tuple[str, str]] = []
    for tag in _TAG.finditer(written):
        name, is_end = _kind(tag)
        if is_end:
            while opened and name in (known for known, _ in opened):
                if opened.pop()[0] == name:
                    break
        elif _counts(name, tag, template):
            opened.append((name, tag[0]))
    return opened[-1][1] if opened else None


def _kind(tag: re.Match[str]) -> tuple[str, bool]:
    """The name of the block, and whether the tag ends it."""
    name, before, after = tag["name"].lower(), tag["open"], tag["close"]
    ends = bool(tag["slash"]) or bool(_END.search(name))
    # Gemma 4: <|channel> opens, <channel|> closes.
    ends = ends or (before == "<" and after != ">" and len(after) > 1)
    return _END.sub("", _START.sub("", name)), ends


def _counts(name: str, tag: re.Match[str], template: str) -> bool:
    if name in _ROLES:
        return False
    if _THOUGHT.search(name):
        return True
    half_open = tag["open"] in ("<|", "<\uff5c") and tag["close"] == ">"
    return f"</{tag['name']}>" in template or (half_open and f"<{tag['name']}|>" in template)


def behind_user_turn(rendered: str, content: str, marker: str) -> str:
    """What a rendered prompt has behind the user's content.

    Args:
        rendered: The whole prompt as text.
        content: The user's turn, with the marker in it.
        marker: The injection character.
    """
    behind = rendered.partition(marker)[2]
    # Templates trim what they are given, and write nothing into it.
    rest = content.partition(marker)[2].strip()
    return behind.partition(rest)[2] if rest and rest in behind else behind


def warning(tag: str) -> str:
    """What is wrong with a prompt that ends inside a block, and the remedy."""
    return (
        f"the prompt ends inside an open block ({tag}): what is written next is thought and not "
        "an explanation, unless the verbalizer was trained so; if its chat template takes it, pass "
        'chat_template_kwargs={"enable_thinking": False}'
    )


def open_block_in(spec: NLASpec, rendered: str, template: Any) -> str | None:
    """The tag that a verbalizer's rendered prompt ends inside of; None where it does not.

    Args:
        spec: The verbalizer's.
        rendered: The prompt in its chat format.
        template: The chat template; of several, all.
    """
    written = behind_user_turn(rendered, user_turn(spec), spec.injection_char)
    return open_block(written, str(template))


def open_block_of(spec: NLASpec, av: Checkpoint) -> str | None:
    """The same from a checkpoint's files, without transformers, which `info` does not load.

    Raises:
        NLAError: The chat template is missing or damaged, or fails.
    """
    home = Path(av.tokenizer_path)
    template = own_template(av) or template_of(home)
    if template is None and av.is_adapter and av.base is not None:
        template = template_of(Path(av.base))
    if template is None:
        raise NLAError(f"{home} has no chat template")
    config = read_tokenizer_config(home)
    texts = {key: _text(value) for key, value in config.items() if key.endswith("_token")}
    tokens = {key: text for key, text in texts.items() if isinstance(text, str)}
    content = user_turn(spec)
    values = {
        "tools": None,
        "documents": None,
        **tokens,
        **spec.chat_template_kwargs,
        "messages": [{"role": "user", "content": content}],
        "add_generation_prompt": True,
    }
    return open_block_in(spec, render_text(template, values), template)


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token
