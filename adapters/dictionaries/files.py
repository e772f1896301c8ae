"""A dictionary's files, and how tensors of any naming and orientation become a `Dictionary`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.adapters.dictionaries.dictionary import (
    FLOATS,
    Dictionary,
    DictionaryConfig,
    Matrix,
)
from nla_lens.adapters.dictionaries.locate import INDEX
from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.adapters.dictionaries.tensor_files import open_shards, open_tensors
from nla_lens.checks import is_int, naming
from nla_lens.disk import reading
from nla_lens.errors import NLAError

_MATHS: Final = re.compile(
    r"^[Ww]_|^b_|weight|bias|norm|scal|mean|std|gate|skip|mag|thresh|rotat|proj|affine|shift|offset"
    r"|whiten|cent(er|re)"
)
"""Stems of what vectors are multiplied with, moved by or compared with."""
_ELSEWHERE: Final = re.compile(r"last|count|fire|sparsity|dead|freq|grad|ema_|_ema|step")
_FACTOR: Final = re.compile(r"scal|norm|std")


class UnsupportedDictionaryError(NLAError):
    """A dictionary of a known format that does something this package does not do."""


@dataclass(frozen=True)
class Files:
    """A dictionary's files.

    Attributes:
        folder: Where they are.
        name: What the caller or the hub calls it; layers are named in it.
        weights: The file with the tensors, or the index of several.
        config: The parsed JSON beside it; empty where there is none.
    """

    folder: Path
    name: str
    weights: Path
    config: Mapping[str, Any]

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The tensors by name."""
        if self.weights.name.endswith(INDEX):
            return open_shards(self.weights, read_json(self.weights))
        return open_tensors(self.weights)


def build(
    files: Files,
    tensors: Mapping[str, StoredTensor],
    *,
    enc: tuple[str, bool],
    dec: tuple[str, bool],
    vectors: Mapping[str, str],
    latents_by: str = "b_enc",
    d_in: Any = None,
    d_sae: Any = None,
    constants: Mapping[str, float] = MappingProxyType({}),
    beside: Collection[str] = (),
    **cfg: Any,
) -> Dictionary:
    """Puts a dictionary together; orientation is told by the biases, never by which side is longer.

    Args:
        files: Its files.
        tensors: Its tensors by name.
        enc: Name of the encoder matrix, and whether its format has latents first.
        dec: The same for the decoder.
        vectors: Names of the one-dimensional tensors by SAELens name.
        latents_by: The SAELens name of the one that has an entry per latent.
        d_in: Width as the config says it, where it does.
        d_sae: Number of latents as the config says it, where it does.
        constants: One-dimensional parameters that are one number, from the config.
        beside: Names of tensors that the format has and that change nothing here.
        **cfg: Further fields of `DictionaryConfig`.

    Raises:
        NLAError: A tensor is missing, has another shape, or is one too many; see `_check_more`.
    """
    _check_more(files, tensors, {enc[0], dec[0], *vectors.values(), *beside})
    width = _length(files, tensors, vectors["b_dec"]) if d_in is None else d_in
    n_latents = _length(files, tensors, vectors[latents_by]) if d_sae is None else d_sae
    if not (is_int(width) and is_int(n_latents) and width > 0 and n_latents > 0):
        raise NLAError(
            f"{files.folder} has d_in={words(width)} and d_sae={words(n_latents)} in its config; "
            "expected positive integers"
        )
    found: dict[str, Tensor] = {}
    for name, stored_name in vectors.items():
        stored = only(files, tensors, stored_name)
        length = width if name == "b_dec" else n_latents
        # BatchTopK keeps one threshold for all latents.
        if name == "threshold" and stored.shape in ((), (1,)):
            found[name] = stored.whole().reshape(()).expand(length)
            continue
        if stored.shape != (length,):
            raise NLAError(
                f"{stored_name} in {stored.path} has shape {list(stored.shape)}, expected "
                f"[{length}] for {n_latents} latents of width {width}"
            )
        found[name] = stored.whole()
    # After the rest, which says that there are so many.
    found |= {name: torch.tensor(value).expand(n_latents) for name, value in constants.items()}
    if not found.get("r_mag", torch.zeros(1)).exp().isfinite().all():
        raise NLAError(
            f"{vectors['r_mag']} in {files.weights} reaches {float(found['r_mag'].max()):g}, whose "
            "exponential float32 does not hold: the file is damaged; get it again"
        )
    with naming(files.folder):
        config = DictionaryConfig(d_in=width, d_sae=n_latents, **cfg)
    return Dictionary(
        config,
        Matrix(only(files, tensors, enc[0]), enc[1]),
        Matrix(only(files, tensors, dec[0]), dec[1]),
        found,
    )


def only(files: Files, tensors: Mapping[str, StoredTensor], name: str) -> StoredTensor:
    """One tensor, floating point and with as many axes as its name says.

    Raises:
        NLAError: It is missing, or something else.
    """
    if name not in tensors:
        raise NLAError(
            f"{files.weights} has no {name}; found {words(*sorted(tensors)[:8]) or 'nothing'}"
        )
    tensor = tensors[name]
    if tensor.dtype not in FLOATS:
        raise NLAError(
            f"{name} in {files.weights} is {tensor.dtype}, expected one of "
            f"{', '.join(map(str, FLOATS))}: what is quantized has scales elsewhere"
        )
    is_matrix = name.endswith(("weight", "enc", "dec")) and not name.startswith("b_")
    expected = 2 if is_matrix else 1
    if len(tensor.shape) != expected and not (expected == 1 and not tensor.shape):
        raise NLAError(
            f"{name} in {files.weights} has shape {list(tensor.shape)}, expected {expected} axes"
        )
    return tensor


def _check_more(files: Files, tensors: Mapping[str, StoredTensor], known: Collection[str]) -> None:
    """Refuses tensors that would change what is computed, and that nothing here computes with.

    Counters and statistics of training lie beside the parameters of many dictionaries; scales of
    one and shifts of zero do nothing.

    Raises:
        NLAError: Names the first.
    """
    for name in sorted(set(tensors) - set(known)):
        if not _MATHS.search(name) or _ELSEWHERE.search(name):
            continue
        stored = tensors[name]
        neutral = 1 if _FACTOR.search(name) else 0
        if len(stored.shape) > 1 or not bool(stored.mapped.eq(neutral).all()):
            raise NLAError(
                f"{files.weights} has {words(name)}, which would change what is computed, and is "
                "not known in its format; load it by its own code, and pass the object"
            )


def flag(files: Files, key: str, usual: bool) -> bool:
    """A truth value of the config; what is not said, or null, is as usual.

    Raises:
        NLAError: Something else: a text, even "false", would count as true.
    """
    value = files.config.get(key)
    if value is None:
        return usual
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise NLAError(f"{files.folder} has {key}={words(value)} in its config; expected true or false")


def _length(files: Files, tensors: Mapping[str, StoredTensor], name: str) -> int:
    shape = only(files, tensors, name).shape
    return shape[0] if shape else 0


def words(*values: Any) -> str:
    """Values of a config for a message: short, and without what steers a terminal."""
    return ", ".join(f"{value!r:.80}" for value in values)


def find_block(files: Files, pattern: str) -> int | None:
    """The block that a file's or folder's name speaks of; the pattern's one group."""
    found = find_name(files, pattern)
    return None if found is None else int(found[1])


def find_name(files: Files, pattern: str) -> re.Match[str] | None:
    """What the name of the file, of its folder, or the one that was given says."""
    for text in (files.weights.name, files.folder.name, files.name):
        match = re.search(pattern, text)
        if match:
            return match
    return None


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        NLAError: Unreadable, or no object.
    """
    return reading.read_json(path) if path.exists() else {}
