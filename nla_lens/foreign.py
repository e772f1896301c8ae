"""Text of strangers (checkpoints, servers, models) on its way to a terminal or into a message."""

from __future__ import annotations

import re
from typing import Final

_CONTROL: Final = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_HIDDEN: Final = "<key>"
_KEY_SHAPE: Final = re.compile(r"\b[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")
# A presigned address is a key to what it points at.
_QUERY: Final = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")


def harmless(text: str) -> str:
    """A text whose control characters, and those that turn the writing round, are spelled out."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def scrub(text: str, key: str | None) -> str:
    """A text without the API key, anything of its shape, or the signature of an address."""
    if key:
        text = text.replace(key, _HIDDEN)
    return _QUERY.sub(r"\1", _KEY_SHAPE.sub(_HIDDEN, text))
