"""Shows a store on this machine while a job goes on writing it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, TypeAlias

import click

from nla_lens.errors import NLAError
from nla_lens.results.manifest import MANIFEST
from nla_lens.results.page import to_data
from nla_lens.results.store import Store, open_store, told

_log = logging.getLogger(__name__)
_HERE = ("127.0.0.1", "localhost", "[::1]")
_MOST_CONNECTIONS: Final = 32
_SECONDS: Final = 10.0
"""For a request to come, and for an answer to be taken: nobody is far away."""

Answer: TypeAlias = Callable[[], tuple[bytes, str]]
"""What gives a body and its type."""


def serve_store(store: Store, *, port: int, limit: int | None, open_it: bool) -> None:
    """Serves until Ctrl-C.

    Raises:
        NLAError: The port is taken.
    """
    with make_server(store, port, limit) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        click.echo(f"{address} shows {store.path}; Ctrl-C ends it")
        if open_it:
            click.launch(address)
        server.serve_forever()


def make_server(store: Store, port: int, limit: int | None) -> ThreadingHTTPServer:
    """A server on loopback.

    `/` is the page, `/state` says whether it is still up to date, `/data` is what it shows now.

    Raises:
        NLAError: The port is taken.
    """

    def page(now: Store, token: str) -> bytes:
        return now.page(limit=limit, live=token).encode()

    def data(now: Store, token: str) -> bytes:
        return to_data(now.documents(limit), live=token).encode()

    def state(now: Store, token: str) -> bytes:
        found = {"token": token, "complete": now.complete, "about": now.about()}
        return json.dumps(found).encode()

    def answering(make: Callable[[Store, str], bytes], kind: str) -> Answer:
        # A page asks every two seconds; what has not changed is not read again, and is in memory
        # once, however many ask and do not listen.
        lock = threading.Lock()
        kept = lru_cache(maxsize=1)(lambda token: make(open_store(store.path), token))

        def answer() -> tuple[bytes, str]:
            with lock:
                return kept(_token(open_store(store.path))), kind

        return answer

    answers = {
        "/": answering(page, "text/html"),
        "/state": answering(state, "application/json"),
        "/data": answering(data, "application/json"),
    }
    try:
        return _Server(("127.0.0.1", port), _handler(answers))
    except (OSError, OverflowError) as error:
        raise NLAError(f"--port {port} cannot be used: {error}; 0 takes any") from error


def _token(store: Store) -> str:
    """Another one whenever a store has grown, or another is in its place."""
    with told(store.path):
        stats = [path.stat() for path in (store.path / MANIFEST, *store.shards.values())]
    return f"{len(stats)}-{len(store)}-{max(found.st_mtime_ns for found in stats)}"


class _Server(ThreadingHTTPServer):
    """One that no connections fill, and that says nothing on the terminal of those that break."""

    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self._room = threading.Semaphore(_MOST_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a connection broke", exc_info=True)


def _handler(answers: dict[str, Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "nla-lens", ""
        timeout = _SECONDS

        def do_GET(self) -> None:
            # A page of somebody else's may name this address by a name of its own.
            hosts = self.headers.get_all("Host") or []
            are_ours = [host.rpartition(":")[0] in _HERE for host in hosts]
            if are_ours != [True] or self.path not in answers:
                self.send_error(404)
                return
            try:
                body, kind = answers[self.path]()
            except NLAError as error:
                self.send_error(503, explain=str(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            _log.debug(format, *args)

    return Handler
