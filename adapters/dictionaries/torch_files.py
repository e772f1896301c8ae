"""Opens `.pt` and `.pth` files of strangers.

* Nothing is unpickled freely: `torch.load(weights_only=True)`, and before that the pickle inside is
  read without being run: what it names must be what tensors are made of. `weights_only` alone lets
  a kilobyte ask for a hundred gigabytes of `bytearray`.
* Nothing is unpacked. `torch.save` stores, so a compressed record is refused before it is opened.
* No tensor is larger than its bytes: not by a stride of 0, not by reaching into its neighbour.
"""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.errors import NLAError

_LOCAL_HEADER: Final = 30
_ZIP_START: Final = b"PK\x03\x04"
_ZIP_END: Final = b"PK\x05\x06"
_ZIP_END_BYTES: Final = 22
_LONGEST_PICKLE: Final = 8 << 20
"""Of what describes the tensors, not of the tensors: that of a dictionary has a kilobyte."""
_LEGACY_PICKLES: Final = 5
NESTS: Final = (
    "model",
    "state_dict",
    "model_state_dict",
    "sae",
    "sae_state_dict",
    "ae",
    "autoencoder",
    "dictionary",
)
"""Names that trainers save a dictionary under."""
_NAMED: Final = {
    "collections": {"OrderedDict"},
    "builtins": {"set"},
    "__builtin__": {"set"},
    "_codecs": {"encode"},
    "torch": {"Size", "device"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
    "torch.nn.parameter": {"Parameter"},
    "torch._utils": {
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
    },
}


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that `torch.save` wrote, by name.

    Raises:
        NLAError: See `nla_lens.adapters.dictionaries.tensor_files.open_tensors`.
    """
    with path.open("rb") as file:
        # As torch tells them apart: its files are zip archives since 1.6.
        in_parts = file.read(len(_ZIP_START)) == _ZIP_START
        records = _records(path, file) if in_parts else {}
        if not in_parts:
            file.seek(0)
            _look_through(path, file)
    state = _innermost(path, _load_torch(path, in_parts))
    size = path.stat().st_size
    tensors = {name: t.detach() for name, t in state.items() if isinstance(t, Tensor)}
    for name, t in tensors.items():
        _check_extent(path, name, t, size)
    offsets = _torch_offsets(path, tensors, records)
    return {
        name: StoredTensor(name, path, tuple(t.shape), t.dtype, t, offsets.get(name))
        for name, t in tensors.items()
    }


def _records(path: Path, file: IO[bytes]) -> dict[int, int]:
    """Where the data of each record of an archive begins, and how long it is.

    Raises:
        NLAError: Records that are compressed or stand twice, or a pickle of more than tensors.
    """
    file.seek(-min(_ZIP_END_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
    if not file.read().startswith(_ZIP_END):
        raise NLAError(f"{path} is cut short, or no torch file; get it again")
    found: dict[int, int] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if len({info.filename for info in infos}) < len(infos):
                raise NLAError(f"{path} is refused: a record stands in it twice; get it again")
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise NLAError(
                        f"{path} is refused: {info.filename!r:.80} in it is compressed, which "
                        "torch.save does not do; save it again with torch.save"
                    )
                # The local header's extra field pads the data; the directory's does not say so.
                file.seek(info.header_offset + _LOCAL_HEADER - 4)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                start = info.header_offset + _LOCAL_HEADER + name + extra
                found[start] = info.file_size
                if info.filename.endswith(".pkl"):
                    file.seek(start)
                    _look_at(path, file, info.file_size)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        if isinstance(error, NLAError):
            raise
        raise NLAError(f"{path} is cut short, or no torch file ({error}); get it again") from error
    return found


def _look_through(path: Path, file: IO[bytes]) -> None:
    """Looks at the pickles that a file of torch before 1.6 begins with."""
    for _ in range(_LEGACY_PICKLES):
        _look_at(path, file, _LONGEST_PICKLE)


def _look_at(path: Path, file: IO[bytes], size: int) -> None:
    """Reads a pickle without running it.

    Raises:
        NLAError: It is too long, damaged, or names what no tensor is made of.
    """
    if size > _LONGEST_PICKLE:
        raise NLAError(f"{path} is refused: what describes its tensors has {size} bytes")
    try:
        for module, name in _named_in(file, size):
            if not _is_of_tensors(module, name):
                raise NLAError(
                    f"{path} is refused: reading it would run code of its own, or "
                    f"more than tensors are in it (it names {module}.{name}); get a file of "
                    "tensors alone"
                )
    except NLAError:
        raise
    # Whatever the parser raises on damaged bytes.
    except Exception as error:
        raise NLAError(
            f"{path} is cut short, or no torch file ({type(error).__name__}: {str(error)[:100]}); "
            "get it again"
        ) from error


def _named_in(file: IO[bytes], size: int) -> Iterator[tuple[str, str]]:
    """What a pickle names; leaves the file behind it."""
    start = file.tell()
    content = io.BytesIO(file.read(size))
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            # torch writes none of these, and its own reader knows none.
            yield opcode.name, str(argument)
    file.seek(start + content.tell())


def _is_of_tensors(module: str, name: str) -> bool:
    if name in _NAMED.get(module, ()):
        return True
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return is_dtype or (module in ("torch", "torch.cuda") and name.endswith("Storage"))


def _load_torch(path: Path, in_parts: bool) -> Any:
    try:
        # Files of torch before 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=in_parts)
    except OSError:
        raise
    # torch raises whatever the parser under it raised.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if type(error).__name__ == "UnpicklingError":
            what = "is refused: reading it would run code of its own, or it is damaged"
        else:
            what = f"is cut short, or no torch file ({type(error).__name__})"
        raise NLAError(f"{path} {what}; get a file of tensors alone ({reason})") from error


def _innermost(path: Path, found: Any) -> Mapping[str, Any]:
    """The dict of tensors in what was saved: itself, or under the name trainers give it.

    Raises:
        NLAError: There is none, or several.
    """
    for _ in range(4):
        if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
            raise NLAError(f"{path} holds a {type(found).__name__}, not a dict of tensors by name")
        if any(isinstance(value, Tensor) and value.ndim == 2 for value in found.values()):
            break
        inner = [name for name in NESTS if isinstance(found.get(name), Mapping)]
        inner = inner or [name for name, value in found.items() if isinstance(value, Mapping)]
        if len(inner) > 1:
            raise NLAError(
                f"{path} holds several dicts, {sorted(inner)[:8]}: save the one with the "
                "tensors by itself"
            )
        if not inner:
            break
        found = found[inner[0]]
    return found


def _check_extent(path: Path, name: str, t: Tensor, size: int) -> None:
    """Raises an NLAError on a tensor that is no plain one, or larger than its bytes."""
    if t.layout != torch.strided or t.is_quantized or t.device.type != "cpu" or t.is_nested:
        raise NLAError(f"{name} in {path} is no plain tensor ({t.layout}, {t.dtype})")
    stored = t.untyped_storage().nbytes()
    if stored > size or t.numel() * t.element_size() > stored:
        raise NLAError(
            f"{name} in {path} claims {t.numel()} entries of {t.dtype} (shape {list(t.shape)}), "
            "more than the file has bytes for"
        )


def _torch_offsets(
    path: Path, tensors: Mapping[str, Tensor], records: Mapping[int, int]
) -> dict[str, int]:
    """Where the bytes of each contiguous tensor begin in the archive.

    torch does not say it. The mapping begins at an address all tensors share, and each storage is
    a record of the archive: the one address that fits all of them is found, and then checked
    against the file's bytes.

    Raises:
        NLAError: A tensor reaches beyond its record.
    """
    addresses = {t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}
    if not records or not addresses:
        return {}
    first = min(addresses)
    bases = [first - s for s in records if {a - first + s for a in addresses} <= set(records)]
    if len(bases) != 1:
        return {}
    for name, t in tensors.items():
        start = t.untyped_storage().data_ptr() - bases[0]
        if t.numel() and t.untyped_storage().nbytes() > records[start]:
            raise NLAError(
                f"{name} in {path} claims {t.untyped_storage().nbytes()} bytes of a record of "
                f"{records[start]}"
            )
    found = {
        name: t.data_ptr() - bases[0]
        for name, t in tensors.items()
        if t.numel() and t.is_contiguous()
    }
    with path.open("rb") as file:
        return {name: at for name, at in found.items() if _is_at(file, at, tensors[name])}


def _is_at(file: Any, offset: int, tensor: Tensor) -> bool:
    head = tensor.reshape(-1)[:256].contiguous()
    file.seek(offset)
    return file.read(head.nbytes) == bytes(head.view(torch.uint8).tolist())
