"""What a family keeps between two tokens, and in which ways its decoding may therefore go.

Most keep keys and values, whose columns `kv_cache` moves as it likes. Others keep states besides
(linear attention, Mamba, short convolutions), which have no columns: a row's state goes with its
row. What keeps neither in a cache of transformers' own is run again from the beginning at each
token, which is slow and right for every family. Which way is right is not guessed: an engine tries
them when it is loaded, see `nla_lens.engines.local.self_check`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from nla_lens.models.anatomy import text_model
from nla_lens.models.cache_keyword import takes_cache
from nla_lens.models.kv_cache import RoomyLayer

_PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
_STATE = "LinearAttentionLayer"
_BOTH = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_PROVEN = {
    "falcon_h1": True,
    "jamba": False,
    "lfm2": True,
    "mamba2": True,
    "nemotron_h": True,
    "olmo_hybrid": True,
    "qwen3_5_moe_text": True,
    "qwen3_5_text": True,
    "qwen3_next": True,
}
"""Families with states whose cached decoding is right, and whether it resumes. In float32 that is
seen; in half precision rounding would hide a small drift, as Zamba 2's cache has in transformers
5.23, so others run anew."""
_OF_COLUMNS = ("keys", "values", "_buffers", "shared", "is_initialized")


@dataclass(frozen=True)
class Caching:
    """One way.

    Attributes:
        layers: What makes the layers of a cache; none are needed for keys and values alone.
        kept: Whether anything is; else each pass runs its rows from the beginning.
        resumes: Whether several tokens may follow a state, so that what all rows begin with can run
            once.
    """

    layers: Sequence[Callable[[], Any]] = ()
    kept: bool = True
    resumes: bool = True


KEYS_AND_VALUES = Caching()
NOTHING = Caching(kept=False)


def ways_of_caching(lm: Any) -> list[Caching]:
    """Ways for a causal LM, the fastest first.

    Args:
        lm: A transformers causal LM, or the stack of blocks inside.
    """
    if not takes_cache(lm):
        return [NOTHING]
    layers = cache_utils.DynamicCache(config=text_model(lm).config).layers
    names = {type(layer).__name__ for layer in layers}
    stateful = bool(getattr(type(text_model(lm)), "_is_stateful", False))
    if names <= set(_PLAIN):
        plain = not stateful and _attends(text_model(lm).config)
        return [KEYS_AND_VALUES if plain else NOTHING]
    if not names <= {*_PLAIN, _STATE, *_BOTH}:
        return [NOTHING]
    made = [_maker(layer) for layer in layers]
    ways = [Caching(made), Caching(made, resumes=False), NOTHING]
    if lm.dtype in (torch.float32, torch.float64):
        return ways
    resumes = _PROVEN.get(text_model(lm).config.model_type)
    return ways[-1:] if resumes is None else ways if resumes else ways[1:]


def _attends(config: Any) -> bool:
    """Whether all blocks keep keys and values.

    A transformers without layers of states makes plain ones for every block, and reads others than
    its own cache in families that keep more (MiniMax, LFM 2).
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    return hasattr(cache_utils, _STATE) or kinds <= _ATTENTION


def is_right_with_its_own_cache(lm: Any) -> bool:
    """Whether a family is known to decode rightly by the cache that transformers makes for it."""
    ways = ways_of_caching(lm)
    proven = ways[0].kept and text_model(lm).config.model_type in _PROVEN
    return proven or ways == [KEYS_AND_VALUES]


def keeps_states(lm: Any) -> bool:
    """Whether a family keeps something else than keys and values."""
    return ways_of_caching(lm) != [KEYS_AND_VALUES]


def _maker(layer: Any) -> Callable[[], Any]:
    name = type(layer).__name__
    if name in (_STATE, *_BOTH):
        states = {"number_of_states": layer.number_of_states} if _has_several(layer) else {}
        return partial(StateLayer if name == _STATE else BothLayer, **states)
    return NoLayer if name == "DummyLayer" else RoomyLayer


def _has_several(layer: Any) -> bool:
    return hasattr(layer, "number_of_states")


class _NoStates:
    """In a transformers that has no layers of states, no family needs them."""


_Linear: Any = getattr(cache_utils, _STATE, _NoStates)
_Dummy: Any = getattr(cache_utils, "DummyLayer", _NoStates)


class NoLayer(_Dummy):
    """Of a block that keeps nothing."""

    def repeated(self, rows: int) -> NoLayer:
        """See `kv_cache.repeated`."""
        return self

    sharing = repeated

    def joined(self, other: NoLayer) -> NoLayer:
        """See `kv_cache.joined`."""
        return self

    def select(self, rows: Sequence[int], skip: int) -> None:
        """See `kv_cache.select`."""


class StateLayer(_Linear):
    """States of one block, `[B, ...]` each; nothing in them is a column."""

    def repeated(self, rows: int) -> Any:
        """See `kv_cache.repeated`."""
        # Copies: states are written in place.
        return self._with_states(lambda x: x.repeat_interleave(rows, 0))

    sharing = repeated

    def joined(self, other: Any) -> Any:
        """See `kv_cache.joined`."""
        # The states of both stand in the same order.
        theirs = iter(_states(other))
        return self._with_states(lambda x: torch.cat([x, next(theirs)]))

    def select(self, rows: Sequence[int], skip: int) -> None:
        """See `kv_cache.select`."""
        self.__dict__.update(vars(self._with_states(lambda x: x[list(rows)])))

    def _with_states(self, act: Callable[[Tensor], Tensor]) -> Any:
        layer = copy.copy(self)
        for name, value in vars(self).items():
            if name not in _OF_COLUMNS:
                setattr(layer, name, _changed(value, act))
        return layer


class BothLayer(StateLayer, RoomyLayer):
    """Keys and values, and states beside them."""

    def __init__(self, **options: Any) -> None:
        RoomyLayer.__init__(self)
        StateLayer.__init__(self, **options)

    def fresh(self) -> Any:
        """See `RoomyLayer`."""
        layer = copy.copy(self)
        layer.keys = layer.values = None  # type: ignore[assignment]
        layer.shared, layer._buffers, layer.is_initialized = None, None, False
        return layer

    def repeated(self, rows: int) -> Any:
        """See `kv_cache.repeated`."""
        return RoomyLayer.repeated(StateLayer.repeated(self, rows), rows)

    def sharing(self, rows: int) -> Any:
        """See `kv_cache.shared`."""
        return RoomyLayer.sharing(StateLayer.repeated(self, rows), rows)

    def joined(self, other: Any) -> Any:
        """See `kv_cache.joined`."""
        return RoomyLayer.joined(StateLayer.joined(self, other), other)

    def select(self, rows: Sequence[int], skip: int) -> None:
        """See `kv_cache.select`."""
        StateLayer.select(self, rows, skip)
        RoomyLayer.select(self, rows, skip)


def _states(layer: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for name, value in vars(layer).items():
        if name not in _OF_COLUMNS:
            _changed(value, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def _changed(value: Any, act: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, dict):
        return {key: _changed(part, act) for key, part in value.items()}
    return value
