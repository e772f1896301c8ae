"""Which tokens of a document are explained.

>>> Picker.of("from:50", "spread:16")      # 16 of those from the 50th on, evenly
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.models.tokens import render_chat

Positions: TypeAlias = (
    "str | Callable[[Tokens], Sequence[int]] | Sequence[str | Callable[..., Any]]"
)
"""One rule or several, each applied to what the one before it left."""
_FORMS = (
    '"all", "last", "every:N", "from:N", "spread:N", "regex:PATTERN", "assistant" or a function'
)


@dataclass(frozen=True)
class Tokens:
    """A document as a rule sees it.

    Attributes:
        ids: Token ids.
        texts: The text of each.
        messages: The chat it was rendered from, where it was one.
        tokenizer: The source model's.
    """

    ids: Sequence[int]
    texts: Sequence[str]
    messages: Sequence[Any] | None
    tokenizer: Any


Rule: TypeAlias = "Callable[[Tokens, list[int]], list[int]]"


@dataclass(frozen=True)
class Picker:
    """Rules, one after the other.

    Attributes:
        described: What a manifest says of them.
    """

    rules: tuple[Rule, ...]
    described: tuple[str, ...]

    @classmethod
    def of(cls, positions: Positions) -> Picker:
        """Reads rules.

        Raises:
            NLAError: Not of a form that is known, or a pattern that is none.
        """
        single = isinstance(positions, str) or callable(positions)
        if not single and not isinstance(positions, (list, tuple)):
            raise NLAError(f"positions={positions!r:.80} is not of a known form; it is {_FORMS}")
        listed: list[Any] = [positions] if single else list(positions)  # type: ignore[arg-type]
        if not listed:
            raise NLAError(f"positions= is empty; it is {_FORMS}")
        names = [p if isinstance(p, str) else getattr(p, "__qualname__", repr(p)) for p in listed]
        return cls(tuple(map(_rule, listed)), tuple(names))

    def __call__(self, tokens: Tokens) -> list[int]:
        """The positions picked, ascending.

        Raises:
            NLAError: A function gave something that is no position of the document.
        """
        left = list(range(len(tokens.ids)))
        for rule in self.rules:
            left = rule(tokens, left)
        return left


def _rule(given: Any) -> Rule:
    if callable(given):
        return lambda tokens, left: _checked(given(tokens), tokens, left)
    name, colon, value = str(given).partition(":")
    if given == "all":
        return lambda tokens, left: left
    if given == "last":
        return lambda tokens, left: left[-1:]
    if given == "assistant":
        return lambda tokens, left: [i for i in left if i in assistant_turns(tokens)]
    if name == "regex" and colon:
        return _matching(value)
    if name in ("every", "from", "spread") and value.isdecimal() and len(value) < 19:
        n = int(value)
        if name == "from":
            return lambda tokens, left: [i for i in left if i >= n]
        if n >= 1:
            return _every(n) if name == "every" else _spread(n)
    raise NLAError(f"positions={given!r} is not of a known form; it is {_FORMS}")


def _every(n: int) -> Rule:
    return lambda tokens, left: left[::n]


def _spread(n: int) -> Rule:
    """At most n, evenly from the first to the last."""

    def rule(tokens: Tokens, left: list[int]) -> list[int]:
        if len(left) <= n:
            return left
        if n == 1:
            return left[-1:]
        return [left[round(k * (len(left) - 1) / (n - 1))] for k in range(n)]

    return rule


def _matching(pattern: str) -> Rule:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise NLAError(f"positions='regex:{pattern}': no regular expression: {error}") from error
    return lambda tokens, left: [i for i in left if compiled.search(tokens.texts[i])]


def _checked(found: Any, tokens: Tokens, left: list[int]) -> list[int]:
    try:
        # Of a tensor or array its numbers.
        listed = found.tolist() if hasattr(found, "tolist") else list(found)
    except TypeError as error:
        raise NLAError(f"positions= answered {found!r:.80}, not a list of positions") from error
    n = len(tokens.ids)
    for position in listed:
        if not is_int(position) or not -n <= position < n:
            raise NLAError(f"positions= answered {position!r}: not in a document of {n} tokens")
    chosen = {int(position) % n for position in listed}
    return [i for i in left if i in chosen]


def assistant_turns(tokens: Tokens) -> set[int]:
    """The tokens that assistants wrote, the end of their turns included.

    What a turn adds is what the chat has with it and not without it; this holds for templates that
    only append, and is checked.

    Raises:
        NLAError: No chat, or a template that changes what came before.
    """
    if tokens.messages is None:
        raise NLAError('positions="assistant" needs chat messages, and this document is a text')
    written: set[int] = set()
    ids = list(tokens.ids)
    for i, turn in enumerate(tokens.messages):
        if turn.get("role") != "assistant":
            continue
        before = render_chat(tokens.tokenizer, tokens.messages[:i]) if i else []
        through = render_chat(
            tokens.tokenizer, tokens.messages[: i + 1], add_generation_prompt=False
        )
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise NLAError(
                f'positions="assistant": the chat template renders turn {i} otherwise when others '
                "follow, so which tokens are its own cannot be told"
            )
        written |= set(range(len(before), len(through)))
    return written
