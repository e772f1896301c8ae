"""TransformerLens: the residual stream changed at its hook points.

By a forward hook of torch's on the hook point: those of `add_hook` are reset by whoever calls
`reset_hooks`. It comes before all others, so that they, and caches, are handed what goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nla_lens.models.anatomy import text_model
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.origin import locate
from nla_lens.stream.patching import Edit, Watcher, patched_module, watched_stack


def patched_point(
    model: Any, place: ResidPost, edit: Edit
) -> contextlib.AbstractContextManager[None]:
    """See `nla_lens.stream.patching.patched`."""
    point: nn.Module = model.hook_dict[place.name]
    return patched_module(point, edit)


def watched_model(
    model: Any, place: ResidPost, watcher: Watcher
) -> contextlib.AbstractContextManager[None]:
    """See `nla_lens.stream.patching.watched`."""
    if hasattr(model, "original_model"):
        return watched_stack(text_model(model.original_model), watcher)
    return _watched_hooked(model, place, watcher)


@contextlib.contextmanager
def _watched_hooked(model: Any, place: ResidPost, watcher: Watcher) -> Iterator[None]:
    """A HookedTransformer: its methods call `forward` themselves, so its modules are watched."""
    mine, newest = threading.get_ident(), dict[str, Tensor]()

    def note(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if threading.get_ident() == mine:
            given = next((a for a in (*args, *(kwargs or {}).values())), None)
            newest.pop("ids_BT", None)
            if isinstance(given, Tensor) and not given.is_floating_point():
                newest["ids_BT"] = given

    def begin(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if threading.get_ident() != mine or kwargs is None:
            return
        resid_BTD: Tensor = args[0] if args else kwargs["resid_pre"]
        ids_BT = newest["text_BT"] = _ids_of(resid_BTD, newest)
        entry, mask_BS = kwargs.get("past_kv_cache_entry"), kwargs.get("attention_mask")
        n_past = 0 if entry is None else int(entry.past_keys.shape[1])
        if mask_BS is None:
            mask_BS = ids_BT.new_ones(len(ids_BT), n_past + ids_BT.shape[1])
        watcher.begin(locate(ids_BT, mask_BS), n_past)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == mine:
            watcher.end()

    block = model.blocks[place.layer]
    handles = [
        model.embed.register_forward_pre_hook(note, with_kwargs=True),
        block.register_forward_pre_hook(begin, with_kwargs=True),
        block.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ids_of(resid_BTD: Tensor, known: dict[str, Tensor]) -> Tensor:
    """Tokens of a pass: those last embedded, behind the text where `generate` embeds each once."""
    ids_BT, text_BT = known.get("ids_BT"), known.get("text_BT")
    if ids_BT is not None and ids_BT.shape == resid_BTD.shape[:2]:
        return ids_BT
    if ids_BT is not None and text_BT is not None and len(ids_BT) == len(text_BT):
        longer_BT = torch.cat([text_BT, ids_BT], dim=1)
        if longer_BT.shape == resid_BTD.shape[:2]:
            return longer_BT
    return torch.full(resid_BTD.shape[:2], -1, device=resid_BTD.device)
