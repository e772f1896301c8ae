"""Text of strangers (checkpoints, servers, models) on its way to a terminal, page, file or message.

`harmless` is for what people read, `to_json` for what programs read, and `scrub` comes before both
where a server may have repeated a key. Messages are scrubbed first and shortened then: half a key
is not found.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import re
from collections.abc import Iterator
from typing import Any, Final

_CONTROL: Final = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but the line feed, what turns the writing round, halves of surrogate pairs."""
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_HIDDEN: Final = "<key>"
_KEY_SHAPE: Final = re.compile(r"\b[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")
# A presigned address is a key to what it points at.
_QUERY: Final = re.compile(r"((?:https?|wss?)://[^\s?'\"]+)\?[^\s'\"]*", re.IGNORECASE)
_USER: Final = re.compile(r"((?:https?|wss?)://)[^\s/'\"@]*@", re.IGNORECASE)
_ESCAPES: Final = frozenset("%\\&")
"""What every escape begins with."""
_LEAST_PIECE: Final = 6
"""Shorter pieces of an encoded key are found in innocent text."""


def harmless(text: str) -> str:
    """A text whose control characters, and those that turn the writing round, are spelled out."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def well_formed(text: str) -> str:
    """A text with halves of surrogate pairs spelled out, which have no UTF-8."""
    return _SURROGATE.sub(lambda found: ascii(found[0])[1:-1], text)


def well_formed_in(values: Any) -> Any:
    """The same for all texts in lists and dicts, however deep."""
    if isinstance(values, str):
        return well_formed(values)
    if isinstance(values, dict):
        return {well_formed_in(key): well_formed_in(value) for key, value in values.items()}
    return [well_formed_in(part) for part in values] if isinstance(values, list) else values


def to_json(values: Any) -> str:
    """JSON on one line, in which what `harmless` spells out is escaped; read, it is the same."""
    written = json.dumps(values, ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


def scrub(text: str, key: str | None) -> str:
    """A text without the API key however it is written, anything of its shape, or what a URL hides.

    Args:
        text: Whole: shorten it afterwards.
        key: The key, where there is one.
    """
    text = _KEY_SHAPE.sub(_HIDDEN, without_key(text, key))
    text = _USER.sub(rf"\1{_HIDDEN}@", text)
    return _QUERY.sub(r"\1", text)


def without_key(text: str, key: str | None) -> str:
    """A text without the API key, however it is written, and nothing else changed."""
    if not key:
        return text
    plain, escaped = _written(key)
    return plain.sub(_HIDDEN, escaped.sub(_HIDDEN, text) if _ESCAPES & set(text) else text)


def without_key_in(values: Any, key: str | None, most_depth: int = 64) -> Any:
    """The same for all texts in what JSON holds, keys of objects included.

    Raises:
        ValueError: Nested too deep.
    """
    if isinstance(values, str):
        return without_key(values, key)
    if not isinstance(values, (dict, list)):
        return values
    if most_depth == 0:
        raise ValueError("nested too deep")
    if isinstance(values, list):
        return [without_key_in(part, key, most_depth - 1) for part in values]
    return {
        without_key(name, key): without_key_in(value, key, most_depth - 1)
        for name, value in values.items()
    }


@functools.lru_cache(maxsize=4)
def _written(key: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Every way of writing a key that programs have, whole, and character by character."""
    # Its own characters: what holds a key may have a repr that says something else.
    key = "".join(key)
    found = sorted({key, *_ways(key.encode())}, key=len, reverse=True)
    each = "".join(map(_escaped, key))
    return re.compile("|".join(map(re.escape, found)), re.I), re.compile(each, re.I)


def _escaped(character: str) -> str:
    """A pattern for a character itself or as addresses, JSON, Python and HTML escape it.

    Programs do not agree on which characters they leave as they are, so any may be escaped.
    """
    # Bounded: a server may send millions of backslashes.
    code, named = ord(character), html.escape(character)
    ways = [
        rf"\\{{0,4}}{re.escape(character)}",
        "".join(f"%(?:25){{0,3}}{byte:02x}" for byte in character.encode()),
        rf"\\{{1,4}}(?:u{code:04x}|x{code:02x})",
        f"&#(?:0{{0,6}}{code}|x0{{0,6}}{code:x});?",
        *([re.escape(named)] if named != character else []),
        *([r"\+"] if character == " " else []),
    ]
    return f"(?:{'|'.join(ways)})"


def _ways(raw: bytes) -> Iterator[str]:
    yield raw.hex()
    for before in range(3):
        # As a piece of something longer: what neighbours change is left out.
        written = base64.b64encode(b"\0" * before + raw)[(0, 2, 3)[before] :].rstrip(b"=")
        piece = written[: len(written) - (1 if (before + len(raw)) % 3 else 0)].decode()
        if len(piece) >= _LEAST_PIECE:
            yield from (piece, piece.replace("+", "-").replace("/", "_"))
