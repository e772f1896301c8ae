"""One job's time-outs, retries and states, without a server; with one, see `ndif_server/`."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from nla_lens import progress
from nla_lens.progress import show_state, waiting, with_progress

pytest.importorskip("nnsight")
httpx = pytest.importorskip("httpx")
websocket = pytest.importorskip("websocket")
pytest.importorskip("tenacity")

from nnsight.intervention.backends.remote import RemoteError  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402

from nla_lens.engines.ndif.backend import NDIFBackend, _may_pass  # noqa: E402
from nla_lens.engines.ndif.errors import SilenceError, StoreError  # noqa: E402
from nla_lens.engines.ndif.patience import Patience, Traffic  # noqa: E402
from nla_lens.engines.ndif.time_limit import within  # noqa: E402

Script = list[tuple[int, bytes]]


@pytest.fixture
def script() -> Script:
    """Status and body of the answers to come."""
    return []


@pytest.fixture
def host(script: Script) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = script.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def backend(host: str, monkeypatch: pytest.MonkeyPatch) -> NDIFBackend:
    patience = Patience(connect=5.0, answer=5.0, queued=0.3, running=0.1)
    made = NDIFBackend("key", patience, Traffic(), host=host)
    monkeypatch.setattr(made, "finalize", lambda content: {"content": content})
    return made


def state(status: Status, **fields: Any) -> ResponseModel:
    return ResponseModel(id="1", status=status, **fields)


def test_a_result_is_asked_for_again(backend: NDIFBackend, host: str, script: Script) -> None:
    script += [(503, b""), (502, b""), (200, b"result")]
    assert backend.download_result(f"{host}/result") == {"content": b"result"}
    script += [(403, b"")]
    with pytest.raises(StoreError, match="403"):
        backend.download_result(f"{host}/result")
    assert not script


def test_polling(backend: NDIFBackend, host: str, script: Script) -> None:
    done = state(Status.COMPLETED, data=f"{host}/result").model_dump_json().encode()
    running = state(Status.RUNNING).model_dump_json().encode()
    script += [(404, b""), (503, b""), (200, running), (200, done), (200, b"result")]
    backend.job_id = "1"
    assert backend.poll() is None
    assert backend._again(backend.poll, 5.0) is None
    assert backend.status == Status.RUNNING
    assert backend.poll() == {"content": b"result"}
    script += [(403, b'{"detail":"Invalid API key."}'), (500, b"")]
    with pytest.raises(RemoteError, match="Invalid API key"):
        backend.poll()
    with pytest.raises(httpx.HTTPStatusError):
        backend._again(backend.poll, 5.0)
    assert not script


def caused(cause: Exception) -> Exception:
    error = RemoteError(f"Failed to send request: {cause}")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (caused(httpx.ConnectError("refused")), True),
        (caused(httpx.ConnectTimeout("slow")), True),
        # It may have been read.
        (caused(httpx.ReadTimeout("slow")), False),
        (caused(httpx.RemoteProtocolError("hung up")), False),
        (RemoteError("compute backend is reconnecting. Please try again"), True),
        (RemoteError("Error submitting request to model deployment."), False),
        (SilenceError("running", 1.0), False),
        (ConnectionRefusedError(), True),
        (websocket.WebSocketTimeoutException(), True),
        (httpx.ReadTimeout("slow"), True),
        (ValueError(), False),
    ],
)
def test_nothing_is_paid_for_twice(error: Exception, may_pass: bool) -> None:
    assert _may_pass(error) is may_pass


class Line:
    """A connection on which the server says what it is told to, then nothing."""

    def __init__(self, *messages: Any) -> None:
        self._messages = list(messages)

    def settimeout(self, seconds: float) -> None:
        self._seconds = seconds

    def recv(self) -> Any:
        if self._messages:
            return self._messages.pop(0)
        time.sleep(self._seconds)
        raise websocket.WebSocketTimeoutException


def test_what_a_block_prints_is_no_state(backend: NDIFBackend) -> None:
    said = [state(Status.RUNNING), state(Status.LOG, description="a print")]
    with pytest.raises(SilenceError) as caught:
        backend._awaited(Line(*[each.model_dump_json() for each in said]))
    assert (caught.value.state, caught.value.seconds) == ("running", 0.1)


def test_states_are_logged_once_and_without_the_key(
    backend: NDIFBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="nla_lens.remote")
    backend.api_key = "sesame"
    for _ in range(3):
        backend.note(state(Status.QUEUED, description="of sesame"))
    backend.note(state(Status.RUNNING))
    assert [record.getMessage() for record in caplog.records] == ["1 QUEUED of <key>", "1 RUNNING "]


def test_a_polite_goodbye_is_a_lost_connection(backend: NDIFBackend) -> None:
    with pytest.raises(websocket.WebSocketConnectionClosedException):
        backend._awaited(Line(state(Status.RUNNING).model_dump_json(), ""))


def test_a_time_limit() -> None:
    assert within(5.0, "x", lambda a: a + 1, 1) == 2
    with pytest.raises(ZeroDivisionError):
        within(5.0, "x", lambda: 1 / 0)
    start, end = time.monotonic(), threading.Event()
    with pytest.raises(SilenceError, match=r"0\.1 s after it was sent"):
        within(0.1, "it was sent", end.wait)
    end.set()
    assert time.monotonic() - start < 5


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", 0.0)
    return lambda: capsys.readouterr().err


def test_the_bar_shows_the_state(backend: NDIFBackend, shown: Callable[[], str]) -> None:
    def items() -> Iterator[int]:
        backend.note(state(Status.QUEUED))
        yield 1
        backend.note(state(Status.RUNNING))
        backend.note(state(Status.LOG, description="a print"))
        yield 2

    assert list(with_progress(items(), total=2, show=True)) == [1, 2]
    said = shown()
    assert said.index("0/2") < said.index("queued") < said.index("running")
    assert "a print" not in said
    assert list(with_progress(items(), total=2, show=False)) == [1, 2]
    assert shown() == ""


def test_a_line_while_waiting(shown: Callable[[], str]) -> None:
    with waiting("reading the text", True), waiting("inner", True):
        show_state("queued")
    assert "inner: 00:00, queued" in shown()
    with waiting("reading the text", False):
        show_state("queued")
    show_state("nobody waits")
    assert shown() == ""


def test_nothing_is_drawn_before_it_takes_long(
    shown: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", 60.0)
    with waiting("reading the text", True):
        show_state("queued")
    assert "queued" not in shown()
