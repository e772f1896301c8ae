"""The parts of a transformers model: its blocks, its final norm, its embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nla_lens.errors import NLAError

_PER_LAYER_LISTS = ("layer_types",)


def text_model(model: Any) -> Any:
    """The stack of decoder blocks inside a (causal, wrapped, multimodal) model.

    Raises:
        NLAError: No list of blocks is found.
    """
    for path in ("model.language_model", "language_model.model", "language_model", "model", ""):
        found: Any = model
        for name in filter(None, path.split(".")):
            found = getattr(found, name, None)
        if isinstance(getattr(found, "layers", None), nn.ModuleList):
            return found
    raise NLAError(f"no decoder blocks found in {type(model).__name__}: expected model.layers")


def remove_final_norm(model: Any) -> None:
    """Replaces the final norm by identity, so that the model puts out the residual stream.

    Raises:
        NLAError: The model has no final norm under the usual name.
    """
    stack = text_model(model)
    if not hasattr(stack, "norm"):
        raise NLAError(f"{type(stack).__name__} has no final norm named `norm`")
    stack.norm = nn.Identity()


def input_device(model: Any) -> torch.device:
    """Where token ids must be for the embedding."""
    embedding = model.get_input_embeddings()
    device: torch.device = next(embedding.parameters()).device
    return device


def truncate(config: Any, n_blocks: int, path: object = "the model") -> None:
    """Cuts a config to its first blocks, with the lists that have an entry per block.

    Raises:
        NLAError: The model has fewer blocks.
    """
    text = getattr(config, "text_config", None) or config
    if text.num_hidden_layers < n_blocks:
        raise NLAError(
            f"{path} has {text.num_hidden_layers} blocks; layer {n_blocks - 1} does not exist"
        )
    text.num_hidden_layers = n_blocks
    for name in _PER_LAYER_LISTS:
        per_layer = getattr(text, name, None)
        if isinstance(per_layer, list):
            setattr(text, name, per_layer[:n_blocks])
