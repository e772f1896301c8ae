"""How a real NDIF server fails, and what is said then."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from nnsight.schema.config import CONFIG

from nla_lens import NLA
from nla_lens.engines.ndif.backend import NDIFBackend
from nla_lens.errors import NLARemoteError
from tests.checkpoints import build_av

from .conftest import ids, many, settings
from .server import KEY, MIN_NNSIGHT, Server, model_key

pytestmark = pytest.mark.timeout(900)
UNKNOWN = KEY.replace("5", "6")
API = "gunicorn"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (None, "Missing or invalid API key"),
        ("sesame", "Invalid API key format"),
        (UNKNOWN, r"Invalid API key\."),
    ],
)
def test_a_wrong_key(
    key: str | None,
    words: str,
    load: Callable[..., NLA],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    say: Callable[[str], None],
) -> None:
    nla = load()
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(CONFIG.API, "APIKEY", key)
    for blocking in (True, False):
        settings(nla).blocking = blocking
        with pytest.raises(NLARemoteError, match=words) as caught:
            nla.explain(many(1), max_new_tokens=2)
        assert caught.value.cause == "key"
        assert "nnsight login" in str(caught.value) and "NDIF_API_KEY" in str(caught.value)
    say(str(caught.value))
    if key is not None:
        assert key not in shown(caught.value) + caplog.text + repr(settings(nla)) + repr(nla)


def test_a_right_key_is_nowhere_either(
    load: Callable[..., NLA], caplog: pytest.LogCaptureFixture, models: dict[str, Path]
) -> None:
    caplog.set_level(logging.DEBUG)
    nla = load()
    for blocking in (True, False):
        settings(nla).blocking = blocking
        nla.explain(many(1), max_new_tokens=2)
    engine: Any = nla.verbalizer.engine
    engine.remote = replace(engine.remote, key=model_key("test/nothing"))
    with pytest.raises(NLARemoteError) as caught:
        nla.explain(many(1), max_new_tokens=2)
    assert "RUNNING" in caplog.text
    assert KEY not in shown(caught.value) + caplog.text + repr(vars(engine)) + repr(nla)


def shown(error: BaseException) -> str:
    """The traceback as those tools show it that print the values of frames; not our own frame."""
    found = traceback.TracebackException.from_exception(error, capture_locals=True)
    assert found.stack[0].filename == __file__ and len(found.stack) > 3
    del found.stack[0]
    return "".join(found.format())


def test_a_version_too_old(
    models: dict[str, Path], server: Server, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """The client's nnsight calls itself 0.7.0; the server wants 0.8.0 at least."""
    metadata = tmp_path / "nnsight-0.7.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: nnsight\nVersion: 0.7.0\n")
    code = f"""
from nla_lens import NLA, NLAError
from tests.ndif_server.conftest import many
try:
    NLA.from_pretrained(av={str(models["av"])!r}, engine="ndif").explain(many(1), max_new_tokens=2)
except NLAError as error:
    print(error.cause, error)
"""
    own = {"PYTHONPATH": str(tmp_path), "NDIF_HOST": server.url, "NDIF_API_KEY": KEY}
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stdout
    say(said)
    assert said.startswith("versions ")
    assert f"nnsight version 0.7.0 is below the minimum supported {MIN_NNSIGHT}" in said
    assert "nnsight 0.7.0 here, 0.8.1 there" in said
    assert "install the server's versions" in said


def test_another_version_of_the_model(
    models: dict[str, Path], tmp_path: Path, server: Server, say: Callable[[str], None]
) -> None:
    larger = NLA.from_pretrained(av=build_av(tmp_path, "llama", n_blocks=8), engine="ndif")
    engine: Any = larger.verbalizer.engine
    engine.remote = replace(engine.remote, key=model_key(models["av"]))
    with pytest.raises(NLARemoteError, match=r"nnsight 0\.8\.1 here, 0\.8\.1 there") as caught:
        larger.explain(many(1), max_new_tokens=2)
    assert caught.value.cause == "versions"
    say(str(caught.value))


def test_what_is_not_there(
    models: dict[str, Path], load: Callable[..., NLA], say: Callable[[str], None]
) -> None:
    elsewhere = models["av"].with_name("never-deployed-av")
    shutil.copytree(models["av"], elsewhere)
    nla = NLA.from_pretrained(av=elsewhere, engine="ndif")
    with pytest.raises(NLARemoteError, match=r"not deployed.*ndif deploy") as caught:
        nla.explain(many(1), max_new_tokens=2)
    assert caught.value.cause == "not_deployed"
    say(str(caught.value))

    absent = load("ndif:http://127.0.0.1:9")
    settings(absent).patience.connect = 0.5
    for blocking in (True, False):
        settings(absent).blocking = blocking
        with pytest.raises(NLARemoteError, match="cannot be reached") as caught:
            absent.explain(many(1), max_new_tokens=2)
        assert caught.value.cause == "unreachable"
    say(str(caught.value))


def test_a_killed_model(
    load: Callable[..., NLA], here: Callable[[], NLA], server: Server, say: Callable[[str], None]
) -> None:
    nla, wanted = load(), here().explain(many(64), max_new_tokens=60, score=False)
    traffic, killed_at = settings(nla).traffic, [0.0]
    # Found beforehand: looking for them takes a second on a busy machine.
    actors = server.processes("ModelActor")
    assert len(actors) == 4

    def kill() -> None:
        while traffic.requests < 5:
            time.sleep(0.01)
        killed_at[0] = time.monotonic()
        for actor in actors:
            actor.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(NLARemoteError, match="model's process on the server ended") as caught:
        nla.explain(many(64), max_new_tokens=60, score=False, batch_size=4)
    seconds = time.monotonic() - killed_at[0]
    killer.join()
    finished = list(caught.value.explanations or ())
    say(f"killed: {seconds:.1f} s later, with {len(finished)} of 64 finished: {caught.value}")
    assert seconds < 10
    assert 0 < len(finished) < 64
    assert ids(finished) == ids(wanted)[: len(finished)]

    until = time.monotonic() + 120
    while True:
        before = traffic.requests
        try:
            rest = nla.explain(
                many(64)[len(finished) :], max_new_tokens=60, score=False, batch_size=4
            )
            break
        except NLARemoteError as error:
            finished += error.explanations or ()
            assert time.monotonic() < until, error
            time.sleep(2)
    assert ids([*finished, *rest]) == ids(wanted)
    assert traffic.requests - before == -(-len(rest) // 4)
    say(f"the second call: {len(rest)} explanations in {traffic.requests - before} requests")


def test_a_frozen_model(
    load: Callable[..., NLA], server: Server, say: Callable[[str], None]
) -> None:
    nla = load()
    nla.explain(many(2), max_new_tokens=2, score=False)
    patience = settings(nla).patience
    patience.running = patience.queued = 3.0
    for blocking in (True, False):
        settings(nla).blocking = blocking
        with server.frozen():
            start = time.monotonic()
            with pytest.raises(NLARemoteError, match="silent for 3 s") as caught:
                nla.explain(many(2), max_new_tokens=2, score=False)
            assert caught.value.cause == "silent"
            say(f"frozen, {time.monotonic() - start:.1f} s: {caught.value}")
            assert time.monotonic() - start < 15


@pytest.mark.parametrize("blocking", [True, False])
def test_a_server_that_freezes_before_it_takes_the_job(
    blocking: bool,
    load: Callable[..., NLA],
    here: Callable[[], NLA],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nla = load()
    settings(nla).blocking = blocking
    patience = settings(nla).patience
    nla.explain(many(1), max_new_tokens=2, score=False)
    step = "_subscribed" if blocking else "_serialize"
    plain = getattr(NDIFBackend, step)

    def then_frozen(self: NDIFBackend, *args: Any) -> Any:
        found = plain(self, *args)
        server.send(signal.SIGSTOP, API)
        return found

    patience.answer = 3.0
    with server.frozen(API), monkeypatch.context() as patch:
        server.send(signal.SIGCONT, API)
        patch.setattr(NDIFBackend, step, then_frozen)
        start = time.monotonic()
        with pytest.raises(NLARemoteError, match=r"silent for 3 s.*the request was sent") as caught:
            nla.explain(many(1), max_new_tokens=2, score=False)
        assert caught.value.cause == "silent"
        assert time.monotonic() - start < 15
    patience.answer = 60.0
    found = nla.explain(many(1), max_new_tokens=2, score=False)
    assert ids(found) == ids(here().explain(many(1), max_new_tokens=2, score=False))


def test_a_server_that_is_frozen_already(load: Callable[..., NLA], server: Server) -> None:
    nla = load()
    settings(nla).patience.connect = 2.0
    with server.frozen(API):
        start = time.monotonic()
        with pytest.raises(NLARemoteError, match="cannot be reached"):
            nla.explain(many(1), max_new_tokens=2, score=False)
        assert time.monotonic() - start < 15


def wait_for(url: str) -> None:
    """Until it answers again."""
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=10).is_success:
                return
        assert time.monotonic() < until
        time.sleep(0.2)


@contextlib.contextmanager
def once_running(act: Callable[[], None]) -> Iterator[None]:
    """Does something as soon as a job is heard to be running."""

    class Listener(logging.Handler):
        done = False

        def emit(self, record: logging.LogRecord) -> None:
            if "RUNNING" in record.getMessage() and not self.done:
                self.done = True
                act()

    log, listener = logging.getLogger("nla_lens.remote"), Listener()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(listener)
    try:
        yield
    finally:
        log.removeHandler(listener)
        log.setLevel(level)
    assert listener.done


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_lost_connection(
    sent: signal.Signals,
    load: Callable[..., NLA],
    here: Callable[[], NLA],
    server: Server,
    say: Callable[[str], None],
) -> None:
    """The API's worker ends, politely or not, while the model runs; its master starts another."""
    nla, wishes = load(), {"max_new_tokens": 100, "score": False}
    actors = server.processes("ModelActor")

    @contextlib.contextmanager
    def ending_the_worker(*, before_the_result: bool) -> Iterator[None]:
        # Found beforehand: looking for them takes a second on a busy machine.
        workers = [p for p in server.processes(API) if API in " ".join(p.parent().cmdline())]
        assert workers

        def end() -> None:
            for actor in actors if before_the_result else ():
                actor.suspend()
            for worker in workers:
                worker.send_signal(sent)

        try:
            with once_running(end):
                yield
        finally:
            for actor in actors:
                actor.resume()

    with ending_the_worker(before_the_result=True), pytest.raises(NLARemoteError) as caught:
        nla.explain(many(16), **wishes)
    assert caught.value.cause == "lost" and "blocking = False" in str(caught.value)
    say(str(caught.value))

    settings(nla).blocking = False
    settings(nla).patience.connect = 60.0
    requests = settings(nla).traffic.requests
    wait_for(f"{server.url}/connected")
    with ending_the_worker(before_the_result=False):
        found = nla.explain(many(16), **wishes)
    assert settings(nla).traffic.requests == requests + 1
    assert ids(found) == ids(here().explain(many(16), **wishes))
