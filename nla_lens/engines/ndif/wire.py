"""What travels to and from an NDIF server: requests and messages, each with a limit to its size.

httpx undoes compression by itself, and a few bytes can then fill the memory: none is asked for, and
none is undone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import websocket
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.response import ResponseModel

from nla_lens.engines.ndif.errors import SettingsError, StoreError
from nla_lens.engines.ndif.messages import read_message
from nla_lens.engines.ndif.results import MOST_BYTES

MOST_WORDS: Final = 4 << 20
"""Bytes of an answer that is no result: a state, a list of models, a refusal."""
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


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
    timeout: Any,
    most_bytes: int = MOST_WORDS,
    headers: Mapping[str, str] | None = None,
    **sent: Any,
) -> Answer:
    """One request.

    Args:
        method: GET or POST.
        url: Whole.
        timeout: httpx's, or seconds.
        most_bytes: Most that is read.
        headers: More of them.
        **sent: What is sent, as httpx takes it.

    Raises:
        httpx.HTTPError: No answer, or one that is too large or compressed.
        httpx.HTTPStatusError: A status of 500 and more.
        SettingsError: The environment's proxy or certificates cannot be used.
    """
    # Proxies are not for loopback.
    trust_env = urlsplit(url).hostname not in _LOOPBACK
    wanted = {"Accept-Encoding": "identity", **(headers or {})}
    try:
        opened = httpx.Client(timeout=timeout, trust_env=trust_env)
    # A proxy or a file of certificates that cannot be used: httpx raises anything.
    except Exception as error:
        raise SettingsError(f"{type(error).__name__}: {error}") from None
    with (
        opened as client,
        client.stream(method, url, headers=wanted, **sent) as response,
    ):
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx.DecodingError("compressed, which was not asked for")
        content = bytearray()
        for piece in response.iter_raw():
            content += piece
            if len(content) > most_bytes:
                raise httpx.DecodingError(f"more than {most_bytes} bytes")
        if response.is_server_error:
            response.raise_for_status()
        return Answer(response.status_code, bytes(content))


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
    else:
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
    """A connection on which no message is larger than one is willing to take."""

    def __init__(self, *args: Any, most_bytes: int = MOST_BYTES, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most, self._heard = most_bytes + (1 << 16), 0

    def recv(self) -> Any:
        """See `WebSocket.recv`."""
        message = super().recv()
        self._heard = 0
        return message

    def _recv(self, bufsize: int) -> Any:
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
