"""Opens files of tensors that strangers made: what they claim is held against what is there first.

Nothing that is not in the file is allocated, and nothing in it is run; `torch_files` says how.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.adapters.dictionaries.torch_files import NESTS, open_torch
from nla_lens.errors import NLAError

_LONGEST_HEADER: Final = 16 << 20
_MOST_SHARDS: Final = 1000
_WRAPPERS: Final = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile and the parallel wrappers put into the names."""


def open_tensors(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a `.safetensors`, `.pt` or `.pth` file, by name, without wrappers' prefixes.

    Raises:
        NLAError: Unreadable, cut short, more than it has bytes for, or a pickle of anything but
            tensors.
    """
    read = _open_safetensors if path.suffix == ".safetensors" else open_torch
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise NLAError(f"{path} cannot be read: it is no regular file")
        found = read(path)
    except OSError as error:
        raise NLAError(f"{path} cannot be read: {error}") from error
    names = plain_names(list(found))
    if len(set(names.values())) < len(names):
        raise NLAError(f"{path} has tensors twice, with and without a prefix: {sorted(found)[:8]}")
    return {names[name]: tensor for name, tensor in found.items()}


def open_shards(path: Path, index: Mapping[str, Any]) -> Mapping[str, StoredTensor]:
    """The tensors of several safetensors files, from the index beside them.

    Args:
        path: The index.
        index: What is in it.

    Raises:
        NLAError: It names a file that is not beside it, or a tensor that is not there.
    """
    where = shard_names(path, index)
    opened = {file: open_tensors(path.parent / file) for file in sorted(set(where.values()))}
    found: dict[str, StoredTensor] = {}
    for file, tensors in opened.items():
        if twice := sorted(set(found) & set(tensors)):
            raise NLAError(f"{path.parent} has {twice[0]!r:.80} in two files, {file} among them")
        found |= tensors
    if missing := sorted(set(plain_names(list(where)).values()) - set(found)):
        raise NLAError(f"{path} promises {missing[0]!r:.80}, which is in none of its files")
    return found


def shard_names(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The file that each tensor is in, as an index says it.

    Raises:
        NLAError: It says none, or files elsewhere.
    """
    where = index.get("weight_map")
    if not isinstance(where, Mapping) or not where:
        raise NLAError(f"{path} has no weight_map of tensors and files")
    for file in where.values():
        plain = isinstance(file, str) and file.endswith(".safetensors")
        if not plain or any(part in file for part in ("/", "\\", "\0")):
            raise NLAError(f"{path} names {file!r:.80}; a safetensors file beside it is expected")
    if len(set(where.values())) > _MOST_SHARDS:
        raise NLAError(f"{path} names more than {_MOST_SHARDS} files")
    return dict(where)


def plain_names(names: list[str]) -> dict[str, str]:
    """Names without what compiling, parallel wrappers and an outer module put in front.

    >>> plain_names(["_orig_mod.encoder.weight", "_orig_mod.b_dec"])["_orig_mod.b_dec"]
    'b_dec'
    """
    parts = {name: [p for p in name.split(".") if p not in _WRAPPERS] for name in names}
    while len({p[0] for p in parts.values() if p}) == 1:
        first = next(p[0] for p in parts.values() if p)
        if first not in NESTS or not all(len(p) > 1 for p in parts.values()):
            break
        parts = {name: p[1:] for name, p in parts.items()}
    return {name: ".".join(p) or name for name, p in parts.items()}


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    start, header = _safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        cut = _cut_tensor(path, start, header)
        what = f"ends in the middle of {cut}" if cut else f"is no safetensors file ({error})"
        raise NLAError(f"{path} {what}; get it again") from error
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

    Raises:
        NLAError: Too long, cut short, or no object with each name once.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise NLAError(
                f"{path} is no safetensors file: its header would have {length} bytes; get it again"
            )
        said = file.read(length)
    try:
        header = json.loads(said, object_pairs_hook=_each_once)
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__}")
    except (ValueError, RecursionError) as error:
        raise NLAError(
            f"{path} is no safetensors file, or cut short: its header cannot be read "
            f"({str(error)[:200]}); get it again"
        ) from error
    return 8 + length, header


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _cut_tensor(path: Path, start: int, header: Mapping[str, Any]) -> str | None:
    """The first tensor whose data is not all there."""
    try:
        ends = {
            name: start + int(entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        return None
    size = path.stat().st_size
    return min((n for n in ends if ends[n] > size), key=ends.__getitem__, default=None)
