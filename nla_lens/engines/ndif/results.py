"""What a server sends as a result, read without trusting it.

nnsight unpickles results with `weights_only=False`, so that a server can run code here, and unpacks
without a limit. Here only tensors and plain values come out of a result, of a size that is known
before anything is unpacked: the archive must be one that `torch.save` writes, whose entries are
stored as they are. (The older formats are not looked at: before torch 2.6 their loader ran code.)
"""

from __future__ import annotations

import io
import zipfile
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.engines.ndif.protocol_2 import with_protocol_2
from nla_lens.errors import NLARemoteError

MOST_BYTES: Final = 512 << 20
"""Of a result unless the caller says otherwise: 16,000 positions of a 70B model."""
_MOST_DEPTH: Final = 8
_MOST_STRUCTURE: Final = 2 << 20
"""Bytes of the pickle without what is in tensors: 400,000 numbers in lists; a list has one."""
_BYTES_A_VALUE: Final = 8
_PLAIN: Final = (str, bytes, int, float, bool, complex, type(None), torch.Size, torch.dtype)


def read_result(content: bytes, *, compressed: bool, most_bytes: int = MOST_BYTES) -> Any:
    """The values in a result.

    Args:
        content: What the server sent.
        compressed: By zstandard, as the request was.
        most_bytes: Of what comes out.

    Raises:
        NLARemoteError: Damaged, too large, or more than tensors and plain values.
    """
    wrong: str
    try:
        content = _unpacked(content, most_bytes) if compressed else content
        _check_archive(content, most_bytes)
        archive = io.BytesIO(with_protocol_2(content))
        values = torch.load(archive, map_location="cpu", weights_only=True)
        _check_values(values, most_bytes, _MOST_DEPTH, {})
        return values
    except NLARemoteError as error:
        wrong = str(error)
    # Whatever a hostile archive makes torch trip over; its words are the server's.
    except Exception as error:
        wrong = f"it cannot be read as tensors and plain values ({type(error).__name__})"
    raise NLARemoteError(
        f"the server's result is refused: {wrong}. Only tensors, numbers, texts, and lists, tuples "
        "and dicts of them are taken from a server",
        cause="store",
    )


def check_ids(ids_BN: Tensor, n_rows: int, most: int, vocab_size: int) -> None:
    """Raises an NLARemoteError for what are no answers of up to `most` token ids each."""
    fits = ids_BN.ndim == 2 and len(ids_BN) == n_rows and 0 < ids_BN.shape[1] <= most
    integers = not (ids_BN.is_floating_point() or ids_BN.is_complex() or ids_BN.dtype == torch.bool)
    if not (fits and integers and bool(((ids_BN >= 0) & (ids_BN < vocab_size)).all())):
        raise NLARemoteError(
            f"the server's result is refused: {n_rows} answers of up to {most} token ids below "
            f"{vocab_size} were asked for, and {_words(ids_BN)} came: does it run this model?",
            cause="store",
        )


def check_vectors(resid_ND: Tensor, d_model: int, *, finite: bool = True) -> Tensor:
    """The same vectors; an NLARemoteError for what are none."""
    fits = resid_ND.ndim == 2 and resid_ND.shape[1] == d_model and resid_ND.is_floating_point()
    if not fits or (finite and not bool(resid_ND.isfinite().all())):
        raise NLARemoteError(
            f"the server's result is refused: finite vectors of d_model={d_model} were asked for, "
            f"and {_words(resid_ND)} came: does it run this model?",
            cause="store",
        )
    return resid_ND


def _words(tensor: Tensor) -> str:
    values = "" if tensor.is_complex() or not tensor.numel() else f" from {tensor.min().item()} on"
    return f"{tensor.dtype} {list(tensor.shape)}{values}"


def _unpacked(content: bytes, most_bytes: int) -> bytes:
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(content) as reader:
        unpacked = reader.read(most_bytes + 1)
    if len(unpacked) > most_bytes:
        raise NLARemoteError(_too_large(most_bytes))
    return unpacked


def _check_archive(content: bytes, most_bytes: int) -> None:
    """Refuses what is no archive of stored entries, or one that unfolds to more than it is."""
    if not content.startswith(b"PK\x03\x04"):
        raise NLARemoteError("it is no archive that torch.save writes")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise NLARemoteError("its archive is compressed, which torch.save's are not")
    if sum(entry.file_size for entry in entries) > min(len(content), most_bytes):
        raise NLARemoteError("its archive unfolds to more than it is")
    if any(e.file_size > _MOST_STRUCTURE for e in entries if e.filename.endswith("data.pkl")):
        raise NLARemoteError("it has too many parts")


def _check_values(value: Any, most_bytes: int, depth: int, seen: dict[tuple[int, int], int]) -> int:
    """Bytes of a value; what stands in it many times counts each time, and is looked at once."""
    if depth < 0:
        raise NLARemoteError(f"it is nested deeper than {_MOST_DEPTH} levels")
    if isinstance(value, Tensor):
        # What pickles to a parameter, or to a subclass, is none of what was saved.
        if type(value) is not Tensor or value.layout != torch.strided or value.is_quantized:
            raise NLARemoteError(f"it holds a {value.layout} {type(value).__name__}")
        if value.device.type != "cpu":
            raise NLARemoteError(f"it holds a tensor without values ({value.device.type})")
        found = value.numel() * value.element_size()
    elif type(value) in (list, tuple) or isinstance(value, dict):
        at = (id(value), depth)
        if at not in seen:
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            each = (_check_values(part, most_bytes, depth - 1, seen) for part in parts)
            seen[at] = sum(each) + _BYTES_A_VALUE
        found = seen[at]
    elif type(value) in _PLAIN:
        found = _BYTES_A_VALUE
    else:
        raise NLARemoteError(f"it holds a {type(value).__name__}")
    if found > most_bytes:
        raise NLARemoteError(_too_large(most_bytes))
    return found


def _too_large(most_bytes: int) -> str:
    return (
        f"it holds more than {most_bytes} bytes; ask for less at once, or raise the server's "
        "most_bytes"
    )
