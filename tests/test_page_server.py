"""`nla-lens view --serve` asked by what is no browser of the user's, and beside a store that changes."""  # noqa: E501

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_lens import NLA, explain_corpus, open_store
from nla_lens.cli import page_server

pytest.importorskip("pyarrow")

SHORT: dict[str, Any] = {"max_new_tokens": 4, "score": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "s"
    return explain_corpus(NLA.from_pretrained("tiny"), torch.randn(40, 128), out, **SHORT).path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "s"))


@pytest.fixture
def port(store: Path) -> Iterator[int]:
    with page_server.make_server(open_store(store), 0, None) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def ask(port: int) -> Callable[..., bytes]:
    def asked(request: str) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request.replace("PORT", str(port)).encode("latin-1"))
            found = b""
            while piece := connection.recv(1 << 16):
                found += piece
        return found

    return asked


HOST = "Host: 127.0.0.1:PORT\r\n"


def state(ask: Callable[[str], bytes]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        ask(f"GET /state HTTP/1.1\r\n{HOST}\r\n").partition(b"\r\n\r\n")[2]
    )
    return found


@pytest.mark.parametrize(
    "request_",
    [
        "GET /data HTTP/1.1\r\nHost: evil.example:PORT\r\n\r\n",
        "GET /data HTTP/1.1\r\nHost: 127.0.0.1.evil.example:PORT\r\n\r\n",
        "GET /data HTTP/1.1\r\nHost: evil.example\r\n" + HOST + "\r\n",
        "GET /data HTTP/1.1\r\n" + HOST + "Host: evil.example\r\n\r\n",
        "GET /data HTTP/1.0\r\n\r\n",
        "GET http://evil.example/data HTTP/1.1\r\n" + HOST + "\r\n",
        "GET /../manifest.json HTTP/1.1\r\n" + HOST + "\r\n",
        "GET /data%00 HTTP/1.1\r\n" + HOST + "\r\n",
        "GET /data/ HTTP/1.1\r\n" + HOST + "\r\n",
        "POST /data HTTP/1.1\r\n" + HOST + "Content-Length: 9999999999\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\n" + HOST + "\r\n",
        "GET /" + "a" * 70_000 + " HTTP/1.1\r\n" + HOST + "\r\n",
        "GET /data HTTP/1.1\r\n" + HOST + "X: y\r\n" * 200 + "\r\n",
        "\x16\x03\x01\x02\x00\r\n\r\n",
    ],
)
def test_requests_that_get_nothing(
    request_: str, ask: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    found = ask(request_)
    assert b" 200 " not in found and b"raw_text" not in found and b"Traceback" not in found
    assert state(ask)["complete"] and capfd.readouterr().err == ""


def test_requests_in_one_piece_are_answered_once(ask: Callable) -> None:
    assert ask(f"GET /state HTTP/1.1\r\n{HOST}\r\n" * 3).count(b" 200 ") == 1


def test_connections_that_break_or_say_nothing(
    port: int, ask: Callable, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        reset = socket.create_connection(("127.0.0.1", port))
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.sendall(f"GET / HTTP/1.1\r\n{HOST}\r\n".replace("PORT", str(port)).encode())
        reset.close()
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    deadline = time.monotonic() + 10
    while threading.active_count() < before + 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + page_server._MOST_CONNECTIONS
    for connection in silent:
        connection.close()
    while time.monotonic() < deadline:
        if b" 200 " in ask(f"GET /state HTTP/1.1\r\n{HOST}\r\n"):
            break
    assert state(ask)["complete"]
    assert capfd.readouterr().err == "", "a traceback on the terminal"


def test_a_connection_that_says_nothing_ends(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "_SECONDS", 0.1)
    with page_server.make_server(open_store(store), 0, None) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as silent:
            assert silent.recv(1) == b""
        server.shutdown()


def test_a_store_that_is_made_anew_is_shown_anew(
    store: Path, ask: Callable, tmp_path: Path
) -> None:
    """As many rows and shards as before: only its files are others."""
    before = state(ask)
    assert state(ask) == before
    other = NLA.from_pretrained("tiny")
    shutil.rmtree(store)
    assert b" 503 " in ask(f"GET /state HTTP/1.1\r\n{HOST}\r\n")
    explain_corpus(other, torch.randn(40, 128), store, **SHORT)
    after = state(ask)
    assert after["token"] != before["token"]
    shown = ask(f"GET /data HTTP/1.1\r\n{HOST}\r\n")
    assert open_store(store).explanations()[0].text.encode()[:10] in shown
    (shard,) = open_store(store).shards.values()
    os.truncate(shard, 50)
    found = ask(f"GET /data HTTP/1.1\r\n{HOST}\r\n")
    assert b" 503 " in found and b"damaged" in found
