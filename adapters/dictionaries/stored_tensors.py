"""Tensors in files, read in parts: ten rows of a dictionary cost ten rows, not the file.

Whole tensors are memory-mapped. Parts are read from the file itself: a mapping counts, and reads
ahead, whole pages, so that ten columns of a `[8192, 65536]` matrix would bring in most of it.

Files are never unpickled freely: `.pt` and `.pth` go through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nla_lens.errors import NLAError

_ELEMENTS_AT_ONCE: Final = 1 << 22
_LOCAL_HEADER: Final = 30
_LONGEST_HEADER: Final = 100 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: Its name in the file.
        path: The file.
        shape: Its shape.
        dtype: Its dtype in the file.
        mapped: The whole tensor; memory-mapped where the file allows it.
        offset: Where its bytes begin in the file; None where that is not known, or where they do
            not lie there in row-major order.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    mapped: Tensor
    offset: int | None

    def whole(self) -> Tensor:
        """All of it, in float32; a copy unless the file has that dtype already.

        Raises:
            NLAError: NaN or infinity.
        """
        self.scan()
        return self.mapped.float()

    def scan(self) -> None:
        """Looks through all of it, the first time it is asked for.

        Raises:
            NLAError: NaN or infinity.
        """
        # The property keeps its answer.
        _ = self._sound

    @cached_property
    def _sound(self) -> bool:
        n = self.mapped.numel()
        if self.offset is None:
            self.check_finite(self.mapped)
        else:
            for start in range(0, n, _ELEMENTS_AT_ONCE):
                self.check_finite(self._read([(start, min(_ELEMENTS_AT_ONCE, n - start))]))
        return True

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Entries along the first axis of a matrix, `[len(indices), shape[1]]` float32.

        Raises:
            NLAError: NaN or infinity.
        """
        width = self.shape[1]
        if self.offset is None:
            return self.check_finite(self.mapped[list(indices)]).float()
        spans = [(i * width, width) for i in indices]
        return self.check_finite(self._read(spans)).float().reshape(-1, width)

    def columns(self, indices: Sequence[int]) -> Tensor:
        """Entries along the second axis of a matrix, `[len(indices), shape[0]]` float32.

        They lie apart in the file: a column costs what its own entries are, or from a disk a page
        for each of them, 32 MB of 8,192.

        Raises:
            NLAError: NaN or infinity.
        """
        if self.offset is None:
            return self.check_finite(self.mapped[:, list(indices)]).float().T.contiguous()
        height, width = self.shape
        # Neighbouring columns are read together, once for each row of the matrix.
        ordered = sorted(set(indices))
        runs = [
            [i for _, i in run]
            for _, run in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
        ]
        spans = [(row * width + run[0], len(run)) for row in range(height) for run in runs]
        found = self.check_finite(self._read(spans)).float().reshape(height, len(ordered))
        at = {index: i for i, index in enumerate(ordered)}
        return found.T[[at[i] for i in indices]].contiguous()

    def check_finite(self, part: Tensor) -> Tensor:
        """The part itself.

        Raises:
            NLAError: NaN or infinity; names the tensor and the file.
        """
        # A sum is finite only if all are, and needs no mask; its overflow is looked into.
        if part.is_floating_point() and not part.sum(dtype=torch.float64).isfinite():
            bad = part[~part.isfinite()]
            if bad.numel():
                raise NLAError(
                    f"{self.name} in {self.path} holds {bad.flatten()[0].item()}: the file is "
                    "damaged; get it again"
                )
        return part

    def _read(self, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Runs of elements, given as (first, how many), one after the other."""
        size = self.dtype.itemsize
        held = bytearray(size * sum(count for _, count in spans))
        view, done = memoryview(held), 0
        # Unbuffered, so that four bytes do not bring in a buffer's worth.
        with self.path.open("rb", buffering=0) as file:
            for first, count in spans:
                file.seek((self.offset or 0) + first * size)
                part = view[done : done + count * size]
                while part:
                    got = file.readinto(part)
                    if not got:
                        raise NLAError(f"{self.path} ends in the middle of {self.name}")
                    part = part[got:]
                done += count * size
        return torch.frombuffer(held, dtype=self.dtype) if held else torch.empty(0)


def open_tensors(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a `.safetensors`, `.pt` or `.pth` file, by name.

    Raises:
        NLAError: Unreadable, cut short, or a pickle of anything but tensors.
    """
    read = _open_safetensors if path.suffix == ".safetensors" else _open_torch
    try:
        return read(path)
    except OSError as error:
        raise NLAError(f"{path} cannot be read: {error}") from error


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        cut = _cut_tensor(path)
        what = f"ends in the middle of {cut}" if cut else f"is no safetensors file ({error})"
        raise NLAError(f"{path} {what}; get it again") from error
    start, header = _safetensors_header(path)
    return {
        name: StoredTensor(
            name,
            path,
            tuple(tensor.shape),
            tensor.dtype,
            tensor,
            start + int(header[name]["data_offsets"][0]),
        )
        for name, tensor in mapped.items()
    }


def _safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and what the header says.

    Layout: eight bytes of length, little-endian; so many bytes of JSON; the data
    (huggingface.co/docs/safetensors).
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(min(length, _LONGEST_HEADER)))
    return 8 + length, header


def _cut_tensor(path: Path) -> str | None:
    """The first tensor whose data is not all there."""
    try:
        start, header = _safetensors_header(path)
        ends = {
            name: start + int(entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    size = path.stat().st_size
    return min((n for n in ends if ends[n] > size), key=ends.__getitem__, default=None)


def _open_torch(path: Path) -> dict[str, StoredTensor]:
    state = _load_torch(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise NLAError(f"{path} holds a {type(state).__name__}, not a dict of tensors by name")
    tensors = {name: t.detach() for name, t in state.items() if isinstance(t, Tensor)}
    offsets = _torch_offsets(path, tensors)
    return {
        name: StoredTensor(name, path, tuple(t.shape), t.dtype, t, offsets.get(name))
        for name, t in tensors.items()
    }


def _load_torch(path: Path) -> Any:
    # Files of torch before 1.6 are no zip archives and cannot be mapped.
    in_parts = zipfile.is_zipfile(path)
    try:
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


def _torch_offsets(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Where the bytes of each contiguous tensor begin in the archive.

    torch does not say it. The mapping begins at an address all tensors share, and each storage is
    a record of the archive: the one address that fits all of them is found, and then checked
    against the file's bytes.
    """
    starts = _record_starts(path)
    addresses = {t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}
    if not starts or not addresses:
        return {}
    first = min(addresses)
    bases = [first - s for s in starts if {a - first + s for a in addresses} <= set(starts)]
    if len(bases) != 1:
        return {}
    found = {
        name: t.data_ptr() - bases[0]
        for name, t in tensors.items()
        if t.numel() and t.is_contiguous()
    }
    with path.open("rb") as file:
        return {name: at for name, at in found.items() if _is_at(file, at, tensors[name])}


def _record_starts(path: Path) -> list[int]:
    """Where the data of each uncompressed record begins."""
    if not zipfile.is_zipfile(path):
        return []
    starts = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                continue
            # The local header's extra field pads the data; the directory's copy does not say so.
            file.seek(info.header_offset + _LOCAL_HEADER - 4)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            starts.append(info.header_offset + _LOCAL_HEADER + name + extra)
    return starts


def _is_at(file: Any, offset: int, tensor: Tensor) -> bool:
    head = tensor.reshape(-1)[:256].contiguous()
    file.seek(offset)
    return file.read(head.nbytes) == bytes(head.view(torch.uint8).tolist())
