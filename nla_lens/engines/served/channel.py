"""Requests to a server, several at once, in a thread of their own that ends with the work.

An event loop instead of a pool of threads: a request under way can be given up at once, which also
makes the server stop working on it, and Ctrl-C never waits for an answer.

Only what was certainly not run is sent again: no connection came about, or the server said that it
is too busy (429, 502, 503). A request that got lost on the way may have run, and is paid work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent import futures
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from nla_lens.engines.http import clean_logs
from nla_lens.engines.served.client import need_packages, open_client
from nla_lens.engines.served.server import Server
from nla_lens.errors import NLARemoteError
from nla_lens.foreign import harmless, scrub, without_key_in

if TYPE_CHECKING:
    import httpx

_log = logging.getLogger(__name__)

_JOIN_SECONDS: Final = 5.0
_TOO_BUSY: Final = (429, 502, 503)
_SMALL_ANSWER: Final = 4 << 20
_MOST_WORDS: Final = 400
MODELS: Final = "/v1/models"
Tell = Callable[[int, str], "NLARemoteError | None"]
"""Status and words of a refusal -> what it means for this kind of server; None: nothing special."""


class _NotRunError(Exception):
    """The request was not run, and may be sent again.

    Attributes:
        told: What it is if it stays so.
        was_away: Whoever answers next may be another.
    """

    def __init__(self, told: NLARemoteError, *, was_away: bool) -> None:
        super().__init__(str(told))
        self.told, self.was_away = told, was_away


class Channel:
    """Connections to one server; a context manager."""

    def __init__(
        self,
        server: Server,
        tell: Tell = lambda status, words: None,
        confirm: Callable[[Any], None] = lambda models: None,
    ) -> None:
        """Args:
        server: Where, and how patiently.
        tell: What a refusal means.
        confirm: Raises an NLARemoteError if what a server that was away lists as its models is
            not what it was.

        Raises:
            NLAError: httpx or tenacity is not installed.
        """
        need_packages()
        self._server, self._tell, self._confirm = server, tell, confirm
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._client: httpx.AsyncClient | None = None

    def __enter__(self) -> Channel:
        """Raises:
        NLARemoteError: The environment's proxy or certificates cannot be used.
        """
        wrong = ""
        try:
            self._client = open_client(self._server)
        # Of a proxy's address, or a file of certificates: httpx raises anything.
        except Exception as error:
            wrong = self._quoted(error)
        if self._client is None:
            self._loop.close()
            # Not raised where it was caught: what a tool shows of a traceback includes the key.
            raise self._error(
                f"cannot be asked with this environment ({wrong}): look at HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR",
                "settings",
            )
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(futures.TimeoutError):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_JOIN_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    async def _close(self) -> None:
        """Gives up what is under way; the server sees the connections close, and stops."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    def get(self, path: str) -> Any:
        """The parsed answer to a GET.

        Raises:
            NLARemoteError: There is none.
        """
        return self._run(self._called("GET", path, None, _SMALL_ANSWER)).result()

    def post(
        self, path: str, body: Mapping[str, Any] | bytes, limit: int = _SMALL_ANSWER
    ) -> Future[Any]:
        """Sends a request; the future holds its parsed answer, or an NLARemoteError.

        Args:
            path: From the server's root on.
            body: JSON.
            limit: Most bytes the answer may have.
        """
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._run(self._called("POST", path, sent, limit))

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(self._told(coroutine), self._loop)

    async def _told(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What came of a request; an error of it without those of httpx, whose frames hold the key.

        Raises:
            NLARemoteError: Whatever went wrong.
        """
        failure: NLARemoteError
        clean_logs(self._server.api_key)
        try:
            return await coroutine
        except NLARemoteError as error:
            failure = error
        except Exception as error:
            failure = self._error(f"could not be asked ({self._quoted(error)})")
        failure.__cause__ = failure.__context__ = None
        raise failure.with_traceback(None)

    async def _called(self, method: str, path: str, body: bytes | None, limit: int) -> Any:
        import tenacity

        was_away = False

        async def attempt() -> bytes:
            nonlocal was_away
            try:
                if was_away and method == "POST":
                    models = await self._once("GET", MODELS, None, _SMALL_ANSWER)
                    self._confirm(self._parsed(MODELS, models))
                return await self._once(method, path, body, limit)
            except _NotRunError as error:
                was_away = was_away or error.was_away
                raise

        data: bytes
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_NotRunError),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=5.0),
            stop=tenacity.stop_after_delay(self._server.patience),
            reraise=True,
        )
        try:
            data = await retrying(attempt)
        except _NotRunError as error:
            raise error.told from None
        return self._parsed(path, data)

    def _parsed(self, path: str, data: bytes) -> Any:
        try:
            # A server may repeat the key anywhere, and its words are quoted.
            found = without_key_in(json.loads(data), self._server.api_key)
        # Deeply nested: RecursionError.
        except (ValueError, RecursionError):
            raise self._error(f"answered {path} with something that is not JSON") from None
        if isinstance(found, Mapping) and (found.get("error") or found.get("object") == "error"):
            raise self._refusal(200, path, self._words(data))
        return found

    async def _once(self, method: str, path: str, body: bytes | None, limit: int) -> bytes:
        try:
            exchange = self._exchange(method, path, body, limit)
            status, data = await asyncio.wait_for(exchange, self._server.timeout)
        except asyncio.TimeoutError:
            raise self._error(
                f"has not answered {path} within {self._server.timeout:g} s; the request may still "
                "be running there, so it is not sent again by itself. Ask again for the vectors "
                "that are missing, with a smaller batch_size= or url=Server(URL, timeout=...)",
                "silent",
            ) from None
        if status == 200:
            return data
        told = self._refusal(status, path, self._words(data))
        if status in _TOO_BUSY:
            _log.info("HTTP %d from %s%s; trying again", status, self._server.url, path)
            raise _NotRunError(told, was_away=status != 429)
        raise told

    async def _exchange(
        self, method: str, path: str, body: bytes | None, limit: int
    ) -> tuple[int, bytes]:
        """Status and body, in one go.

        Raises:
            _NotRunError: No connection came about.
            NLARemoteError: It broke, or what came is not to be read.
        """
        import httpx

        client: Any = self._client
        try:
            async with client.stream(method, path, content=body) as response:
                return response.status_code, await self._read(response, path, limit)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _NotRunError(self._unreachable(error), was_away=True) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise self._error(
                f"hung up before {path} was answered ({self._quoted(error)}). The request may have "
                "run, so it is not sent again by itself: look at the server's log, start it again, "
                "and ask for the vectors that are missing; what was finished is in the error's "
                "explanations",
                "lost",
            ) from None

    async def _read(self, response: Any, path: str, limit: int) -> bytes:
        # Undone here, a few compressed bytes could fill the memory.
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._error(f"answered {path} compressed, which was not asked for")
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > limit:
                raise self._error(f"answered {path} with more than {limit} bytes")
        return bytes(data)

    def _refusal(self, status: int, path: str, words: str) -> NLARemoteError:
        told = self._tell(status, words)
        if told is not None:
            return told
        said = f"answered {path} with HTTP {status}" + (f" ({words})" if words else "")
        if status in (401, 403):
            remedy = "pass url=Server(URL, api_key=...) or set NLA_LENS_API_KEY"
            return self._error(f"does not accept the API key: it {said}; {remedy}", "key")
        if status in _TOO_BUSY:
            return self._error(f"{said}, time and again; try later, or with less at once", "busy")
        if status == 413:
            return self._error(f"{said}; pass a smaller batch_size=", "too_large")
        if status == 404:
            return self._error(f"{said}: is url= that of a vLLM or SGLang server?", "not_found")
        if 300 <= status < 400:
            return self._error(f"{said}: it sends requests elsewhere; pass that url=")
        if "out of memory" in words.lower():
            return self._error(f"{said}; pass a smaller batch_size=", "memory")
        return self._error(f"{said}; look at its log")

    def _unreachable(self, error: Exception) -> NLARemoteError:
        return self._error(
            f"cannot be reached ({self._quoted(error)}): is it running, and is url= right?",
            "unreachable",
        )

    def _error(self, what: str, cause: str = "failed") -> NLARemoteError:
        return self._server.error(what, cause)

    def _quoted(self, error: Exception) -> str:
        return self._clean(str(error) or type(error).__name__)

    def _words(self, data: bytes) -> str:
        """What an error's body says."""
        try:
            said: Any = json.loads(data)
        except (ValueError, RecursionError):
            said = data.decode("utf-8", "replace")
        for key in ("error", "message"):
            if isinstance(said, Mapping) and key in said:
                said = said[key]
        if isinstance(said, Mapping):
            said = said.get("detail", said)
        return self._clean(str(said))

    def _clean(self, text: str) -> str:
        """One short line without the key and without anything that steers a terminal."""
        line = harmless(" ".join(scrub(text, self._server.api_key).split()))
        return line if len(line) <= _MOST_WORDS else f"{line[:_MOST_WORDS]}…"
