"""Where a dictionary reads, from what its files call the place: TransformerLens' spelling, or None.

A place that is not written here is not known. It is never taken for the residual stream: a
dictionary of an attention's output decodes into another space, and its texts would be fluent.
"""

from __future__ import annotations

import re
from typing import Final

from nla_lens.stream.hook_point import ResidPost

_WRAPPERS: Final = r"(?:(?:base_model|model|transformer|gpt_neox|language_model|decoder)\.)*"
_MODULE: Final = re.compile(_WRAPPERS + r"(?:layers|h|blocks)[._](\d+)(?:\.(\w[\w.]*))?")
_PARTS: Final = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "attention": "hook_attn_out",
    "attn": "hook_attn_out",
    "self_attn": "hook_attn_out",
}
_EMBEDDING: Final = re.compile(_WRAPPERS + "(?:embed_tokens|embed_in|wte)")
_HF_POINT: Final = re.compile(r"(?:(?:model|language_model)\.)*layers\.(\d+)\.(\w[\w.]*)")
_HF_POINTS: Final = {
    "output": "hook_resid_post",
    "input": "hook_resid_pre",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
_SIDES: Final = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


def of_module(path: str) -> str | None:
    """Where a module's output is, by its path in a transformers model.

    >>> of_module("gpt_neox.layers.3")
    'blocks.3.hook_resid_post'
    >>> of_module("layers.3.attention.dense")
    """
    found = _MODULE.fullmatch(path)
    if found is None:
        return "hook_embed" if _EMBEDDING.fullmatch(path) else None
    part = _PARTS.get(found[2])
    return None if part is None else f"blocks.{found[1]}.{part}"


def of_hf_point(point: str) -> str:
    """Gemma Scope 2's spelling: a module and `.output` or `.input`; another point as it is."""
    found = _HF_POINT.fullmatch(point)
    part = _HF_POINTS.get(found[2]) if found else None
    return point if found is None or part is None else f"blocks.{found[1]}.{part}"


def of_name(name: str) -> ResidPost | None:
    """A place in the residual stream by any of these spellings; None where it is no such place.

    sae-lens calls the places of a transformers model by the module whose output it is.
    """
    module = of_module(name)
    return ResidPost.find(name) or ResidPost.find(module) or ResidPost.find(of_hf_point(name))


def of_side(side: str, block: object) -> str | None:
    """`resid_post` and the like of one block."""
    part = _SIDES.get(side)
    return None if part is None or block is None else f"blocks.{block}.{part}"
