"""Vectors in safetensors and npy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nla_lens.errors import NLAError, first_line
from nla_lens.jobs.corpus import File, Part
from nla_lens.jobs.memory import Rows, as_rows


def open_npy(path: Path) -> list[Part]:
    """The vectors of a file.

    Raises:
        NLAError: It cannot be read, or holds none.
    """
    file = File(path)
    try:
        # Mapped: only the rows that are explained are read.
        found = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NLAError(f"{path} cannot be read as npy: {first_line(error)}") from error
    return [Rows(as_rows(found, path), path.name, file)]


def open_safetensors(path: Path) -> list[Part]:
    """The same of all tensors in a file, by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = File(path)
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise NLAError(f"{path} cannot be read as safetensors: {first_line(error)}") from error
    if not found:
        raise NLAError(f"{path} holds no tensors")
    return [
        Rows(as_rows(found[name], f"{path}: {name}"), f"{path.name}:{name}", file)
        for name in sorted(found)
    ]
