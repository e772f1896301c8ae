"""A job's requests over one server or several.

Of several, whichever has room takes the next request, so a slow one takes fewer. One that fails is
set aside, its requests go to the others, and it is looked at again every few seconds: what comes
back must be the model it was. Only where none is left, or a request fails wherever it is sent, does
the job fail, as with a single server.

With several a request that got lost is sent again, though it may have run: that costs time, never a
second answer.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Final, Protocol, TypeAlias

from torch import Tensor

from nla_lens.engines import Job
from nla_lens.engines.served.channel import MODELS, Channel, Tell
from nla_lens.engines.served.server import Server
from nla_lens.errors import NLAError

_log = logging.getLogger(__name__)

_BYTES_UNDER_WAY: Final = 256 << 20
_BYTES_A_REQUEST: Final = 32 << 20
_GRACE_SECONDS: Final = 5.0
"""How long requests beside one that failed for good are still waited for."""
_LOOK_AGAIN_SECONDS: Final = 1.0
_TRIES_A_SERVER: Final = 2
"""A request that failed so often on average is what takes servers down."""

Answered: TypeAlias = tuple[int, list[int]]


class OnServer(Protocol):
    """What a `ServedVerbalizer` is to this module.

    Attributes:
        server: Where it is.
        tell: What a refusal means.
    """

    server: Server

    @property
    def tell(self) -> Tell: ...

    def embed(self, ids: Sequence[int]) -> Tensor: ...

    def bytes_a_row(self, n_tokens: int) -> int: ...

    def most_rows(self, job: Job) -> int: ...

    def send(
        self, channel: Channel, embed_TD: Tensor, job: Job, rows: Sequence[int]
    ) -> Future[Any]: ...

    def read(self, future: Future[Any], job: Job, rows: Sequence[int]) -> list[Answered]: ...

    def look(self) -> None: ...

    def confirm(self, models: Any) -> None: ...


class _Batch:
    """Rows of one request, and how often they failed."""

    def __init__(self, rows: list[int]) -> None:
        self.rows, self.tries = rows, 0


class _Lane:
    """What one server does of a job.

    Attributes:
        failure: Why it is set aside; None while it is not.
    """

    def __init__(self, engine: OnServer, channel: Channel) -> None:
        self.engine, self.channel = engine, channel
        self.running: dict[Future[Any], _Batch] = {}
        self.failure: NLAError | None = None
        self.look: Future[None] | None = None
        self.look_at = 0.0

    def has_room(self) -> bool:
        """Whether it takes another request."""
        is_in_use = self.failure is None and self.look is None
        return is_in_use and len(self.running) < self.engine.server.connections

    def confirm(self) -> None:
        """Since it was loaded, it may have become another."""
        self.engine.confirm(self.channel.get(MODELS))

    def set_aside(self, failure: NLAError) -> None:
        """Gives it nothing until it was looked at again."""
        self.failure = failure
        self.look_at = time.monotonic() + _LOOK_AGAIN_SECONDS

    def look_again(self) -> None:
        """Looks whether it is back, where that is due."""
        if self.failure is not None and self.look is None and time.monotonic() >= self.look_at:
            self.look = _beside(self.engine.look)

    def was_looked_at(self) -> NLAError | None:
        """Takes it back, or not yet; says why it will not do that was never set aside."""
        (found, self.look), was = (self.look, None), self.failure
        try:
            if found is not None:
                found.result()
        except NLAError as error:
            if was is None:
                return error
            self.set_aside(error)
            return None
        self.failure = None
        if was is not None:
            _log.warning("the server at %s is back", self.engine.server.url)
        return None


def spread(engines: Sequence[OnServer], job: Job) -> Iterator[Answered]:
    """Yields (row, ids) as requests are answered; nothing is checked here.

    Args:
        engines: One AV, on as many servers.
        job: What is asked.

    Raises:
        NLAError: The one server failed, or all did: what is still answered within 5 s is yielded
            first.
    """
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(Channel(e.server, e.tell, e.confirm)) for e in engines]
        lanes = [_Lane(e, channel) for e, channel in zip(engines, channels, strict=True)]
        if len(lanes) == 1:
            lanes[0].confirm()
        else:
            for lane in lanes:
                lane.look = _beside(lane.confirm)
        yield from _Spreading(lanes, job).run()


class _Spreading:
    """One job under way."""

    def __init__(self, lanes: Sequence[_Lane], job: Job) -> None:
        self._lanes, self._job = lanes, job
        self._embed_TD: Tensor = lanes[0].engine.embed(job.prompt_ids)
        self._waiting, self._at_once = _batches([lane.engine for lane in lanes], job)
        self._failure: NLAError | None = None
        self._until = 0.0
        self._patience = max(lane.engine.server.patience for lane in lanes)
        self._none_since: float | None = None

    def run(self) -> Iterator[Answered]:
        while self._n_running or (self._waiting and self._failure is None):
            if self._failure is None:
                self._send()
                self._give_up_without_servers()
                if self._failure is not None:
                    continue
            done = self._wait()
            if not done and self._failure is not None and time.monotonic() >= self._until:
                break
            for future in done:
                yield from self._take(future)
        if self._failure is not None:
            raise self._failure

    @property
    def _n_running(self) -> int:
        return sum(len(lane.running) for lane in self._lanes)

    def _send(self) -> None:
        for lane in self._lanes:
            lane.look_again()
        while self._waiting and self._n_running < self._at_once:
            free = [lane for lane in self._lanes if lane.has_room()]
            if not free:
                return
            lane = min(free, key=lambda lane: len(lane.running))
            batch = self._waiting.popleft()
            sent = lane.engine.send(lane.channel, self._embed_TD, self._job, batch.rows)
            lane.running[sent] = batch

    def _give_up_without_servers(self) -> None:
        failures = [lane.failure for lane in self._lanes]
        if None in failures:
            self._none_since = None
            return
        now = time.monotonic()
        self._none_since = now if self._none_since is None else self._none_since
        if now >= self._none_since + self._patience:
            self._fail(next(failure for failure in failures if failure is not None))

    def _fail(self, failure: NLAError) -> None:
        if self._failure is None:
            self._failure, self._until = failure, time.monotonic() + _GRACE_SECONDS

    def _wait(self) -> Sequence[Future[Any]]:
        """What is answered by the next moment at which something is due."""
        looks = [lane.look for lane in self._lanes if lane.look is not None]
        futures = [future for lane in self._lanes for future in lane.running]
        due: list[float] = []
        if self._failure is not None:
            due, looks = [self._until], []
        elif any(lane.failure is not None for lane in self._lanes):
            due = [lane.look_at for lane in self._lanes if lane.failure and lane.look is None]
            due += [] if self._none_since is None else [self._none_since + self._patience]
        left = max(0.0, min(due) - time.monotonic()) if due else None
        if not futures and not looks:
            time.sleep(left or 0.0)
            return ()
        return list(wait([*futures, *looks], left, FIRST_COMPLETED).done)

    def _take(self, future: Future[Any]) -> Iterator[Answered]:
        lane = next(x for x in self._lanes if future is x.look or future in x.running)
        if future is lane.look:
            will_not_do = lane.was_looked_at()
            if will_not_do is not None:
                self._lost(lane, will_not_do, for_good=False)
            return
        batch = lane.running.pop(future)
        try:
            found = lane.engine.read(future, self._job, batch.rows)
        except NLAError as error:
            self._failed(lane, batch, error)
            return
        yield from found

    def _failed(self, lane: _Lane, batch: _Batch, error: NLAError) -> None:
        batch.tries += 1
        self._waiting.appendleft(batch)
        tries = _TRIES_A_SERVER * len(self._lanes)
        self._lost(lane, error, for_good=len(self._lanes) == 1 or batch.tries >= tries)

    def _lost(self, lane: _Lane, error: NLAError, *, for_good: bool) -> None:
        """Ends the job, or gives a server's share to the others."""
        if for_good:
            self._fail(error)
            return
        if lane.failure is None:
            url, cause = lane.engine.server.url, getattr(error, "cause", "failed")
            _log.warning("the server at %s is set aside (%s); others do its requests", url, cause)
            _log.info("%s", error)
        lane.set_aside(error)


def _batches(engines: Sequence[OnServer], job: Job) -> tuple[deque[_Batch], int]:
    """Rows for one request each, and how many requests may be under way."""
    size, n = engines[0].bytes_a_row(len(job.prompt_ids)), len(job.injected_ND)
    most = job.batch_size or n
    a_request = min(engine.most_rows(job) for engine in engines)
    rows = max(1, min(a_request, most, _BYTES_A_REQUEST // size))
    at_once = min(most // rows, _BYTES_UNDER_WAY // (rows * size))
    batches = [_Batch(list(range(i, min(i + rows, n)))) for i in range(0, n, rows)]
    return deque(batches), max(1, at_once)


def _beside(call: Any) -> Future[None]:
    """Runs something in a thread that nothing waits for in the end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
