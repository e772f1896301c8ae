"""The one reader of small files that strangers made: JSON and YAML, before anything else sees them.

A name in a checkpoint may stand for a pipe nobody writes to, for a device without an end, for ten
gigabytes, or for a kilobyte that unfolds to them. What passes here is a regular file of bounded
size and depth, with each key once, whose texts are Unicode and whose numbers are numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import yaml

from nla_lens.checks import is_unicode
from nla_lens.errors import NLAError, told

MOST_BYTES: Final = 8 << 20
"""Published configs have a few kilobytes, those of tokenizers up to some megabytes."""
_MOST_JSON_DEPTH: Final = 64
_MOST_YAML_DEPTH: Final = 20
_LARGEST: Final = 1 << 1000
"""Near where float64 ends: a larger integer can be neither compared with a number nor shown."""
_TWO_READINGS: Final = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""`020` and `1:30` are 16 and 90 in YAML 1.1, 20 and a text in 1.2: left as the texts they are."""


def read_bytes(
    path: str | Path, *, most_bytes: int = MOST_BYTES, what: str = "such a file"
) -> bytes:
    """The content of a regular file; links are followed, as the hub's cache is made of them.

    Args:
        path: The file.
        most_bytes: Refused beyond, whatever the file system says of its size.
        what: What the message calls it.

    Raises:
        NLAError: Missing, a directory, pipe or device, or too large.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size + 1) if size <= most_bytes else b""
    except (OSError, ValueError) as error:
        if isinstance(error, NLAError):
            raise
        # ValueError: a name with a NUL in it.
        raise NLAError(f"{path} cannot be read: {error}") from error
    if max(size, len(content)) > most_bytes:
        raise NLAError(
            f"{path} has {max(size, len(content))} bytes; {what} has at most {most_bytes}"
        )
    return content


def open_regular(path: str | Path) -> IO[bytes]:
    """Opens a regular file to read it; links are followed.

    Raises:
        NLAError: A directory, pipe or device.
        OSError: It cannot be opened.
    """
    # A pipe without a writer would be waited for otherwise.
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise NLAError(f"{path} cannot be read: it is no regular file")
    return os.fdopen(opened, "rb")


def read_json(path: str | Path, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """An object of JSON.

    Infinity is taken, as published configs hold it; NaN is not.

    Raises:
        NLAError: As `read_bytes`; no JSON, no object, nested too deep, a key twice, NaN, an integer
            beyond float64, or half of a surrogate pair. Names the file.
    """
    content = read_bytes(path, most_bytes=most_bytes)
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=_each_once, parse_constant=_constant
        )
        _check(found, _MOST_JSON_DEPTH)
    except (ValueError, RecursionError) as error:
        raise NLAError(f"{path} cannot be read as JSON: {_one_line(error)}") from told(error)
    if not isinstance(found, dict):
        raise NLAError(f"{path} must hold an object, found {type(found).__name__}")
    return found


def read_yaml(
    path: str | Path, *, most_bytes: int = MOST_BYTES, what: str = "such a file"
) -> Mapping[str, Any]:
    """A mapping of YAML, by a safe loader without aliases, which can make gigabytes of a kilobyte.

    Raises:
        NLAError: As `read_json`.
    """
    content = read_bytes(path, most_bytes=most_bytes, what=what)
    try:
        found = _json_or_yaml(content.decode("utf-8"))
        _check(found, _MOST_YAML_DEPTH)
    # PyYAML's constructors raise ValueError, AttributeError and the like on odd scalars.
    except Exception as error:
        raise NLAError(f"{path} cannot be read as YAML: {_one_line(error)}") from told(error)
    if not isinstance(found, Mapping):
        raise NLAError(f"{path} must hold a mapping, found {type(found).__name__}")
    return found


def _json_or_yaml(text: str) -> Any:
    """JSON is YAML, but for the tabs that PyYAML does not take."""
    if text.startswith("{") and "\t" in text:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text, object_pairs_hook=_each_once, parse_constant=_constant)
    # _PlainLoader is a SafeLoader.
    return yaml.load(text, Loader=_PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    """A safe loader without aliases, deep nests, or keys that stand twice."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("YAML aliases are not accepted in a sidecar")
        self._depth += 1
        try:
            if self._depth > _MOST_YAML_DEPTH:
                raise yaml.YAMLError(f"nested deeper than {_MOST_YAML_DEPTH} levels")
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and _TWO_READINGS.fullmatch(value):
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"the key {key.value!r:.80} stands there twice")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} stands there twice")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def _check(found: Any, most_depth: int) -> None:
    """Refuses deep nests, texts that are not Unicode, integers without end; without recursion."""
    level = [found]
    for _ in range(most_depth + 1):
        if not level:
            return
        texts = [part for part in level if isinstance(part, str)]
        if not is_unicode("".join(texts)):
            raise ValueError("half of a surrogate pair, which is no text")
        if any(isinstance(part, int) and abs(part) > _LARGEST for part in level):
            raise ValueError("an integer of more than 300 digits")
        level = [part for whole in level for part in _parts(whole)]
    raise ValueError(f"nested deeper than {most_depth} levels")


def _parts(whole: Any) -> Iterator[Any]:
    if isinstance(whole, Mapping):
        yield from whole
        yield from whole.values()
    elif isinstance(whole, (list, tuple, set)):
        yield from whole


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
