"""A tracer of nnsight whose `cache()` holds residuals that know where they came from."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.cache import Cache
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.tracer import InterleavingTracer

from nla_lens.adapters.nnsight_run import Recorder


class RecordingTracer(InterleavingTracer):
    """A tracer whose `cache()` holds residuals that know where they came from."""

    def cache(self, *args: Any, **kwargs: Any) -> Any:
        """See `InterleavingTracer.cache`."""
        view = super().cache(*args, **kwargs)
        mediator = Mediator.current("tracer.cache()")
        cache = mediator.caches[-1]
        cache.__class__ = _RecordingCache
        cache.nla_recorder, cache.nla_rows = self.envoy.nla_recorder, mediator.batch_group
        return view


class _RecordingCache(Cache):
    nla_recorder: Recorder
    nla_rows: list[int] | None

    def observe_selected(self, selected: tuple[str, str], value: Any) -> None:
        """See `Cache.observe_selected`."""
        super().observe_selected(selected, value)
        path, slot = selected
        entry, recorder = self.entries[path][-1], self.nla_recorder
        tell = recorder.wrap if slot == "output" else recorder.wrap_inputs
        setattr(entry, slot, tell(getattr(entry, slot), path, self.nla_rows))

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: dict[str, Any] = vars(self) | {"model": None, "_open": {}}
        del state["nla_recorder"], state["nla_rows"]
        return reduced(Cache, state)


def reduced(cls: type, state: Any) -> tuple[Any, ...]:
    """What `__reduce_ex__` answers for an object of class `cls`."""
    return object.__new__, (cls,), state
