"""The key-value cache of rows that come and go.

All rows keep their newest token in the last column; a row that joined later has empty columns on
its left, which a mask hides. Columns are only storage: a token's position is passed along by
itself, and the distance between two columns is the distance between two tokens, so sliding windows
hold, too.

transformers' own caches grow by copying everything at each token (`DynamicCache`), or attend over
their full capacity (`StaticCache`); here a buffer with room to spare is written in place. A cache
may also keep the columns that all rows share once, apart from the rows' own (`shared`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_ROOM: Final = 64


class RoomyLayer(DynamicLayer):
    """Keys and values of one block, `[B, heads, L, head_dim]`, views into a larger buffer.

    Attributes:
        keys: Keys of the rows' own columns.
        values: Their values.
        shared: Keys and values, `[1, heads, P, head_dim]`, of columns before them that all rows
            share; None: there are none. Attention finds them as `shared_prefix` of the keys it is
            given, see `nla_lens.engines.local.shared_prefix`.
    """

    keys: Tensor
    values: Tensor
    shared: tuple[Tensor, Tensor] | None = None
    _buffers: tuple[Tensor, Tensor] | None = None

    def get_seq_length(self, *args: Any) -> int:
        """Columns of a row, shared ones included."""
        return self._n_own() + self.n_shared

    @property
    def n_shared(self) -> int:
        """Columns that all rows share."""
        return self.shared[0].shape[-2] if self.shared else 0

    def _n_own(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends columns in place; copies only when the room is used up."""
        length = self._n_own()
        needed = length + key_states.shape[-2]
        if self._buffers is None or needed > self._buffers[0].shape[-2]:
            self._buffers = tuple(
                _with_room(kept if length else None, new, needed + _ROOM)
                for kept, new in ((self.keys, key_states), (self.values, value_states))
            )  # type: ignore[assignment]
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        for buffer, new in zip(self._buffers or (), (key_states, value_states), strict=True):
            buffer[..., length:needed, :] = new
        self.keys, self.values = (buffer[..., :needed, :] for buffer in self._buffers or ())
        if self.shared:
            self.keys.shared_prefix = self.shared  # type: ignore[attr-defined]
        return self.keys, self.values

    def select(self, rows: Sequence[int], skip: int) -> None:
        """See `select` of this module; needs a buffer, so columns must have been appended."""
        if self._buffers is None:
            return
        length = self._n_own()
        for buffer in self._buffers:
            for place, row in enumerate(rows):
                if row != place:
                    buffer[place, :, skip:length] = buffer[row, :, skip:length]
        self._buffers = tuple(b[: len(rows), :, skip:] for b in self._buffers)  # type: ignore[assignment]
        self.keys, self.values = (b[..., : length - skip, :] for b in self._buffers or ())

    def repeated(self, rows: int) -> RoomyLayer:
        """See `repeated` of this module."""
        # Views, copied when the first column is appended.
        return self.with_columns(
            *(x.expand(rows, -1, -1, -1) for x in (self.keys, self.values) if x is not None)
        )

    def sharing(self, rows: int) -> RoomyLayer:
        """See `shared` of this module."""
        kept = [x for x in (self.keys, self.values) if x is not None]
        layer = self.with_columns(*(x.new_empty(rows, x.shape[1], 0, x.shape[-1]) for x in kept))
        layer.shared = (self.keys, self.values) if kept else None
        return layer

    def joined(self, other: RoomyLayer) -> RoomyLayer:
        """See `joined` of this module."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        layer = self.with_columns(*(_stacked(*pair) for pair in pairs if pair[0] is not None))
        layer.shared = self.shared
        return layer

    def with_columns(self, *keys_and_values: Tensor) -> RoomyLayer:
        """A layer with other rows and columns; with none where this one was never written to."""
        layer = self.fresh()
        if keys_and_values:
            layer.keys, layer.values = keys_and_values
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.is_initialized = True
        return layer

    def fresh(self) -> RoomyLayer:
        """An empty layer, of the same kind."""
        return RoomyLayer()


def _with_room(kept: Tensor | None, new: Tensor, capacity: int) -> Tensor:
    rows, heads, _, head_dim = new.shape
    buffer = new.new_empty(rows, heads, capacity, head_dim)
    if kept is not None:
        buffer[..., : kept.shape[-2], :] = kept
    return buffer


def empty_cache(layers: Sequence[Callable[[], Any]] = ()) -> Cache:
    """A cache for every block, sliding ones included: their window is kept by the mask.

    Args:
        layers: What makes the layers of a family that keeps other things than keys and values; the
            rest are `RoomyLayer`.
    """
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    cache.layers.extend(make() for make in layers)
    return cache


def _holding(layers: Iterable[Any]) -> Cache:
    cache = empty_cache()
    cache.layers.extend(layers)
    return cache


@torch.inference_mode()
def repeated(prefix: Cache, rows: int) -> Cache:
    """A cache of `rows` rows that all begin with the one row of `prefix`, which stays unwritten."""
    return _holding(layer.repeated(rows) for layer in prefix.layers)


@torch.inference_mode()
def shared(prefix: Cache, rows: int) -> Cache:
    """As `repeated`, with the columns of `prefix` kept once and apart."""
    return _holding(layer.sharing(rows) for layer in prefix.layers)


def n_shared(cache: Cache) -> int:
    """Columns that all rows share, kept once."""
    return next((layer.n_shared for layer in cache.layers if isinstance(layer, RoomyLayer)), 0)


@torch.inference_mode()
def select(cache: Cache, rows: Sequence[int], skip: int = 0) -> None:
    """Keeps these rows, and drops the first `skip` of their own columns.

    Args:
        cache: Is written to.
        rows: For each place the row that comes there. Only rows that change their place are
            copied, so let those that stay keep theirs.
        skip: Columns that no row uses any more.
    """
    for layer in cache.layers:
        layer.select(rows, skip)


@torch.inference_mode()
def joined(first: Cache, second: Cache) -> Cache:
    """The rows of both, the shorter ones with empty columns on the left of their own."""
    return _holding(a.joined(b) for a, b in zip(first.layers, second.layers, strict=True))


def _stacked(a: Tensor, b: Tensor) -> Tensor:
    length = max(a.shape[-2], b.shape[-2])
    return torch.cat([_left_padded(a, length), _left_padded(b, length)])


def _left_padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[-2], 0))
