"""Shows a store on this machine while a job goes on writing it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import click

from nla_lens.errors import NLAError
from nla_lens.results.page import to_data
from nla_lens.results.store import Store, open_store

_log = logging.getLogger(__name__)
_HERE = ("127.0.0.1", "localhost", "[::1]")


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
    # A page asks every two seconds; what has not changed is not read again.
    about = lru_cache(maxsize=1)(lambda token: open_store(store.path).about())

    def page() -> tuple[str, str]:
        now = open_store(store.path)
        return now.page(limit=limit, live=_token(now)), "text/html"

    def data() -> tuple[str, str]:
        now = open_store(store.path)
        token = _token(now)
        return to_data(now.documents(limit), live=token), "application/json"

    def state() -> tuple[str, str]:
        now = open_store(store.path)
        token = _token(now)
        found = {"token": token, "complete": now.complete, "about": about(token)}
        return json.dumps(found), "application/json"

    answers = {"/": page, "/state": state, "/data": data}
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), _handler(answers))
    except (OSError, OverflowError) as error:
        raise NLAError(f"--port {port} cannot be used: {error}; 0 takes any") from error


def _token(store: Store) -> str:
    return f"{len(store.shards)}-{len(store)}"


def _handler(answers: dict[str, Callable[[], tuple[str, str]]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "nla-lens", ""

        def do_GET(self) -> None:
            # A page of somebody else's may name this address by a name of its own.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in _HERE or self.path not in answers:
                self.send_error(404)
                return
            try:
                content, kind = answers[self.path]()
            except NLAError as error:
                self.send_error(503, explain=str(error))
                return
            body = content.encode()
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
