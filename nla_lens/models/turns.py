"""Threads that take turns on an object, in the order in which they asked."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any


class Turns:
    """A lock that a thread may take again, and that threads get in the order in which they asked.

    Python's own is not fair: who gives it back and takes it again at once keeps it.

    Threads never wait for one another in a ring, as where hooks of each explain by the other's
    model: the one that would close the ring goes in as a guest. Whoever holds the turn stands still
    meanwhile, just as for a pass inside its own.
    """

    def __init__(self) -> None:
        self._owner: int | None = None
        self._holders: list[object] = []
        self._guests: list[object] = []
        self._queue: deque[tuple[int, object, threading.Lock]] = deque()

    def take(self, holder: object) -> None:
        """Waits for its turn; `give_back` must follow even where this raises, as on Ctrl-C.

        Args:
            holder: Any object, the same for both.
        """
        me, ticket = threading.get_ident(), threading.Lock()
        with _shared.guard:
            if self._owner == me or not self._holders:
                self._owner = me
                self._holders.append(holder)
                return
            if self._would_close_a_ring(me):
                self._guests.append(holder)
                return
            ticket.acquire()
            self._queue.append((me, holder, ticket))
            _shared.wanted[me] = self
        ticket.acquire()

    def give_back(self, holder: object) -> None:
        """Ends a turn, or the wait for it, and lets the next thread have it."""
        try:
            self._leave(holder)
        # A Ctrl-C in this very moment must not leave others waiting for ever.
        except BaseException:
            self._leave(holder)
            raise

    def _leave(self, holder: object) -> None:
        """May be called again where it was interrupted."""
        with _shared.guard:
            for held in (self._holders, self._guests):
                held[:] = [other for other in held if other is not holder]
            for waiting in [w for w in self._queue if w[1] is holder]:
                self._queue.remove(waiting)
                _shared.wanted.pop(waiting[0], None)
            if not self._holders:
                self._owner = None
                if self._queue:
                    self._owner, first, ticket = self._queue[0]
                    _shared.wanted.pop(self._owner, None)
                    with contextlib.suppress(RuntimeError):
                        ticket.release()
                    self._holders.append(first)
                    self._queue.popleft()

    def _would_close_a_ring(self, me: int) -> bool:
        turns: Turns | None = self
        while turns is not None and turns._owner is not None:
            if turns._owner == me:
                return True
            turns = _shared.wanted.get(turns._owner)
        return False


@contextlib.contextmanager
def turn(key: Any) -> Iterator[None]:
    """What is done in it with an object, one thread does at a time."""
    turns, holder = turns_of(key), object()
    try:
        turns.take(holder)
        yield
    finally:
        turns.give_back(holder)


class _Shared:
    """What all turns share.

    Attributes:
        guard: Held for as long as one looks or changes anything, and never while one waits.
        of: Each model's turns.
        wanted: What each thread waits for.
    """

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.of: weakref.WeakKeyDictionary[Any, Turns] = weakref.WeakKeyDictionary()
        self.wanted: dict[int, Turns] = {}


_shared = _Shared()


def turns_of(stack: Any) -> Turns:
    """The turns of a model, or of anything else, as long as it lives."""
    with _shared.guard:
        found = _shared.of.get(stack)
        if found is None:
            found = _shared.of[stack] = Turns()
        return found


def _forget_threads() -> None:
    """A forked process has none of the threads that may hold a turn, or the guard."""
    global _shared
    _shared = _Shared()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
