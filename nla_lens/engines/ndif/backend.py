"""One job on an NDIF server: sent, waited for with time-outs, counted.

nnsight's own backend waits for ever when a model's process hangs, and draws on the terminal; this
one does neither, and takes the server and the key from nnsight's configuration like it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final, TypeVar

import httpx
import websocket
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from nla_lens.engines.ndif.errors import SilenceError, StoreError
from nla_lens.engines.ndif.patience import Patience, Traffic
from nla_lens.engines.ndif.results import MOST_BYTES, read_result
from nla_lens.engines.ndif.wire import BoundedSocket, ask, detail, read_response, session, word
from nla_lens.foreign import harmless, scrub
from nla_lens.progress import show_state

T = TypeVar("T")
_log = logging.getLogger("nla_lens.remote")
_TICK: Final = 1.0
_GATEWAY_ERRORS: Final = (502, 503, 504)


class NDIFBackend(RemoteBackend):
    """A job that is waited for, by websocket or by polling.

    Attributes:
        patience: How long to wait.
        traffic: Where bytes are counted.
        most_bytes: Of a result, as it travels and unpacked.
        poll_for_result: Submit without a connection and ask for the result: a lost connection then
            costs nothing.
    """

    job_id: str | None

    def __init__(
        self,
        model_key: str,
        patience: Patience,
        traffic: Traffic,
        *,
        poll_for_result: bool = False,
        most_bytes: int = MOST_BYTES,
        **options: Any,
    ) -> None:
        """Args:
        model_key: The server's name of the model.
        patience: How long to wait.
        traffic: Where bytes are counted.
        poll_for_result: See above.
        most_bytes: See above.
        **options: Those of nnsight's backend.
        """
        super().__init__(model_key, **options)
        self.display.enabled = False
        self.patience, self.traffic, self.poll_for_result = patience, traffic, poll_for_result
        self.most_bytes = most_bytes
        self._said: tuple[str, ...] = ()

    def _serialize(self, tracer: Any) -> bytes:
        blob: bytes = super()._serialize(tracer)
        self.traffic.requests += 1
        self.traffic.sent += len(blob)
        return blob

    def finalize(self, content: bytes) -> Any:
        """See `RemoteBackend.finalize`, which would run a server's code."""
        self.traffic.received += len(content)
        return read_result(content, compressed=self.compress, most_bytes=self.most_bytes)

    def parse(self, message: str | bytes) -> ResponseModel:
        """See `RemoteBackend.parse`, which would run a server's code."""
        return read_response(message, self.most_bytes)

    def note(self, response: Any) -> bool:
        """See `RemoteBackend.note`; states are logged for `nla_lens.remote`, and shown."""
        job_id, self.job_id = self.job_id, response.id
        if job_id not in (None, response.id):
            raise RemoteError("the server answers with the state of another job")
        words = (harmless(scrub(w, self.api_key)) for w in (response.id, response.description))
        said = (next(words), response.status.value, next(words))
        # Whoever polls hears the same again and again.
        if said != self._said:
            self._said = said
            _log.info("%s %s %s", *said)
        # What a running block prints comes as a LOG, and says nothing of the job's state.
        if response.status != Status.LOG:
            self.status = response.status
            show_state(self._state())
        return super().note(response)

    def _state(self) -> str:
        return self.status.value.lower() if self.status else "sent"

    def request(self, request: RequestModel, tracer: Any) -> Any:
        """Sends a job and waits for its result.

        Raises:
            SilenceError: No word for too long.
        """
        blob = self._serialize(tracer)
        if self.poll_for_result:
            return self._polled(request, blob)
        connection, request.session_id = self._again(self._subscribed, self.patience.connect)
        try:
            self.send(request, blob)
            return self._awaited(connection)
        finally:
            connection.close()

    def _again(self, step: Callable[[], T], seconds: float) -> T:
        """Does what is free of cost until it succeeds or time is up."""
        return Retrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_random_exponential(multiplier=0.2, max=3),
            stop=stop_after_delay(seconds),
            reraise=True,
        )(step)

    def _subscribed(self) -> tuple[Any, str]:
        """A connection, and the server's name for it."""
        connection = BoundedSocket.opened(
            f"{self.ws_host}/subscribe",
            self.patience.connect,
            most_bytes=self.most_bytes,
            header=self._key() or None,
        )
        try:
            return connection, session(word(connection))
        except BaseException:
            connection.close()
            raise

    def _post(self, request: RequestModel, blob: bytes) -> Any:
        """See `RemoteBackend._post`, which waits 600 s for an answer and can be told no less."""
        # Tried again only where the server cannot have taken the job: see `_may_pass`.
        return self._again(lambda: self._posted(request, blob), self.patience.connect)

    def _posted(self, request: RequestModel, blob: bytes) -> ResponseModel:
        """What nnsight's `_post` does, of whose answer there is no end."""
        told = {
            "ndif-timestamp": repr(time.time()),
            "nnsight-version": version("nnsight"),
            "python-version": sys.version,
        }
        try:
            answer = ask(
                "POST",
                f"{self.host}/request",
                seconds=self.patience.answer,
                connect=self.patience.connect,
                headers={**told, **self._key()},
                data={"data": request.metadata()},
                files={"blob": ("request", blob, "application/octet-stream")},
            )
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise SilenceError("the request was sent", self.patience.answer) from None
        except httpx.HTTPError as error:
            raise RemoteError(f"Failed to send request: {error}") from error
        if answer.status != httpx.codes.OK:
            raise RemoteError(f"Failed to send request: {detail(answer)}")
        return read_response(answer.text, self.most_bytes)

    def _key(self) -> dict[str, str]:
        return {"ndif-api-key": self.api_key} if self.api_key else {}

    def _awaited(self, connection: Any) -> Any:
        connection.settimeout(min(_TICK, self.patience.running, self.patience.queued))
        heard = time.monotonic()
        while True:
            try:
                message = word(connection)
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
        heard, pause = time.monotonic(), 0.1
        self.note(response)
        while True:
            last = self.status
            try:
                result = self._again(self.poll, self.patience.answer)
            except httpx.TransportError:
                # The job goes on, so this is not a server that cannot be reached.
                raise SilenceError(self._state(), self.patience.answer) from None
            if result is not None:
                return result
            if self.status != last:
                heard, pause = time.monotonic(), 0.1
            self._check_silence(heard)
            time.sleep(pause)
            pause = min(pause * 1.5, 5.0)

    def poll(self, tracer: Any = None) -> Any:
        """See `RemoteBackend.poll`, which waits 600 s for an answer and can be told no less."""
        answer = ask(
            "GET",
            f"{self.host}/response/{self.job_id}",
            headers=self._key(),
            seconds=min(self.patience.connect, self.patience.answer),
        )
        # No state is written down yet.
        if answer.status == httpx.codes.NOT_FOUND:
            return None
        if answer.status != httpx.codes.OK:
            raise RemoteError(f"Failed to ask for a result: {detail(answer)}")
        return self.handle(self.parse(answer.text))

    def download_result(self, url: Any) -> Any:
        """See `RemoteBackend.download_result`; what is paid for is asked for more than once."""
        if isinstance(url, (bytes, bytearray)):
            return self.finalize(bytes(url))
        if not isinstance(url, str) or not url:
            raise StoreError("the server says that the job is done, and gives no result")
        if scrub(url, self.api_key) != scrub(url, None):
            raise StoreError("the server names a place with the API key in its address")
        try:
            content = self._again(lambda: self._fetched(url), self.patience.connect)
        # ValueError: of what is no address.
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise StoreError(str(error)) from error
        return self.finalize(content)

    def _fetched(self, url: str) -> bytes:
        answer = ask(
            "GET",
            url,
            seconds=self.patience.answer,
            connect=self.patience.connect,
            most_bytes=self.most_bytes,
        )
        if answer.status != httpx.codes.OK:
            raise StoreError(f"HTTP {answer.status} from {url}")
        return answer.content

    def _check_silence(self, heard: float) -> None:
        """Also lets a bar's clock go on."""
        show_state(self._state())
        limit = self.patience.after(self.status)
        if time.monotonic() - heard > limit:
            raise SilenceError(self._state(), limit)


def _may_pass(error: BaseException) -> bool:
    """Whether it may pass by itself, and trying again costs nothing.

    A job is never sent again once the server may have taken it.
    """
    if isinstance(error, RemoteError):
        # From the submission: there was no connection, or ndif refused before looking at the job.
        refused = isinstance(error.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))
        return refused or "compute backend is reconnecting" in str(error)
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _GATEWAY_ERRORS
    free = (ConnectionError, TimeoutError, httpx.TransportError, websocket.WebSocketException)
    return isinstance(error, free)
