"""How long a job on NDIF is waited for, and what travelled for it."""

from __future__ import annotations

from dataclasses import dataclass

from nnsight.schema.response import Status


@dataclass
class Patience:
    """How long to wait, in seconds.

    Attributes:
        connect: For a connection, tries included.
        answer: For the server to take a job, its upload included; for it to say how a polled job
            is doing, tries included; and for a result, with a second more for each 16 KiB of it.
        queued: Without a word while waiting in line, for a model that is being loaded included.
        running: Without a word while the model runs.
    """

    connect: float = 10.0
    answer: float = 120.0
    queued: float = 1800.0
    running: float = 300.0

    def after(self, status: Status | None) -> float:
        """How long without a word after a status."""
        return self.running if status in (Status.DISPATCHED, Status.RUNNING) else self.queued


@dataclass
class Traffic:
    """What travelled.

    Attributes:
        requests: Jobs sent.
        sent: Bytes of requests.
        received: Bytes of results.
    """

    requests: int = 0
    sent: int = 0
    received: int = 0
