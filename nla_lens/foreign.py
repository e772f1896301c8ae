"""Text of strangers (checkpoints, servers, models) on its way to a terminal, page, file or message.

`harmless` is for what people read, `to_json` for what programs read, and `scrub` comes before both
where a server may have repeated a key. Messages are scrubbed first and shortened then: half a key
is not found.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote, quote_plus

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
    return _written(key).sub(_HIDDEN, text) if key else text


@functools.lru_cache(maxsize=4)
def _written(key: str) -> re.Pattern[str]:
    """Every way of writing a key that programs have, the longest first."""
    found = sorted(set(_ways(key)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)), re.IGNORECASE)


def _ways(key: str) -> Iterator[str]:
    # Its own characters: what holds a key may have a repr that says something else.
    key = "".join(key)
    yield from (key, quote(key, safe=""), quote_plus(key))
    yield from (json.dumps(key)[1:-1], repr(key)[1:-1])
    raw = key.encode()
    yield from (raw.hex(), "".join(f"%{byte:02x}" for byte in raw))
    for before in range(3):
        # As a piece of something longer: what neighbours change is left out.
        written = base64.b64encode(b"\0" * before + raw)[(0, 2, 3)[before] :].rstrip(b"=")
        piece = written[: len(written) - (1 if (before + len(raw)) % 3 else 0)].decode()
        if len(piece) >= _LEAST_PIECE:
            yield from (piece, piece.replace("+", "-").replace("/", "_"))
