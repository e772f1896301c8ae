"""A residual stream changed on its way: while it lasts, a model's block K gives something else.

Steering and splicing are built on this. Each framework's adapter does it by its own hooks; a plain
transformers model by a forward hook.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, input_device
from nla_lens.stream.frameworks import find_adapter
from nla_lens.stream.hook_point import ResidPost

Edit: TypeAlias = Callable[[Tensor], Tensor]
"""`[B, T, d]` to `[B, T, d]`, of the same dtype and device."""


def patched(model: Any, place: ResidPost, edit: Edit) -> contextlib.AbstractContextManager[None]:
    """While it lasts, what block K gives goes through `edit`; in this thread's passes alone.

    Args:
        model: A transformers model, a TransformerBridge, HookedTransformer or nnsight model.
        place: Where.
        edit: What is done.

    Raises:
        NLAError: No such block, or no adapter that can do it.
    """
    adapter = find_adapter(model)
    own = getattr(adapter, "patched", None)
    if own is not None:
        done: contextlib.AbstractContextManager[None] = own(model, place, edit)
        return done
    if isinstance(model, nn.Module):
        return patched_module(block(model, place), edit)
    raise NLAError(f"the residual stream of a {type(model).__name__} cannot be changed from here")


def block(model: Any, place: ResidPost) -> nn.Module:
    """The block of a transformers model whose output is a place.

    Raises:
        NLAError: No such block.
    """
    layers = blocks_of(model)
    if not 0 <= place.layer < len(layers):
        raise NLAError(f"layer {place.layer} does not exist: the model has {len(layers)} blocks")
    found: nn.Module = layers[place.layer]
    return found


@contextlib.contextmanager
def patched_module(module: nn.Module, edit: Edit) -> Iterator[None]:
    """The same for a torch module that is a block."""
    mine = threading.get_ident()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != mine:
            return None
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logits(model: Any, ids_BT: Tensor, place: ResidPost, edit: Edit | None) -> Tensor:
    """`[B, T, V]` of token ids padded on the right, the stream at `place` edited on the way."""
    held = contextlib.nullcontext() if edit is None else patched(model, place, edit)
    with held:
        module = model if isinstance(model, nn.Module) else model._module
        out = module(ids_BT.to(input_device(module)))
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found
