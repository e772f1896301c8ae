"""The parts of a transformers model: its blocks, its final norm, its embedding.

Families name and nest these differently, so the blocks are found by what they are: the one list of
as many decoder blocks as the config says, in the part that reads token ids.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from nla_lens.errors import NLAError
from nla_lens.models.wrappers import is_transformers, unwrapped

_FINAL_NORMS: Final = (
    *("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f"),
    *("layer_norm", "embedding_norm", "out_norm", "ln_out"),
)
"""What families call the norm behind their last block (LFM2's is `embedding_norm`)."""
_found: weakref.WeakKeyDictionary[Any, tuple[Any, Any, str]] = weakref.WeakKeyDictionary()
"""For a model its stack, whose module has the list of blocks and under which name."""


def text_model(model: Any) -> Any:
    """The transformers model that holds the decoder blocks and reads token ids.

    Args:
        model: A (causal, wrapped, multimodal) model, or something of the user's around it.

    Raises:
        NLAError: No such part; names the class.
    """
    return _parts(model)[0]


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks, in order.

    Raises:
        NLAError: As `text_model`.
    """
    _, owner, name = _parts(model)
    blocks: nn.ModuleList = getattr(owner, name)
    return blocks


def block_index(model: Any, path: str) -> int:
    """Index of the block that a weight or module belongs to, by its path; -1 for none."""
    found = re.search(rf"\.{_parts(model)[2]}\.(\d+)\.", path)
    return -1 if found is None else int(found[1])


def width_of(model: Any) -> int:
    """d_model, the width of the residual stream."""
    return int(text_model(model).config.hidden_size)


def embedding_of(model: Any) -> nn.Module:
    """The token embedding."""
    embedding: nn.Module = text_model(model).get_input_embeddings()
    return embedding


def table_rows(model: Any) -> int:
    """How many tokens the token embedding knows."""
    embedding: Any = embedding_of(model)
    # Of a quantized table the weight may have another shape.
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def _parts(model: Any) -> tuple[Any, Any, str]:
    # Looked up again on each pass, so it is kept; the list itself is not: somebody may replace it.
    kept = _found.get(model) if isinstance(model, nn.Module) else None
    if kept is not None:
        stack, owner, name = (kept[0](), kept[1](), kept[2])
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return stack, owner, name
    stack, owner, name = _search(unwrapped(model))
    _found[model] = weakref.ref(stack), weakref.ref(owner), name
    return stack, owner, name


def _search(model: Any) -> tuple[Any, Any, str]:
    lists = list(_lists_of_text(model, None))
    # Parts of a wrapper that read images or sounds may look alike, but for their config.
    kind = text_config(model.config).model_type
    lists = [found for found in lists if found[0].config.model_type == kind] or lists
    right_length = [found for found in lists if len(found[1]) == _n_blocks(found[0])]
    by_class = [found for found in lists if all(map(_is_block, found[1]))]
    both = [found for found in right_length if found in by_class]
    for candidates in (both, right_length, by_class):
        if len(candidates) == 1:
            stack, _, owner, name = candidates[0]
            _refuse_encoders(model, stack)
            return stack, owner, name
    _refuse_encoders(model, model)
    raise NLAError(
        f"no decoder blocks found in {type(model).__name__}: a source, an AV and an AR need a "
        "decoder-only transformers model with one list of blocks"
    )


def _lists_of_text(module: nn.Module, stack: Any) -> Iterator[tuple[Any, nn.ModuleList, Any, str]]:
    """Lists of modules in the parts that read token ids; lists inside of lists are left out."""
    if is_transformers(module):
        if not _reads_tokens(module) and stack is not None:
            return
        stack = module
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            if stack is not None and _reads_tokens(stack) and len(child):
                yield stack, child, module, name
        else:
            yield from _lists_of_text(child, stack)


def _reads_tokens(model: Any) -> bool:
    # Of a wrapper around several parts this may be an image.
    return model.main_input_name in ("input_ids", "inputs_embeds")


def _n_blocks(stack: Any) -> int | None:
    return getattr(text_config(stack.config), "num_hidden_layers", None)


def _is_block(module: nn.Module) -> bool:
    """Whether transformers takes a module for a block: one that can be checkpointed as a whole."""
    module = getattr(module, "_orig_mod", module)
    names = {base.__name__ for base in type(module).__mro__}
    return "GradientCheckpointingLayer" in names or any(
        name.endswith(("DecoderLayer", "Block")) for name in names
    )


def text_config(config: Any) -> Any:
    """The decoder's part of a config, which wrappers nest."""
    nested = getattr(config, "text_config", None)
    return config if nested is None else nested


def _refuse_encoders(model: Any, stack: Any) -> None:
    """Refuses models whose tokens see those after them, or an encoder.

    Raises:
        NLAError: Names the class.
    """
    config, name = stack.config, type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise NLAError(
            f"{name} is an encoder-decoder model; residual streams are read from, and NLAs made "
            "of, decoder-only models"
        )
    looks_ahead = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if looks_ahead or getattr(config, "is_causal", True) is False or _is_masked_lm(config):
        raise NLAError(
            f"{name} is an encoder: its tokens see those after them. Residual streams are read "
            "from, and NLAs made of, decoder-only models"
        )


def _is_masked_lm(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return encoder and not getattr(config, "is_decoder", False)


def final_norm_name(model: Any) -> str | None:
    """Under which name the stack has its final norm; None where it has none."""
    stack = text_model(model)
    return next(
        (name for name in _FINAL_NORMS if isinstance(getattr(stack, name, None), nn.Module)), None
    )


def remove_final_norm(model: Any) -> None:
    """Replaces the final norm by identity, so that the model puts out the residual stream."""
    name = final_norm_name(model)
    if name is not None:
        setattr(text_model(model), name, nn.Identity())


def input_device(model: Any) -> torch.device:
    """Where token ids must be for the embedding, offloaded models included.

    Raises:
        NLAError: The weights are nowhere: the model is on `meta`.
    """
    embedding = embedding_of(model)
    device: torch.device = next(embedding.parameters()).device
    if device.type != "meta":
        return device
    for module in (embedding, *embedding.modules(), *model.modules()):
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            execution_device = getattr(one, "execution_device", None)
            if execution_device is not None:
                return torch.empty(0, device=execution_device).device
    raise NLAError(
        f"the weights of this {type(model).__name__} are on the meta device, that is, not loaded; "
        "load the model without torch.device('meta')"
    )
