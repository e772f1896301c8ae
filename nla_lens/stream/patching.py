"""A residual stream changed on its way: while it lasts, a model's block K gives something else.

Steering and splicing are built on this. Each framework's adapter does it by its own hooks, and says
which passes go by; a plain transformers model has forward hooks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, input_device, text_model
from nla_lens.models.cache_keyword import cache_among
from nla_lens.stream.frameworks import find_adapter
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.origin import where_of_pass
from nla_lens.stream.residual import ResidualTensor

Edit: TypeAlias = Callable[[Tensor], Tensor]
"""`[B, T, d]` to `[B, T, d]`, of the same dtype and device."""


class Watcher(Protocol):
    """Who wants to know of a thread's passes."""

    def begin(self, where_BT3: Tensor | None, n_past: int) -> None:
        """A pass is about to run.

        Args:
            where_BT3: Its rows, positions and tokens; None where they are not known.
            n_past: How many tokens of each row are in a cache.
        """
        ...

    def end(self) -> None:
        """It is over, or failed."""
        ...


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

    def hook(called: nn.Module, args: Any, output: Any) -> Any:
        # A copy of the model, made meanwhile, keeps the hook.
        if called is not module or threading.get_ident() != mine:
            return None
        return edited(output, edit)

    # First of all hooks, so that whoever records the block's output records what goes on.
    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def edited(output: Any, edit: Edit) -> Any:
    """What a block gives, a tuple that begins with the residual stream or that alone, edited."""
    if isinstance(output, tuple):
        return (edited(output[0], edit), *output[1:])
    return edit(output.as_ordinary() if isinstance(output, ResidualTensor) else output)


def watched(
    model: Any, place: ResidPost, watcher: Watcher
) -> contextlib.AbstractContextManager[None]:
    """While it lasts, a watcher is told of this thread's passes before they come to `place`.

    Args:
        model: As in `patched`.
        place: Where the watcher acts.
        watcher: Is told.
    """
    own = getattr(find_adapter(model), "watched", None)
    if own is not None:
        done: contextlib.AbstractContextManager[None] = own(model, place, watcher)
        return done
    return watched_stack(text_model(model), watcher)


@contextlib.contextmanager
def watched_stack(stack: nn.Module, watcher: Watcher) -> Iterator[None]:
    """The same for the transformers model that holds the blocks."""
    mine = threading.get_ident()

    def begin(called: nn.Module, args: Any, kwargs: Any = None) -> None:
        # Without keywords: another thread's, begun while torch had noted the hook, not its kind.
        if kwargs is not None and called is stack and threading.get_ident() == mine:
            where_BT3, n_past = _known_of_pass(args, kwargs)
            watcher.begin(where_BT3, n_past)

    def end(called: nn.Module, args: Any, output: Any) -> None:
        if called is stack and threading.get_ident() == mine:
            watcher.end()

    handles = [
        stack.register_forward_pre_hook(begin, with_kwargs=True),
        # Also where the pass fails, so that it is over.
        stack.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _known_of_pass(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, int]:
    """Rows, positions and tokens of a pass of a transformers model, and how long its cache is."""
    where_BT3 = where_of_pass(args, kwargs)
    if where_BT3 is None:
        return None, 0
    length = getattr(cache_among(kwargs), "get_seq_length", None)
    if length is not None:
        return where_BT3, int(length())
    mask_BS = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    known = isinstance(mask_BS, Tensor) and mask_BS.ndim == 2
    return where_BT3, mask_BS.shape[1] - where_BT3.shape[1] if known else 0  # type: ignore[union-attr]


@torch.no_grad()
def logits(model: Any, ids_BT: Tensor, place: ResidPost, edit: Edit | None) -> Tensor:
    """`[B, T, V]` of token ids padded on the right, the stream at `place` edited on the way."""
    held = contextlib.nullcontext() if edit is None else patched(model, place, edit)
    with held:
        module = model if isinstance(model, nn.Module) else model._module
        out = module(ids_BT.to(_device(module)))
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def _device(module: nn.Module) -> torch.device:
    try:
        return input_device(module)
    except NLAError:
        # TransformerLens' models are on one.
        return next(module.parameters()).device
