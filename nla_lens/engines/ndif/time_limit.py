"""A time limit for a call that has none, or too long a one, of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from nla_lens.engines.ndif.errors import SilenceError

T = TypeVar("T")


def within(seconds: float, state: str, step: Callable[..., T], *args: Any) -> T:
    """Does a step in a thread, and stops waiting for it when time is up.

    Raises:
        SilenceError: It took too long; it may still be done.
    """
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((step(*args), None))
        except BaseException as error:
            done.put((None, error))

    # A daemon: the end of the program does not wait for it.
    threading.Thread(target=run, name="nla_lens.remote", daemon=True).start()
    try:
        result, failure = done.get(timeout=seconds)
    except queue.Empty:
        raise SilenceError(state, seconds) from None
    if failure is not None:
        raise failure
    found: T = result
    return found
