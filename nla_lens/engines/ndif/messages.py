"""A server's word that comes as bytes: plain values in a pickle, built here and never unpickled.

NDIF wraps a result in the state of its job, which holds nnsight's `Status` and bytes: neither is in
what `weights_only=True` reads. The opcodes are gone through by hand; they can make values, and call
nothing.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from dataclasses import dataclass
from typing import Any, Final

from nla_lens.errors import NLARemoteError

_STATUS: Final = ("nnsight.schema.response", "Status")
_CONSTANTS: Final[dict[str, Any]] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES: Final = {
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
}
_MOST_PARTS: Final = 10_000
"""A state has some ten: its fields, and bytes that are a result."""
_TUPLES: Final = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """A class that a stream names; it is not looked up."""

    module: str
    name: str


def read_message(content: bytes) -> Any:
    """The values in a message.

    Raises:
        NLARemoteError: Damaged, or more than plain values.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
            entry = archive.getinfo(name)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(content):
                raise ValueError("compressed")
            return _values(archive.read(name))
    # Whatever a hostile stream makes this trip over.
    except Exception:
        pass
    raise NLARemoteError("the server's result is refused: its message holds more than plain values")


def _values(pickled: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for n, (op, argument, _) in enumerate(pickletools.genops(pickled)):
        name = op.name
        if n > _MOST_PARTS:
            raise ValueError("too many parts")
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            (value,) = stack
            return value
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in _TUPLES:
            _fold(stack, len(stack) - _TUPLES[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            _fold(stack, marks.pop())
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else int(str(argument))] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(str(argument))])
        elif name in ("STACK_GLOBAL", "GLOBAL"):
            module, called = str(argument).split(" ") if name == "GLOBAL" else stack[-2:]
            if name == "STACK_GLOBAL":
                del stack[-2:]
            stack.append(_Name(module, called))
        elif name == "REDUCE":
            named, given = stack[-2:]
            # The one class there is in it, made of its own name.
            if named != _Name(*_STATUS) or len(given) != 1 or not isinstance(given[0], str):
                raise ValueError("a call")
            stack[-2:] = [given[0]]
        elif name in ("SETITEM", "SETITEMS"):
            at = marks.pop() if name == "SETITEMS" else len(stack) - 2
            pairs = stack[at:]
            del stack[at:]
            stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            at = marks.pop() if name == "APPENDS" else len(stack) - 1
            added = stack[at:]
            del stack[at:]
            stack[-1].extend(added)
        else:
            raise ValueError(name)
    raise ValueError("no end")


def _fold(stack: list[Any], at: int) -> None:
    stack[at:] = [tuple(stack[at:])]
