"""Results written in pickle's protocol 4, brought to protocol 2, which `weights_only=True` reads.

NDIF's server saves with a pickler of its own, whose protocol is Python's default. The stream is
taken apart and written anew, opcode by opcode; nothing of it is run.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from typing import Final

_PROTO_2: Final = b"\x80\x02"
_STRINGS: Final = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")


def with_protocol_2(content: bytes) -> bytes:
    """An archive of `torch.save` whose pickle is of protocol 2; the same where it is already.

    Raises:
        ValueError: No archive, or a stream that cannot be written so.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise ValueError("not one data.pkl")
        if archive.read(pickled[0])[:2] == _PROTO_2:
            return content
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as rewritten:
            for name in archive.namelist():
                held = archive.read(name)
                rewritten.writestr(name, _stream(held) if name == pickled[0] else held)
    return out.getvalue()


def _stream(pickled: bytes) -> bytes:
    """The same stream in opcodes of protocol 2.

    Texts are written out wherever they are used, and never put into the memo: protocol 4 takes the
    names of classes from the stack, where protocol 2 has them in the opcode itself.
    """
    parts: list[bytes] = []
    texts: list[str | None] = []
    memo: dict[int, str] = {}
    n_memo = 0
    ops = list(pickletools.genops(pickled))
    ends = [*(at for _, _, at in ops[1:]), len(pickled)]
    for (op, argument, at), end in zip(ops, ends, strict=True):
        text: str | None = None
        if op.name == "PROTO":
            part = _PROTO_2
        elif op.name == "FRAME":
            continue
        elif op.name in _STRINGS:
            text = str(argument)
            part = _text(text)
        elif op.name == "MEMOIZE":
            n_memo += 1
            if texts[-1] is not None:
                memo[n_memo - 1] = str(texts[-1])
                continue
            part = b"r" + struct.pack("<I", n_memo - 1)
        elif op.name in ("BINGET", "LONG_BINGET") and argument in memo:
            text = memo[int(str(argument))]
            part = _text(text)
        elif op.name == "STACK_GLOBAL":
            module, name = texts[-2:]
            if module is None or name is None or "\n" in module + name:
                raise ValueError("a class without a name")
            del parts[-2:], texts[-2:]
            part = f"c{module}\n{name}\n".encode()
        else:
            part = pickled[at:end]
        parts.append(part)
        texts.append(text)
    return b"".join(parts)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded
