"""Weights in files, held against one another and against the model that was made of them.

transformers takes one of two tensors of a name, casts what is quantized as if it were numbers, and
leaves out what it has no place for: each of these gives a model that writes fluent text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of

_FLOATS: Final = {"F64", "F32", "F16", "BF16"}
_IN_A_BLOCK: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.(.*(?:weight|bias))$")
# Towers of other senses, heads for further tokens, and buffers that old versions saved.
_ELSEWHERE: Final = re.compile(
    r"vision|visual|image|audio|speech|talker|mtp|encoder|rotary|inv_freq|masked_bias|(?:attn|attention)\.bias$"
)


def check_weight_files(paths: Iterable[Path], config: Mapping[str, Any]) -> None:
    """Looks at the headers of a checkpoint's weights; what is damaged is left to whoever loads it.

    Args:
        paths: The files.
        config: The parsed config.json.

    Raises:
        NLAError: A weight is in two files, or is quantized and no config says how.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Path] = {}
    has_scales = bool(config.get("quantization_config") or config.get("compression_config"))
    for path in paths:
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                if key in found:
                    raise NLAError(
                        f"{key:.200} is in {found[key]} and in {path.name}: which of the two is "
                        "meant is not known; keep one"
                    )
                found[key] = path
                dtype = file.get_slice(key).get_dtype()
                if key.endswith("weight") and dtype not in _FLOATS and not has_scales:
                    raise NLAError(
                        f"{key:.200} in {path} is {dtype}, and config.json has no "
                        "quantization_config that says what it stands for; get the weights it was "
                        "made of, or its whole config"
                    )


def check_unused(path: str | Path, model: Any, unused: Iterable[str], *, whole: bool) -> None:
    """Refuses weights of the blocks that the model has no place for: it computes something else.

    Args:
        path: The checkpoint, for messages.
        model: What was loaded of it.
        unused: Names that were in its files, and are not in the model.
        whole: It is to have all its blocks: one that is as they are, behind the last, is missed.

    Raises:
        NLAError: Names the first.
    """
    if getattr(model, "is_quantized", False):
        # Scales, which each method keeps in its own places.
        return
    blocks = blocks_of(model)
    by_block: dict[int, list[str]] = {}
    for name in sorted(unused):
        block = _IN_A_BLOCK.search(name)
        if block and not _ELSEWHERE.search(name):
            by_block.setdefault(int(block[1]), []).append(name)
    found = [name for i, names in sorted(by_block.items()) if i < len(blocks) for name in names]
    if whole and _is_one_more(by_block.get(len(blocks), []), blocks):
        found += by_block[len(blocks)]
    if found:
        raise NLAError(
            f"{path}: the weights do not fit config.json; {type(model).__name__} has no place for "
            f"{found[:5]}: it would compute something else than was trained"
        )


def _is_one_more(names: Sequence[str], blocks: Any) -> bool:
    """Whether names are those of a block like the others; one for further tokens has more."""
    known = {frozenset(name for name, _ in block.named_parameters()) for block in blocks}
    there = [_IN_A_BLOCK.search(name) for name in names]
    return frozenset(block[2] for block in there if block) in known
