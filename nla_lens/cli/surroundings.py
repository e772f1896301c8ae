"""What a command finds around it: standard streams that are closed or not Unicode, and signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final

_ENDING: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Sent by schedulers before they kill, and by a terminal that goes away."""


def open_streams() -> None:
    """Makes the standard streams ones that can be read and written, whoever started us.

    A closed one is /dev/null from now on: else the next file that is opened gets its number, and
    what a library writes there in C goes into that file. Characters that an output's encoding does
    not have are spelled out.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream: Any = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Stopped:
    """Which signal ended a command, if another than that of Ctrl-C."""

    by: signal.Signals | None = None

    def said(self) -> tuple[str, int]:
        """A message, and the exit status that shells have for it."""
        if self.by is None:
            return "interrupted", 128 + signal.SIGINT
        return f"ended by {self.by.name}", 128 + self.by


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Stopped]:
    """While it lasts, a signal that would end us at once does what Ctrl-C does: what is finished is
    written first. One that is ignored (nohup) stays so.
    """
    stopped, before = Stopped(), {}

    def stop(number: int, frame: object) -> None:
        stopped.by = signal.Signals(number)
        raise KeyboardInterrupt

    try:
        for number in _ENDING:
            # Only the main thread may; elsewhere they are not ours to take.
            with contextlib.suppress(ValueError):
                if signal.getsignal(number) is signal.SIG_DFL:
                    before[number] = signal.signal(number, stop)
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
