"""One verbalizer on several servers: the same texts, whichever of them dies, and what it costs."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nla_lens import NLA, NLAError, explain_corpus, open_store
from nla_lens.engines.served.server import Server
from nla_lens.engines.served.several import SeveralServers
from nla_lens.errors import NLARemoteError

from .checkpoints import many_vectors as many
from .model_server import Answered, Handler, ModelServer

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

ENGINES = ("vllm", "sglang")
SHORT: dict[str, Any] = {"max_new_tokens": 4, "score": False}


@pytest.fixture
def serve(nla: NLA, pair_dirs: Callable[..., tuple[Path, Path]]) -> Iterator[Callable]:
    """`serve(engine)` -> a server that runs the llama verbalizer."""
    verbalizer: Any = nla.verbalizer
    name = str(pair_dirs("llama", "replace")[0])
    with ExitStack() as stack:

        def start(engine: str = "vllm") -> ModelServer:
            model = verbalizer.engine.model
            return stack.enter_context(ModelServer(engine, model, verbalizer.tokenizer, name))

        yield start


@pytest.fixture
def load(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[..., NLA]:
    """`load(servers)` -> an NLA whose verbalizer is on all of them."""

    def loaded(*servers: ModelServer, **wishes: Any) -> NLA:
        wished = {"patience": 0.5, "connections": 2, "rows_per_request": 2, **wishes}
        urls = [Server(server.url, **wished) for server in servers]
        av = pair_dirs("llama", "replace")[0]
        nla = NLA.from_pretrained(av=av, engine=servers[0].kind, url=urls)
        for server in servers:
            server.bodies.clear()
        return nla

    return loaded


def asked(handler: Handler) -> Any:
    return json.loads(handler.body)


@pytest.mark.parametrize("engine", ENGINES)
def test_requests_are_spread(engine: str, serve: Callable, load: Callable, nla: NLA) -> None:
    servers = [serve(engine) for _ in range(3)]
    there = load(*servers)
    assert isinstance(there.verbalizer.engine, SeveralServers)
    found = there.explain(many(24), **SHORT)
    assert found == nla.explain(many(24), **SHORT)
    assert sum(len(server.bodies) for server in servers) == 12
    assert all(len(server.bodies) >= 2 for server in servers)
    sampled = {"temperature": 1.0, "seed": 3, **SHORT}
    assert there.explain(many(6), **sampled) == load(servers[0]).explain(many(6), **sampled)


def test_batch_size_is_of_all_servers_together(serve: Callable, load: Callable) -> None:
    servers = [serve(), serve()]
    there = load(*servers)
    now, most, lock = 0, 0, threading.Lock()

    def count(server: ModelServer) -> Callable[[Handler], Answered]:
        def act(handler: Handler) -> Answered:
            nonlocal now, most
            body = asked(handler)
            with lock:
                now += len(body["prompt_embeds"])
                most = max(most, now)
            time.sleep(0.02)
            with lock:
                now -= len(body["prompt_embeds"])
            return server._vllm(body)

        return act

    for server in servers:
        server.acts.extend([count(server)] * 40)
    there.explain(many(24), batch_size=4, **SHORT)
    assert most == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_one_that_is_killed_costs_its_share(
    engine: str, serve: Callable, load: Callable, nla: NLA, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of its requests, which the other one does."""
    dies, lives = serve(engine), serve(engine)
    there = load(dies, lives)

    def die(handler: Handler) -> None:
        threading.Thread(target=dies.kill).start()
        time.sleep(0.3)

    dies.acts.extend([None, die, die])
    with caplog.at_level(logging.WARNING):
        found = there.explain(many(40), **SHORT)
    assert found == nla.explain(many(40), **SHORT)
    assert 2 <= len(dies.bodies) <= 4 and len(lives.bodies) >= 16
    assert "others do its requests" in caplog.text and dies.url in caplog.text


def test_one_that_comes_back_is_used_again(
    serve: Callable,
    load: Callable,
    nla: NLA,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nla_lens.engines.served.spreading._LOOK_AGAIN_SECONDS", 0.1)
    dies, lives = serve(), serve()
    there = load(dies, lives)
    died = threading.Event()

    def die(handler: Handler) -> None:
        if not died.is_set():
            died.set()
            threading.Thread(target=dies.kill).start()
            threading.Timer(0.3, dies.start_again).start()
        time.sleep(0.2)

    def until_it_is_back(handler: Handler) -> Answered:
        # The other one works on, slowly, so that there is something left for who comes back.
        body = asked(handler)
        time.sleep(0.15)
        return lives._vllm(body)

    dies.acts.append(die)
    lives.acts.extend([until_it_is_back] * 400)
    with caplog.at_level(logging.WARNING):
        found = there.explain(many(60), **SHORT)
    assert found == nla.explain(many(60), **SHORT)
    assert f"{dies.url} is back" in caplog.text
    # Its probe and some of the work.
    assert len(dies.bodies) >= 5


def test_one_that_comes_back_with_another_model_is_not_used(
    serve: Callable,
    load: Callable,
    nla: NLA,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nla_lens.engines.served.spreading._LOOK_AGAIN_SECONDS", 0.05)
    dies, lives = serve(), serve()
    there = load(dies, lives)

    def become_another(handler: Handler) -> None:
        dies.max_len = 300
        handler.connection.close()

    def slow(handler: Handler) -> Answered:
        body = asked(handler)
        time.sleep(0.05)
        return lives._vllm(body)

    dies.acts.extend([become_another] * 2)
    lives.acts.extend([slow] * 400)
    found = there.explain(many(40), **SHORT)
    assert found == nla.explain(many(40), **SHORT)
    assert "is back" not in caplog.text and len(dies.bodies) <= 2


@pytest.mark.parametrize("engine", ENGINES)
def test_all_dead_is_the_error_of_one(
    engine: str, serve: Callable, load: Callable, nla: NLA
) -> None:
    servers = [serve(engine), serve(engine)]
    there = load(*servers, connections=1)
    killed = threading.Event()

    def kill_both(handler: Handler) -> None:
        if not killed.is_set():
            killed.set()
            for server in servers:
                threading.Thread(target=server.kill).start()
        time.sleep(0.3)

    servers[0].acts.extend([None, kill_both])
    start = time.monotonic()
    with pytest.raises(NLARemoteError, match="the server at") as caught:
        there.explain(many(60), **SHORT)
    assert time.monotonic() - start < 10
    wanted = nla.explain(many(60), **SHORT)
    kept = dict(enumerate(caught.value.explanations)) | dict(caught.value.later)
    assert 2 <= len(kept) < 60
    assert all(e.token_ids == wanted[i].token_ids for i, e in kept.items())


def test_a_request_that_fails_everywhere_ends_the_job(
    serve: Callable, load: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_lens.engines.served.spreading._LOOK_AGAIN_SECONDS", 0.02)
    servers = [serve(), serve()]
    there = load(*servers)

    def refuse(answer: Any) -> Any:
        # The probe that a server is looked at by has one vector.
        return answer if len(answer["choices"]) == 1 else {}

    for server in servers:
        server.mangle = refuse
    with pytest.raises(NLARemoteError, match="answered without choices"):
        there.explain(many(4), **SHORT)


def test_a_job_goes_on_with_servers_that_came_back(
    serve: Callable, load: Callable, nla: NLA, tmp_path: Path
) -> None:
    """A store is gone on with after its only server died, and by more servers than before."""
    one, other = serve(), serve()
    alone = NLA(load(one).verbalizer)

    def die(handler: Handler) -> None:
        threading.Thread(target=one.kill).start()
        time.sleep(0.3)

    one.acts.extend([None] * 5 + [die] * 2)
    with pytest.raises(NLARemoteError):
        explain_corpus(alone, many(40), tmp_path / "s", **SHORT)
    begun = len(open_store(tmp_path / "s"))
    assert 8 <= begun <= 12
    one.acts.clear()
    one.start_again()
    both = load(one, other)
    done = explain_corpus(both, many(40), tmp_path / "s", **SHORT)
    assert sum(len(b["prompt_embeds"]) for s in (one, other) for b in s.bodies) == 40 - begun
    here = NLA(nla.verbalizer)
    assert done.rows() == explain_corpus(here, many(40), tmp_path / "here", **SHORT).rows()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda server: setattr(server, "max_len", 300), "max_model_len.*512 and 300"),
        (lambda server: setattr(server, "name", "another/model"), "serves 'another/model'"),
        (lambda server: setattr(server, "flag", False), "prompt embeddings"),
        (lambda server: server.kill(), "cannot be reached"),
    ],
)
def test_servers_that_differ_are_refused_when_they_are_loaded(
    change: Callable, named: str, serve: Callable, load: Callable
) -> None:
    first, second = serve(), serve()
    change(second)
    with pytest.raises(NLAError, match=named) as caught:
        load(first, second)
    assert second.url in str(caught.value)


def test_lists_that_are_none(serve: Callable, load: Callable, pair_dirs: Callable) -> None:
    server = serve()
    with pytest.raises(NLAError, match=f"{server.url} more than once"):
        load(server, server)
    av = pair_dirs("llama", "replace")[0]
    with pytest.raises(NLAError, match="needs url="):
        NLA.from_pretrained(av=av, engine="vllm", url=[])
    with pytest.raises(NLAError, match="url= must be of the form"):
        NLA.from_pretrained(av=av, engine="vllm", url=[server.url, 7])  # type: ignore[list-item]
    with pytest.raises(NLAError, match="has no meaning"):
        NLA.from_pretrained(av=av, url=[server.url])


def test_url_more_than_once_on_the_command_line(
    serve: Callable, pair_dirs: Callable, tmp_path: Path, nla: NLA
) -> None:
    from safetensors.torch import save_file

    from nla_lens.cli.main import cli

    servers = [serve(), serve()]
    save_file({"v": many(40)}, tmp_path / "v.safetensors")
    command = ["explain-file", str(tmp_path / "v.safetensors"), "--out", str(tmp_path / "s")]
    command += ["--av", str(pair_dirs("llama", "replace")[0]), "--engine", "vllm"]
    command += [word for server in servers for word in ("--url", server.url)]
    result = CliRunner().invoke(cli, [*command, "--max-new-tokens", "4"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    stored, here = open_store(tmp_path / "s").explanations(), nla.explain(many(40), **SHORT)
    assert [e.token_ids for e in stored] == [e.token_ids for e in here]
    assert all(len(server.bodies) > 1 for server in servers)
