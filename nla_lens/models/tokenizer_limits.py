"""What a tokenizer of a stranger's may cost, told by its tokenizer.json before it is built."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from nla_lens.disk.reading import read_bytes
from nla_lens.errors import NLAError

_MOST_BYTES: Final = 128 << 20
"""Gemma 3's, of 262,144 tokens, has 33 MB."""
_MOST_ADDED: Final = 1 << 18
_MOST_GROWTH: Final = 4096
"""By how much a text may grow on its way; SentencePiece's blanks take three bytes for one."""
_LONGEST_TOKEN: Final = 1 << 16
_LONGEST_PADDING: Final = 1 << 20
_GROWTH: Final = {"ByteLevel": 2, "Precompiled": 4, "NFKC": 4, "NFKD": 4, "NFD": 3, "NFC": 3}


def check_tokenizer(path: Path) -> dict[str, Any]:
    """Refuses a tokenizer.json of absurd numbers, or one by which texts explode.

    Returns:
        What stands in it.

    Raises:
        NLAError: Names what it is.
    """
    content = read_bytes(path, most_bytes=_MOST_BYTES, what="a tokenizer")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NLAError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise NLAError(f"{path} must hold an object, found {type(found).__name__}")
    added = found.get("added_tokens")
    if isinstance(added, list):
        if len(added) > _MOST_ADDED:
            raise NLAError(f"{path} adds {len(added)} tokens; at most {_MOST_ADDED} are loaded")
        _check_lengths(path, (t.get("content") for t in added if isinstance(t, Mapping)))
    model = found.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, dict):
        _check_length(path, max(map(len, vocabulary), default=0))
    elif isinstance(vocabulary, list):
        _check_lengths(path, (t[0] if isinstance(t, list) and t else t for t in vocabulary))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1
        for step in _steps(found.get(part)):
            growth *= _growth(step)
            if growth > _MOST_GROWTH:
                raise NLAError(
                    f"{path}: by its {part} a text may grow {_MOST_GROWTH}-fold and more, which no "
                    "tokenizer of a model does"
                )
    padding = found.get("padding")
    strategy = padding.get("strategy") if isinstance(padding, Mapping) else None
    fixed = strategy.get("Fixed") if isinstance(strategy, Mapping) else 0
    if not isinstance(fixed, int) or fixed > _LONGEST_PADDING:
        raise NLAError(f"{path} pads every text to {fixed!r:.80} tokens")
    dropout = model.get("dropout") if isinstance(model, Mapping) else None
    if dropout:
        raise NLAError(
            f"{path}: model.dropout is {dropout!r:.80}: it would make other tokens of a text each "
            "time, which is for training; set it to null"
        )
    return found


def _check_lengths(path: Path, texts: Iterator[Any]) -> None:
    _check_length(path, max((len(text) for text in texts if isinstance(text, str)), default=0))


def _check_length(path: Path, longest: int) -> None:
    if longest > _LONGEST_TOKEN:
        raise NLAError(f"{path} has a token of {longest} characters")


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a part, which may be lists of steps themselves."""
    left = [part]
    while left:
        step = left.pop()
        if isinstance(step, list):
            left += step
        elif isinstance(step, Mapping):
            yield step
            left += [v for v in step.values() if isinstance(v, list)]


def _growth(step: Mapping[str, Any]) -> int:
    kind = step.get("type")
    if kind == "Replace":
        content, pattern = step.get("content"), step.get("pattern")
        if not isinstance(content, str):
            return 1
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
        least = len(replaced.encode("utf-8", "replace")) if isinstance(replaced, str) else 1
        return max(1, -(-len(content.encode("utf-8", "replace")) // max(1, least)))
    return _GROWTH.get(str(kind), 1)
