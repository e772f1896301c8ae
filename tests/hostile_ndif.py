"""An NDIF server on loopback that lies: it answers every job with what it is told to.

It speaks as much of ndif 0.1 as a client hears: `POST /request`, `GET /response/ID`, results at
`GET /result`, states on a websocket at `/subscribe`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.lying.heard.append((self.path, dict(self.headers)))
        self._answer(self.path)
        self.server.lying.posted.set()

    def do_GET(self) -> None:
        lying = self.server.lying
        lying.heard.append((self.path, dict(self.headers)))
        if self.path == "/subscribe" and not {*lying.statuses, *lying.endless} & {self.path}:
            self._subscribe()
        else:
            self._answer("/response" if "/response/" in self.path else self.path)

    def _answer(self, path: str) -> None:
        lying = self.server.lying
        if path in lying.endless:
            self._go_on(path)
        else:
            self._reply(lying.reasons.get(path), *lying.answer(path))

    def _go_on(self, path: str) -> None:
        once, again = self.server.lying.endless[path]
        self.wfile.write(once)
        while not self.server.lying.over.wait(0.02):
            self.wfile.write(again)

    def _reply(self, reason: str | None, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _subscribe(self) -> None:
        lying = self.server.lying
        accepted = hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + _GUID).digest()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(accepted).decode())
        self.end_headers()
        self._send(lying.session)
        lying.posted.wait(20)
        for message in lying.messages:
            self._send(message)
        if "ws" in lying.endless:
            self._go_on("ws")
        self.rfile.read(1)

    def _send(self, message: str | bytes) -> None:
        opcode = 0x82 if isinstance(message, bytes) else 0x81
        payload = message if isinstance(message, bytes) else message.encode()
        self.wfile.write(struct.pack("!BBQ", opcode, 127, len(payload)) + payload)
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


class _HTTP(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """A client that hangs up is no fault of a test."""


class LyingNDIF:
    """A context manager.

    Attributes:
        url: Where it is.
        answers: What it says by path; bytes, text, or what becomes JSON.
        headers: More headers by path.
        statuses: HTTP statuses by path, where it is not 200.
        reasons: What stands behind a status.
        endless: By path, or "ws" after the messages: what it sends once, and then for ever.
        session: Its first word on a websocket.
        messages: What it says there after the job was sent.
        heard: Path and headers of what was asked.
    """

    def __init__(self) -> None:
        self._http = _HTTP(("127.0.0.1", 0), _Handler)
        self._http.lying = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.answers: dict[str, Any] = {"/request": {"id": "1", "status": "RECEIVED"}}
        self.headers: dict[str, dict[str, str]] = {}
        self.statuses: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        self.endless: dict[str, tuple[bytes, bytes]] = {}
        self.over = threading.Event()
        self.session: str | bytes = json.dumps({"session_id": "s"})
        self.messages: list[str | bytes] = []
        self.heard: list[tuple[str, dict[str, str]]] = []
        self.posted = threading.Event()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """What it says to one request."""
        said = self.answers.get(path, b"")
        if not isinstance(said, (bytes, str)):
            said = json.dumps(said)
        body = said if isinstance(said, bytes) else said.encode("utf-8", "surrogatepass")
        return self.statuses.get(path, 200), self.headers.get(path, {}), body

    def completed(self, content: bytes | None) -> None:
        """Every job is done, and its result lies at /result."""
        self.answers["/response"] = {"id": "1", "status": "COMPLETED", "data": f"{self.url}/result"}
        self.messages = [json.dumps(self.answers["/response"])]
        self.answers["/result"] = content

    def __enter__(self) -> LyingNDIF:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()
