"""What travels to and from an NDIF server: requests and messages, each with a limit to its size.

httpx undoes compression by itself, and a few bytes can then fill the memory: none is asked for, and
none is undone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import websocket
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.response import ResponseModel

from nla_lens.engines.http import clean_logs, import_anyio
from nla_lens.engines.ndif.errors import SettingsError, SilenceError, StoreError
from nla_lens.engines.ndif.messages import read_message
from nla_lens.engines.ndif.results import MOST_BYTES
from nla_lens.engines.ndif.time_limit import within

MOST_WORDS: Final = 4 << 20
"""Bytes of an answer that is no result: a state, a list of models, a refusal."""
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_SLOWEST: Final = 16 << 10
"""Bytes of an answer a second, beyond which a server is only keeping one waiting."""
_GRACE_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    content: bytes

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """The content as JSON.

        Raises:
            ValueError: It is none.
        """
        try:
            return json.loads(self.content)
        except RecursionError:
            raise ValueError("JSON nested too deep") from None


def ask(
    method: str,
    url: str,
    *,
    seconds: float,
    connect: float | None = None,
    most_bytes: int = MOST_WORDS,
    headers: Mapping[str, str] | None = None,
    **sent: Any,
) -> Answer:
    """One request.

    Args:
        method: GET or POST.
        url: Whole.
        seconds: Until there is an answer; a long one has another for each 16 KiB that came.
        connect: Until there is a connection, where that is less.
        most_bytes: Most that is read.
        headers: More of them.
        **sent: What is sent, as httpx takes it.

    Raises:
        httpx.HTTPError: No answer in time, or one that is too large or compressed.
        httpx.HTTPStatusError: A status of 500 and more.
        SettingsError: The environment's proxy or certificates cannot be used.
    """
    wanted = {"Accept-Encoding": "identity", **(headers or {})}
    limits = httpx.Timeout(seconds, connect=seconds if connect is None else min(connect, seconds))

    import_anyio()

    def run() -> Answer:
        return asyncio.run(_asked(method, url, limits, most_bytes, headers=wanted, **sent))

    # In a thread, as an event loop may be running in this one. It ends itself, unless a name server
    # is what does not answer.
    longest = seconds + most_bytes / _SLOWEST + _GRACE_SECONDS
    try:
        return within(longest, "asked", run)
    except SilenceError:
        raise httpx.ReadTimeout(f"no answer within {longest:g} s") from None


async def _asked(method: str, url: str, limits: Any, most_bytes: int, **sent: Any) -> Answer:
    """httpx's own limits are for each piece, of which there may be any number."""
    until, seconds = time.monotonic() + limits.read, limits.read
    clean_logs(sent["headers"].get("ndif-api-key"))
    # Proxies are not for loopback.
    trust_env = urlsplit(url).hostname not in _LOOPBACK
    try:
        opened = httpx.AsyncClient(timeout=limits, trust_env=trust_env)
    # A proxy or a file of certificates that cannot be used: httpx raises anything.
    except Exception as error:
        raise SettingsError(f"{type(error).__name__}: {error}") from None
    try:
        async with opened as client:
            request = client.build_request(method, url, **sent)
            response = await asyncio.wait_for(client.send(request, stream=True), seconds)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise httpx.DecodingError("compressed, which was not asked for")
            content, pieces = bytearray(), response.aiter_raw()
            while True:
                left = until + len(content) / _SLOWEST - time.monotonic()
                piece = await asyncio.wait_for(anext(pieces, None), max(left, 0.0))
                if piece is None:
                    break
                content += piece
                if len(content) > most_bytes:
                    raise httpx.DecodingError(f"more than {most_bytes} bytes")
            if response.is_server_error:
                response.raise_for_status()
            return Answer(response.status_code, bytes(content))
    except asyncio.TimeoutError:
        raise httpx.ReadTimeout(f"no whole answer within {seconds:g} s") from None


def read_response(message: str | bytes, most_bytes: int = MOST_BYTES) -> ResponseModel:
    """A server's word on a job.

    Raises:
        RemoteError: It is none.
        NLARemoteError: It holds more than tensors and plain values.
    """
    # As bytes it is an archive, with the result in it.
    if isinstance(message, (bytes, bytearray)):
        if len(message) > most_bytes:
            raise RemoteError("the server says more than it may")
        fields = read_message(bytes(message))
        if isinstance(fields, dict) and all(isinstance(name, str) for name in fields):
            with contextlib.suppress(ValueError):
                return ResponseModel(**fields)
    elif len(message) <= MOST_WORDS:
        with contextlib.suppress(ValueError, RecursionError):
            return ResponseModel.model_validate_json(message)
    raise RemoteError("the server says something that is no state of a job")


def session(message: Any) -> str:
    """The server's name for a connection, from its first word there."""
    found = Answer(0, message if isinstance(message, bytes) else message.encode()).json()
    session = found.get("session_id") if isinstance(found, dict) else None
    if not isinstance(session, str):
        raise RemoteError("the server gives a connection no name (session_id)")
    return session


def detail(answer: Answer) -> str:
    """What a refusal says: FastAPI's {"detail": ...}, or the whole of it."""
    try:
        body = answer.json()
    except ValueError:
        body = answer.text
    said = body.get("detail") if isinstance(body, dict) else body
    return str(said or f"HTTP {answer.status}")


class BoundedSocket(websocket.WebSocket):
    """A connection on which no message is larger, or later, than one is willing to take."""

    def __init__(self, *args: Any, most_bytes: int = MOST_BYTES, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most, self._heard, self._until = most_bytes + (1 << 16), 0, float("inf")

    @classmethod
    def opened(
        cls, url: str, seconds: float, *, most_bytes: int, header: Mapping[str, str] | None
    ) -> BoundedSocket:
        """A connection to a server that answers in time, and from where it was asked.

        Raises:
            websocket.WebSocketException: There is none.
        """
        connection = cls(most_bytes=most_bytes)
        connection.settimeout(seconds)

        def connect() -> None:
            # It would send the key to wherever a server points at.
            connection.connect(url, header=header, timeout=seconds, redirect_limit=0)

        try:
            within(seconds, "connecting", connect)
        except SilenceError:
            # Ends the thread as well, which reads what may have no end.
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.shutdown()
            raise websocket.WebSocketTimeoutException("no whole answer to a handshake") from None
        return connection

    def recv(self) -> Any:
        """See `WebSocket.recv`; pings and pieces of a message do not put its timeout off."""
        self._until = time.monotonic() + (self.gettimeout() or float("inf"))
        message = super().recv()
        self._heard = 0
        return message

    def _recv(self, bufsize: int) -> Any:
        if time.monotonic() >= self._until:
            raise websocket.WebSocketTimeoutException("no whole message")
        piece = super()._recv(bufsize)
        self._heard += len(piece)
        if self._heard > self._most:
            raise StoreError(f"a message of more than {self._most} bytes")
        return piece


def word(connection: Any) -> Any:
    """What the server says next; a polite goodbye is as final as a cut line."""
    message = connection.recv()
    if not message:
        raise websocket.WebSocketConnectionClosedException("the server closed the connection")
    return message
