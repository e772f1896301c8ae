"""One job on an NDIF server: sent, waited for with time-outs, counted.

nnsight's own backend waits for ever when a model's process hangs, and draws on the terminal; this
one does neither, and takes the server and the key from nnsight's configuration like it.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any, Final

import httpx
import websocket
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.schema.request import RequestModel
from nnsight.schema.response import Status
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from nla_lens.remote_errors import SilenceError

_log = logging.getLogger("nla_lens.remote")
_TICK: Final = 1.0
_PASSING: Final = (
    ConnectionError,
    TimeoutError,
    httpx.TransportError,
    websocket.WebSocketException,
)
"""What may pass by itself. Only what costs nothing is tried again: the connection before anything
is sent, and the question for a result that is already paid for."""


@dataclass
class Patience:
    """How long to wait, in seconds.

    Attributes:
        connect: For a connection, tries included.
        queued: Without a word while waiting in line, for a model that is being loaded included.
        running: Without a word while the model runs.
    """

    connect: float = 10.0
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


class NDIFBackend(RemoteBackend):
    """A job that is waited for, by websocket or by polling.

    Attributes:
        patience: How long to wait.
        traffic: Where bytes are counted.
        poll_for_result: Submit without a connection and ask for the result: a lost connection then
            costs nothing.
    """

    def __init__(
        self,
        model_key: str,
        patience: Patience,
        traffic: Traffic,
        *,
        poll_for_result: bool = False,
        **options: Any,
    ) -> None:
        """Args:
        model_key: The server's name of the model.
        patience: How long to wait.
        traffic: Where bytes are counted.
        poll_for_result: See above.
        **options: Those of nnsight's backend.
        """
        super().__init__(model_key, **options)
        self.display.enabled = False
        self.patience, self.traffic, self.poll_for_result = patience, traffic, poll_for_result

    def _serialize(self, tracer: Any) -> bytes:
        blob: bytes = super()._serialize(tracer)
        self.traffic.requests += 1
        self.traffic.sent += len(blob)
        return blob

    def finalize(self, content: bytes) -> Any:
        """See `RemoteBackend.finalize`."""
        self.traffic.received += len(content)
        return super().finalize(content)

    def note(self, response: Any) -> bool:
        """See `RemoteBackend.note`; states are logged for `nla_lens.remote`."""
        self.status = response.status
        _log.info("%s %s %s", response.id, response.status.value, response.description)
        return super().note(response)

    def request(self, request: RequestModel, tracer: Any) -> Any:
        """Sends a job and waits for its result.

        Raises:
            SilenceError: No word for too long.
        """
        blob = self._serialize(tracer)
        if self.poll_for_result:
            return self._polled(request, blob)
        connection = self._again(self._subscribed)
        try:
            request.session_id = json.loads(connection.recv())["session_id"]
            # From here on nothing is sent twice: the server may have taken the job.
            self.send(request, blob)
            return self._awaited(connection)
        finally:
            connection.close()

    def _again(self, step: Any) -> Any:
        """Does what is free of cost until it succeeds or patience ends."""
        return Retrying(
            retry=retry_if_exception_type(_PASSING),
            wait=wait_random_exponential(multiplier=0.2, max=3),
            stop=stop_after_delay(self.patience.connect),
            reraise=True,
        )(step)

    def _subscribed(self) -> Any:
        return websocket.create_connection(
            f"{self.ws_host}/subscribe",
            header={"ndif-api-key": self.api_key} if self.api_key else None,
            timeout=self.patience.connect,
        )

    def _awaited(self, connection: Any) -> Any:
        connection.settimeout(min(_TICK, self.patience.running))
        heard = time.monotonic()
        while True:
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                self._check_silence(heard)
                continue
            heard = time.monotonic()
            response = self.parse(message)
            result = self.handle(response)
            if response.status == Status.COMPLETED:
                return result

    def _polled(self, request: RequestModel, blob: bytes) -> Any:
        response = self._post(request, blob)
        self.job_id, last, heard, pause = response.id, response.status, time.monotonic(), 0.1
        self.note(response)
        while True:
            result = self._again(self.poll)
            if result is not None:
                return result
            if self.status != last:
                last, heard, pause = self.status, time.monotonic(), 0.1
            self._check_silence(heard)
            time.sleep(pause)
            pause = min(pause * 1.5, 5.0)

    def _check_silence(self, heard: float) -> None:
        limit = self.patience.after(self.status)
        if time.monotonic() - heard > limit:
            raise SilenceError(self.status.value if self.status else "nothing", limit)


class SimulatedBackend(LocalSimulationBackend):
    """nnsight's simulation of a server in this process, with bytes counted.

    The model's weights are loaded here, as they would be there.
    """

    def __init__(self, model: Any, traffic: Traffic) -> None:
        super().__init__(model)
        self.traffic = traffic

    def __call__(self, tracer: Any) -> None:
        """Sends to itself, and runs."""
        self.traffic.requests += 1
        self.traffic.sent += len(RequestModel.serialize(tracer, compress=True))
        super().__call__(tracer)
