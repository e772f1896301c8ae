"""A model's small files, looked at before transformers and peft read them.

transformers takes a damaged generation_config.json for none, follows an index of weights out of the
directory, and builds whatever size a config names before it looks for the weights. So each file is
read here first, and its numbers are held against the sizes of the files that must hold them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from nla_lens.checks import is_int, is_number
from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError
from nla_lens.models.weight_files import check_weight_files

INDEX_NAME: Final = "model.safetensors.index.json"
_MOST_INDEX_BYTES: Final = 64 << 20
_MOST_BLOCKS: Final = 4096
_MOST_ENTRIES: Final = 1 << 38
"""Of a table of weights, where there is no file to hold it against."""
_ENTRIES_A_BYTE: Final = 8
"""Four bits an entry, and as much again for what is not counted right."""
_SLACK: Final = 4 << 20
_LENGTHS: Final = ("_size", "_dim", "_rank", "_heads", "_layers", "experts", "_channels")
_NAMES: Final = ("d_model", "d_ff", "n_embd", "n_head", "n_layer", "n_inner", "ffn_dim", "n_heads")
_INTEGERS: Final = ("max_position_embeddings", "sliding_window", "max_window_layers")
_POSITIVE: Final = ("hidden_size", "num_attention_heads", "n_embd", "n_head", "n_heads", "d_model")
_NO_LENGTHS: Final = ("image_size", "chunk_size", "patch_size", "kernel_size")


def find_small_file(path: str | Path, name: str) -> Path | None:
    """A file of a checkpoint's directory or hub repository; None where it has none.

    What is there but is no file is found, too, and refused by whoever reads it.
    """
    if os.path.isdir(path):
        found = Path(path) / name
        return found if os.path.lexists(found) else None
    from transformers.utils import cached_file

    # Not there, or no network: transformers says so in a moment.
    cached = cached_file(
        str(path),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if cached is None else Path(cached)


def check_regular(path: str | Path) -> None:
    """Looks at what a directory's names stand for: transformers opens each that it knows.

    Raises:
        NLAError: A pipe, which would be waited for, a socket or a device.
    """
    if not os.path.isdir(path):
        return
    with os.scandir(path) as entries:
        for entry in entries:
            # What a link points to may be missing: whoever needs it says so.
            with contextlib.suppress(OSError):
                mode = entry.stat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise NLAError(f"{entry.path} cannot be read: it is no regular file")


def check_config(path: str | Path) -> None:
    """Looks at config.json, and at the index of weights where there is one.

    Raises:
        NLAError: Damaged, numbers that the weights cannot have, or weights outside the directory.
    """
    found = find_small_file(path, "config.json")
    if found is None:
        return
    config = read_json(found)
    is_here = os.path.isdir(path)
    check_integers(config, found)
    check_sizes(config, found, _bytes_of_weights(Path(path)) if is_here else None)
    # transformers 5 reads weights from where this says.
    named = config.get("transformers_weights")
    if named is not None:
        _check_beside(named, found, "transformers_weights", (".safetensors", ".index.json"))
    files = {"model.safetensors"}
    for index in {INDEX_NAME, named or INDEX_NAME}:
        if is_here and index.endswith(".json") and os.path.lexists(Path(path) / index):
            shards = read_index(Path(path) / index)
            if not os.path.isfile(Path(path) / "model.safetensors"):
                files |= set(shards.values())
    if is_here:
        check_weight_files([Path(path) / name for name in sorted(files)], config)


def check_generation_config(path: str | Path) -> None:
    """Looks at generation_config.json: where it is damaged, answers would end elsewhere.

    Raises:
        NLAError: Damaged, or its end-of-sequence is no token ids.
    """
    found = find_small_file(path, "generation_config.json")
    if found is None:
        return
    ends = read_json(found).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(is_int(end) and end >= 0 for end in listed):
        raise NLAError(f"{found}: eos_token_id is {ends!r:.80}; expected token ids")


def read_index(path: Path) -> dict[str, str]:
    """Which file holds which weight, from an index beside the files.

    Raises:
        NLAError: Damaged, or a file that is not beside it.
    """
    files = read_json(path, most_bytes=_MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(files, Mapping):
        raise NLAError(f"{path} is no index of weights: it has no weight_map")
    for key, file in files.items():
        _check_beside(file, path, key, (".safetensors",))
    return dict(files)


def _check_beside(file: Any, path: Path, key: str, endings: tuple[str, ...]) -> None:
    plain = isinstance(file, str) and "/" not in file and "\\" not in file and "\0" not in file
    if not plain or not file.endswith(endings):
        raise NLAError(f"{path} says that {key} is in {file!r:.80}; expected a file beside it")


def check_sizes(config: Mapping[str, Any], path: Path, n_bytes: int | None) -> None:
    """Refuses numbers of a config that its weights cannot have.

    Args:
        config: The parsed config.json.
        path: The file, for messages.
        n_bytes: Size of the weights; None where they are elsewhere.

    Raises:
        NLAError: Names the number.
    """
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    width = _first(text, "hidden_size", "n_embd", "d_model") or 1
    n_blocks = _first(text, "num_hidden_layers", "n_layer", "num_layers") or 1
    most = _MOST_ENTRIES if not n_bytes else _ENTRIES_A_BYTE * n_bytes + _SLACK
    if n_blocks > _MOST_BLOCKS:
        raise NLAError(f"{path} names {n_blocks} blocks; at most {_MOST_BLOCKS} are loaded")
    for name, value in _lengths(config):
        if value * width > most:
            raise NLAError(f"{path}: {name} is {value}, which its weights are too small for")
    heads = _first(text, "num_attention_heads", "n_head", "n_heads") or 1
    a_head = _first(text, "head_dim") or width // heads or 1
    inner = _first(text, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or width
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    if experts is not None:
        inner = experts * (_first(text, "moe_intermediate_size") or inner)
    a_block = heads * a_head + inner
    if n_blocks * width * a_block > most:
        raise NLAError(
            f"{path} names {n_blocks} blocks of width {width}, which its weights are too small for"
        )


def check_integers(config: Mapping[str, Any], path: Path) -> None:
    """Refuses what is no integer, or no number of heads: some are read only while a model runs.

    Raises:
        NLAError: Names the key and the value.
    """
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        for name, value in part.items():
            if isinstance(value, str) and (_is_length(name) or name in _INTEGERS):
                raise NLAError(f"{path}: {name} is {value!r:.80}; expected an integer")
            if name in _POSITIVE and is_int(value) and value <= 0:
                raise NLAError(f"{path}: {name} is {value}; expected a positive integer")


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value: Any = config.get(name)
        if is_int(value) and value > 0:
            return int(value)
    return None


def _lengths(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers that tables of weights are made of, by name."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif is_int(value) and _is_length(name):
            yield name, int(value)


def _is_length(name: str) -> bool:
    return (name.endswith(_LENGTHS) or name in _NAMES) and name not in _NO_LENGTHS


def _bytes_of_weights(directory: Path) -> int:
    sizes = [p.stat().st_size for p in directory.glob("*.safetensors") if p.is_file()]
    return sum(sizes)


def check_tokenizer_config(path: str | Path) -> dict[str, Any]:
    """Looks at tokenizer_config.json.

    Returns:
        What stands in it; nothing where there is none.

    Raises:
        NLAError: Damaged, or a length that is no number.
    """
    found = find_small_file(path, "tokenizer_config.json")
    if found is None:
        return {}
    config = read_json(found)
    longest = config.get("model_max_length")
    if longest is not None and not (is_number(longest) and longest > 0):
        raise NLAError(f"{found}: model_max_length is {longest!r:.80}; expected a number of tokens")
    return config
