"""`nla-lens doctor`, against a server that answers as ndif 0.1 does."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nla_lens import NLAError
from nla_lens.cli.doctor import doctor, examine

pytest.importorskip("nnsight")
pytest.importorskip("tenacity")

from nnsight.schema.config import CONFIG

KEY = "0b5e1f6a-1111-4222-8333-94a5b6c7d8e9"


@pytest.fixture
def answers() -> dict[str, Any]:
    """What the server says, by path; a number is a status code."""
    packages = {name: version(name) for name in ("nnsight", "transformers")}
    return {
        "/ping": "pong",
        "/connected": {"status": "connected"},
        "/whoami": {"email": "someone@example.org", "tags": []},
        "/env": {"python_version": "3.12", "packages": packages},
        "/status": {"deployments": {}},
        # Those it takes; None takes all.
        "keys": None,
    }


@pytest.fixture
def host(answers: dict[str, Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers[self.path]
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def do_POST(self) -> None:
            # As ndif does: the key first, then what is missing.
            self.rfile.read(int(self.headers["content-length"]))
            wanted = answers["keys"]
            refused = wanted is not None and self.headers["ndif-api-key"] not in wanted
            self.send_response(403 if refused else 422)
            self.end_headers()
            self.wfile.write(json.dumps({"detail": "Invalid API key."}).encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def deployed(repo: object, state: str = "RUNNING") -> dict[str, Any]:
    """An entry of /status, as a server in its test configuration writes it."""
    suffix = json.dumps({"repo_id": str(repo), "revision": None, "task": "text-generation"})
    key = f"ab12c:ModelActor:nnsight.modeling.transformers.TransformersModel:{suffix}"
    return {key: {"application_state": state}}


@pytest.fixture
def pair(pair_dirs: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return pair_dirs("llama", "replace")


def run(host: str, pair: tuple[Path, Path]) -> tuple[int, str]:
    arguments = [str(pair[0]), "--ar", str(pair[1]), "--engine", f"ndif:{host}"]
    result = CliRunner().invoke(doctor, arguments, catch_exceptions=False)
    return result.exit_code, result.output


def test_all_is_well(
    host: str,
    pair: tuple[Path, Path],
    answers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CONFIG.API, "APIKEY", KEY)
    source = {"x": {"repo_id": "test/llama-source", "application_state": "RUNNING"}}
    answers["/status"]["deployments"] = deployed(pair[0]) | deployed(pair[1]) | source
    status, output = run(host, pair)
    assert status == 0, output
    assert [line[:4] for line in output.splitlines()] == ["ok  "] * 7
    assert "someone@example.org" in output and KEY not in output


def test_what_is_wrong_is_said(
    host: str,
    pair: tuple[Path, Path],
    answers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    answers["/env"]["packages"]["transformers"] = "4.1.0"
    answers["/status"]["deployments"] = deployed(pair[0], "DEPLOYING")
    status, output = run(host, pair)
    assert status == 1
    assert "none is configured" in output and "nnsight login" in output
    assert "4.1.0 there" in output and "pip install transformers==4.1.0" in output
    assert f"{pair[0]} is DEPLOYING" in output
    assert f"{pair[1]} is not deployed" in output and "ndif deploy" in output
    answers |= {"/whoami": 503, "/env": 504, "/status": 503}
    monkeypatch.setattr(CONFIG.API, "APIKEY", KEY)
    status, output = run(host, pair)
    assert status == 0 and output.count("does not say") == 2 and KEY not in output
    answers["/connected"] = 503
    status, output = run(host, pair)
    assert status == 1 and "no contact with its models" in output


def test_a_key_is_good_or_not(
    host: str,
    pair: tuple[Path, Path],
    answers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers["/whoami"] = {"email": None, "tags": []}
    for key, keys, said in (
        (KEY, None, "ok   the API key: the server takes it"),
        (None, None, "none is configured, and this server wants none"),
        (KEY, [], "FAIL the API key: the server refuses it (Invalid API key.)"),
        (None, [KEY], "FAIL the API key: the server refuses it (Invalid API key.)"),
    ):
        monkeypatch.setattr(CONFIG.API, "APIKEY", key)
        answers["keys"] = keys
        status, output = run(host, pair)
        assert said in output and status == 1
        assert KEY not in output


def test_each_revision_is_a_model(
    host: str, pair: tuple[Path, Path], answers: dict[str, Any]
) -> None:
    other = {"repo_id": str(pair[0]), "revision": "v2", "application_state": "RUNNING"}
    answers["/status"]["deployments"] = {"x": other} | deployed(pair[1])
    _, output = run(host, pair)
    assert f"{pair[0]} is not deployed (but other revisions are: v2)" in output
    assert f"{pair[1]} is up" in output


def test_a_server_that_is_away(pair: tuple[Path, Path]) -> None:
    status, output = run("http://127.0.0.1:9", pair)
    assert status == 1
    assert output.startswith("FAIL the server answers: no answer from http://127.0.0.1:9")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("engine", ["transformers", "ndif:local", "ndif:ftp://x"])
def test_engines_without_a_server(engine: str, pair: tuple[Path, Path]) -> None:
    with pytest.raises(NLAError, match="engine="):
        list(examine(str(pair[0]), engine=engine))
