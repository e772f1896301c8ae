"""What is said when a server fails; what a real one does is in `ndif_server/`."""

import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nla_lens import NLA, NLAError
from nla_lens.errors import NLARemoteError
from nla_lens.foreign import scrub

from .checkpoints import vectors

pytest.importorskip("nnsight")
httpx = pytest.importorskip("httpx")
websocket = pytest.importorskip("websocket")
pytest.importorskip("tenacity")

from nnsight.intervention.backends.remote import RemoteError  # noqa: E402
from nnsight.schema.config import CONFIG  # noqa: E402

from nla_lens.engines.ndif.errors import SilenceError, StoreError, tell, told  # noqa: E402

KEY = "0b5e1f6a-1111-4222-8333-94a5b6c7d8e9"
TRACEBACK = "Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'q'"


def http_error() -> Exception:
    request = httpx.Request("GET", "http://host/response/1")
    response = httpx.Response(500, request=request)
    return httpx.HTTPStatusError("Server error '500'", request=request, response=response)


def unsent() -> Exception:
    """As nnsight raises it."""
    error = RemoteError("Failed to send request: [Errno 111] Connection refused")
    error.__cause__ = httpx.ConnectError("[Errno 111] Connection refused")
    return error


@pytest.mark.parametrize(
    ("error", "cause", "remedy"),
    [
        (RemoteError("Missing or invalid API key."), "key", "nnsight login"),
        (RemoteError(f"Invalid API key format: '{KEY}'."), "key", "NDIF_API_KEY"),
        (RemoteError("Invalid API key."), "key", "login.ndif.us"),
        (RemoteError("Could not deploy this model. No such repo"), "not_deployed", "ndif deploy"),
        (RemoteError("Error starting model. Please try again"), "not_deployed", "ndif deploy"),
        (RemoteError(TRACEBACK), "versions", "install the server's versions"),
        (RemoteError("it has no module at 'model.layers.5'. The model architecture on this server"
                     " doesn't match"), "versions", "transformers"),
        (RemoteError("Client nnsight version 0.7 is below the minimum"), "versions", "install"),
        (RemoteError("torch.OutOfMemoryError: CUDA out of memory."), "memory", "batch_size"),
        (RemoteError("Your job exceeded the execution timeout of 60s."), "too_long", "batch_size"),
        (RemoteError("Error submitting request to model deployment."), "actor", "missing"),
        (RemoteError("Replica was evicted while processing your request."), "actor", "missing"),
        (unsent(), "unreachable", "NDIF_HOST"),
        (RemoteError("Failed to send request: Internal server error."), "failed", "above"),
        (RemoteError("RuntimeError: no such factor"), "failed", "above"),
        (RemoteError("Traceback (most recent call last):\n File 'ray/actor.py'\nValueError: x"),
         "failed", "above"),
        (StoreError("gone"), "store", "object store"),
        (RemoteError("compute backend is reconnecting."), "unreachable", "few minutes"),
        (RemoteError("NameError: name 'x' is not defined"), "failed", "above"),
        (websocket.WebSocketConnectionClosedException("closed"), "lost", "non-blocking"),
        (ConnectionRefusedError(111, "Connection refused"), "unreachable", "NDIF_HOST"),
        (httpx.ConnectTimeout("timed out"), "unreachable", "NDIF_HOST"),
        (http_error(), "store", "object store"),
        (SilenceError("RUNNING", 3.0), "silent", "patience"),
        (RuntimeError("boom"), "failed", "RuntimeError"),
    ],
)  # fmt: skip
def test_every_failure_names_cause_and_remedy(error: Exception, cause: str, remedy: str) -> None:
    said = tell(error, "some/model", "https://host", KEY)
    assert isinstance(said, NLAError)
    assert said.cause == cause
    assert remedy in str(said)
    assert "some/model" in str(said) and "https://host" in str(said)
    assert KEY not in str(said) and "\n" not in str(said)


def test_the_key_is_nowhere() -> None:
    assert scrub(f"x {KEY} y", None) == "x <key> y"
    assert scrub("x sesame y", "sesame") == "x <key> y"
    with pytest.raises(NLARemoteError) as caught, told("m", "h", lambda: KEY):
        raise RemoteError(f"Invalid API key format: '{KEY}'")
    found = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    # The first frame is this test's own.
    del found.stack[0]
    assert KEY not in "".join(found.format())
    signed = "'403 Forbidden' for url 'http://store/results/1?X-Amz-Signature=abc&x=y'"
    assert scrub(signed, None) == "'403 Forbidden' for url 'http://store/results/1'"


def test_versions_of_both_sides_are_named() -> None:
    error = RemoteError("Client nnsight version 0.7 is below the minimum supported 0.8.")
    said = tell(error, "m", "h", versions=lambda: "nnsight 0.7 here, 0.8 there")
    assert "nnsight 0.7 here, 0.8 there" in str(said)
    other = tell(RemoteError("Invalid API key."), "m", "h", versions=lambda: "never asked")
    assert "never asked" not in str(other)


def test_our_own_errors_pass() -> None:
    with pytest.raises(NLAError, match=r"^as it is$"), told("m", "h"):
        raise NLAError("as it is")


@pytest.fixture
def impatient(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[[str], NLA]:
    def load(host: str) -> NLA:
        nla = NLA.from_pretrained(av=pair_dirs("llama", "replace")[0], engine=f"ndif:{host}")
        engine: Any = nla.verbalizer.engine
        engine.server.patience.connect = 0.5
        return nla

    return load


def test_an_absent_server(impatient: Callable[[str], NLA]) -> None:
    with pytest.raises(NLARemoteError, match=r"cannot be reached.*NDIF_HOST") as caught:
        impatient("http://127.0.0.1:9").explain(vectors())
    assert caught.value.cause == "unreachable"
    assert list(caught.value.explanations or ()) == []


def test_a_server_that_never_answers(
    impatient: Callable[[str], NLA], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIG.API, "APIKEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        nla = impatient(f"http://127.0.0.1:{mute.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(NLARemoteError, match="cannot be reached"):
            nla.explain(vectors())
        assert time.monotonic() - start < 5
        engine: Any = nla.verbalizer.engine
        assert KEY not in repr(engine.server) + repr(engine.remote) + repr(nla)
