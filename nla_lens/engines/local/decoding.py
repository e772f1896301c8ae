"""The decode loop that local engines share.

What comes before the marker is the same for every vector, so it runs once. Rows that are over leave
at once and waiting vectors take their place, so that the batch stays full.

Our own loop instead of `generate`: a checkpoint's generation_config (repetition penalty, do_sample)
leaks into `generate` even where it is told to be greedy, sampled rows there depend on what else is
in the batch, it computes the prefix for every row, and Gemma 3's wrapper refuses embeddings. And
instead of transformers' continuous batching (`generate_batch`): it lays all requests in one row of
tokens, where a hook cannot tell which of them a vector belongs to, takes no embeddings, and ends
answers by token ids alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from nla_lens.engines import Job, Unfinished
from nla_lens.engines.local.sampling import Sampler
from nla_lens.errors import NLAError
from nla_lens.models.caching import Caching
from nla_lens.models.kv_cache import empty_cache, joined, n_shared, repeated, select, shared
from nla_lens.models.pickling import KeepsPrefix

_WORTH_A_COPY: Final = 8
"""Rows join when one place in this many is free: that copies the cache."""
_PREFILL_TOKENS: Final = {"cpu": 512}
"""Most tokens of a prefill pass; a CPU's caches hold no more, elsewhere it is `_MANY_TOKENS`."""
_MANY_TOKENS: Final = 16_384
_OVER: Final = -1


class Forward(Protocol):
    """What a local engine must be able to do.

    Attributes:
        eos_ids: Ids that end an answer.
        caching: What is kept between two tokens.
    """

    eos_ids: frozenset[int]
    caching: Caching

    def run(
        self,
        ids_BT: Tensor,
        cache: Any,
        *,
        mask_BL: Tensor | None = None,
        positions_BT: Tensor | None = None,
        injected_BD: Tensor | None = None,
        at: int = 0,
    ) -> Tensor:
        """Runs tokens after what is in the cache, which grows by them.

        Args:
            ids_BT: Token ids.
            cache: A transformers cache; None: nothing is kept.
            mask_BL: Which columns of the grown cache are real; None: all.
            positions_BT: Positions of the tokens; None: they go on from the cache's length.
            injected_BD: Vectors to be injected at one of the T tokens; None: nothing is.
            at: Which one.

        Returns:
            Logits at the last token, `[B, V]` float32.
        """
        ...

    def can_share(self, n_columns: int) -> bool:
        """Whether `run` takes a cache that keeps a common prefix once, see `kv_cache.shared`.

        Args:
            n_columns: The longest that a row can become.
        """
        ...


@dataclass
class _Flight:
    """Rows being generated.

    Attributes:
        rows: Their indices in the job; `_OVER` for a row that is over and not yet dropped.
        generated: Their ids so far.
        cache: Keys and values, newest column last.
        mask_BL: Which columns of the cache, shared ones apart, are a row's.
    """

    rows: list[int] = field(default_factory=list)
    generated: list[list[int]] = field(default_factory=list)
    cache: Any = None
    mask_BL: Tensor | None = None

    @classmethod
    def of(cls, rows: list[int]) -> _Flight:
        """Rows that nothing was generated for yet."""
        return cls(rows, [[] for _ in rows])

    def drop(self) -> None:
        """Drops rows that are over; the last ones take their places, and no other row moves."""
        alive = [i for i, row in enumerate(self.rows) if row != _OVER]
        if not alive:
            self.rows, self.generated, self.cache, self.mask_BL = [], [], None, None
        elif self.mask_BL is not None and len(alive) < len(self.rows):
            movers = iter(alive[::-1])
            kept = [i if self.rows[i] != _OVER else next(movers) for i in range(len(alive))]
            mask_BL = self.mask_BL[kept]
            unused = int(mask_BL.any(0).long().argmax())
            self.mask_BL = mask_BL[:, unused:]
            if self.cache is not None:
                select(self.cache, kept, skip=unused)
            self.rows = [self.rows[i] for i in kept]
            self.generated = [self.generated[i] for i in kept]

    def join(self, other: _Flight) -> None:
        """Takes in rows that have just been prefilled."""
        if other.mask_BL is None:
            return
        if self.mask_BL is None:
            self.cache, self.mask_BL = other.cache, other.mask_BL
        else:
            self.cache = None if self.cache is None else joined(self.cache, other.cache)
            length = max(self.mask_BL.shape[1], other.mask_BL.shape[1])
            self.mask_BL = torch.cat(
                [
                    torch.nn.functional.pad(mask, (length - mask.shape[1], 0))
                    for mask in (self.mask_BL, other.mask_BL)
                ]
            )
        self.rows += other.rows
        self.generated += other.generated


class Decoder(KeepsPrefix):
    """Generates answers with one model; keeps the prefix of the last prompt between calls."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        """Args:
        forward: The model.
        device: Where token ids go.
        """
        self._forward, self._device = forward, device
        self._prefix: tuple[tuple[int, ...], Any] | None = None

    def decode(self, job: Job, batch_size: int) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, generated ids) as rows are over, in any order.

        Raises:
            NLAError: Not even one row fits into memory.
        """
        waiting, flight = deque(range(len(job.injected_ND))), _Flight()
        sampler = Sampler(job.temperature, job.seeds)
        while waiting or flight.rows:
            free, started = batch_size - len(flight.rows), _Flight()
            # Without a cache all rows are equally long.
            joins = free * _WORTH_A_COPY >= batch_size if self._caching.kept else not flight.rows
            try:
                if waiting and joins:
                    for n in self._prefills(min(free, len(waiting)), job):
                        started = _Flight.of([waiting.popleft() for _ in range(n)])
                        logits_BV = self._prefill(started, job)
                        yield from self._advance(started, logits_BV, job, sampler)
                        flight.join(started)
                        started = _Flight()
                if flight.rows:
                    yield from self._advance(flight, self._step(flight, job), job, sampler)
            except torch.cuda.OutOfMemoryError as error:
                # What is in flight starts again with fewer rows at once; what was yielded stays.
                batch_size = _halved(batch_size, error)
                again = sorted({*flight.rows, *started.rows} - {_OVER})
                waiting.extendleft(reversed(again))
                flight = _Flight()
                for row in again:
                    sampler.forget(row)

    def _advance(
        self, flight: _Flight, logits_BV: Tensor, job: Job, sampler: Sampler
    ) -> Iterator[tuple[int, list[int]]]:
        """Appends each row's next token; yields the rows that are over by it."""
        for i, token in enumerate(sampler.pick(logits_BV, flight.rows)):
            flight.generated[i].append(token)
            row = flight.rows[i]
            if job.is_over(flight.generated[i], self._forward.eos_ids):
                flight.rows[i] = _OVER
                sampler.forget(row)
                yield row, flight.generated[i]
            elif job.watched is not None and job.watched(row):
                yield row, Unfinished(flight.generated[i])
        flight.drop()

    def _prefills(self, n: int, job: Job) -> list[int]:
        """How many of n rows go through each prefill pass."""
        n_suffix = len(job.prompt_ids) - self._n_before(job)
        most = max(1, _PREFILL_TOKENS.get(self._device.type, _MANY_TOKENS) // n_suffix)
        return [min(most, n - start) for start in range(0, n, most)]

    @property
    def _caching(self) -> Caching:
        return self._forward.caching

    def _n_before(self, job: Job) -> int:
        """Tokens of the prompt that run once for all rows."""
        return job.marker if self._caching.kept and self._caching.resumes else 0

    @torch.inference_mode()
    def _prefill(self, started: _Flight, job: Job) -> Tensor:
        """Runs the prompt from the marker on, injecting; what is before it is shared."""
        n, n_tokens, n_before = len(started.rows), len(job.prompt_ids), self._n_before(job)
        n_apart = 0
        if n_before:
            prefix = self._prefix_of(job)
            share = self._forward.can_share(n_tokens + job.max_new_tokens)
            started.cache = (shared if share else repeated)(prefix, n)
            n_apart = n_shared(started.cache)
        elif self._caching.kept:
            started.cache = empty_cache(self._caching.layers)
        started.mask_BL = torch.ones(n, n_tokens - n_apart, dtype=torch.bool, device=self._device)
        return self._forward.run(
            self._ids([list(job.prompt_ids[n_before:])] * n),
            started.cache,
            injected_BD=job.injected_ND[started.rows],
            at=job.marker - n_before,
        )

    def _prefix_of(self, job: Job) -> Any:
        ids, kept = tuple(job.prompt_ids[: job.marker]), self._prefix
        if kept is None or kept[0] != ids:
            cache = empty_cache(self._caching.layers)
            self._forward.run(self._ids([list(ids)]), cache)
            # Another thread may keep that of another prompt at any time.
            kept = self._prefix = ids, cache
        return kept[1]

    @torch.inference_mode()
    def _step(self, flight: _Flight, job: Job) -> Tensor:
        """Runs each row's newest token, injecting nothing; without a cache, each row anew."""
        if not self._caching.kept:
            rows = [[*job.prompt_ids, *ids] for ids in flight.generated]
            injected_BD = job.injected_ND[flight.rows]
            return self._forward.run(self._ids(rows), None, injected_BD=injected_BD, at=job.marker)
        newest_B1 = self._ids([ids[-1:] for ids in flight.generated])
        mask_BL = torch.nn.functional.pad(flight.mask_BL, (0, 1), value=True)  # type: ignore[arg-type]
        flight.mask_BL = mask_BL
        if mask_BL.all():
            return self._forward.run(newest_B1, flight.cache)
        mask_BL = torch.nn.functional.pad(mask_BL, (n_shared(flight.cache), 0), value=True)
        before = len(job.prompt_ids) - 1
        positions_B1 = self._ids([[before + len(ids)] for ids in flight.generated])
        return self._forward.run(
            newest_B1, flight.cache, mask_BL=mask_BL, positions_BT=positions_B1
        )

    def _ids(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self._device)


def _halved(batch_size: int, error: Exception) -> int:
    if batch_size == 1:
        raise NLAError(
            "out of memory for a single vector; use a smaller dtype, max_new_tokens or device_map"
        ) from error
    return batch_size // 2
