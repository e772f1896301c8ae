"""Tensors in files, read in parts: ten rows of a dictionary cost ten rows, not the file.

Whole tensors are memory-mapped. Parts are read from the file itself: a mapping counts, and reads
ahead, whole pages, so that ten columns of a `[8192, 65536]` matrix would bring in most of it.

How files are opened is in `tensor_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from nla_lens.errors import NLAError

_ELEMENTS_AT_ONCE: Final = 1 << 22


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
        # What is computed with: float64 holds more than fits.
        single = part.float() if part.dtype == torch.float64 else part
        # A sum is finite only if all are, and needs no mask; its overflow is looked into.
        if part.is_floating_point() and not single.sum(dtype=torch.float64).isfinite():
            bad = part[~single.isfinite()]
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
