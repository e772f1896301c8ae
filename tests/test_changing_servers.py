"""Servers that are honest for a while: lies at row k, other weights in the middle of a job."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_lens import NLA, NLAError, explain_corpus, open_store
from nla_lens.engines.served.alike import are_apart
from nla_lens.engines.served.server import Served, Server, pick
from nla_lens.engines.served.sglang import SGLangVerbalizer
from nla_lens.errors import NLARemoteError

from .checkpoints import many_vectors as many
from .model_server import Answered, Handler, ModelServer
from .test_served import endless, half, reset, say, squeezed

pytest.importorskip("httpx")
pytest.importorskip("tenacity")
pytest.importorskip("pyarrow")

SHORT: dict[str, Any] = {"max_new_tokens": 4, "score": False}
ENGINES = ("vllm", "sglang")


@pytest.fixture
def serve(nla: NLA, pair_dirs: Callable[..., tuple[Path, Path]]) -> Iterator[Callable]:
    """`serve(engine, model)` -> a server that runs the llama verbalizer, or a model like it."""
    verbalizer: Any = nla.verbalizer
    name = str(pair_dirs("llama", "replace")[0])
    with ExitStack() as stack:

        def start(engine: str = "vllm", model: Any = None) -> ModelServer:
            runs = verbalizer.engine.model if model is None else model
            return stack.enter_context(ModelServer(engine, runs, verbalizer.tokenizer, name))

        yield start


@pytest.fixture
def load(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[..., NLA]:
    """`load(servers)` -> an NLA whose verbalizer is on all of them; one request at a time."""

    def loaded(*servers: ModelServer, av: Path | None = None, **wishes: Any) -> NLA:
        wished = {"patience": 0.4, "connections": 1, "rows_per_request": 2, "timeout": 2.0}
        urls = [Server(server.url, **{**wished, **wishes}) for server in servers]
        path = av or pair_dirs("llama", "replace")[0]
        nla = NLA.from_pretrained(av=path, engine=servers[0].kind, url=urls)
        for server in servers:
            server.bodies.clear()
        return nla

    return loaded


@pytest.fixture(scope="module")
def other(nla: NLA) -> Any:
    """Another step of the training: the same names, shapes and tokenizer."""
    model = copy.deepcopy(nla.verbalizer.engine.model)  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator())
    return model


def n_asked(server: ModelServer) -> int:
    return sum(len(b.get("prompt_embeds", b.get("input_embeds", ()))) for b in server.bodies)


# --- lies at row k --------------------------------------------------------------------------------


def page(handler: Handler) -> Answered:
    return 200, b"<!DOCTYPE html><html><body>Welcome to your proxy</body></html>"


def trickle(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def cut_in_a_character(handler: Handler) -> Answered:
    return 200, '{"choices": [{"text": "é'.encode()[:-1]


def later(after: str) -> Callable[[Handler], None]:
    def act(handler: Handler) -> None:
        handler.send_response(429 if after.startswith("-") else 503)
        handler.send_header("Retry-After", after)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return act


LIES: dict[str, tuple[Callable[[Handler], Answered | None], str]] = {
    "reset": (reset, "hung up"),
    "half an answer": (half, "hung up"),
    "without end": (endless, "more than"),
    "compressed": (squeezed, "compressed"),
    "a page": (page, "not JSON"),
    "cut in a character": (cut_in_a_character, "not JSON"),
    "a trickle": (trickle, "has not answered"),
    "elsewhere": (say(307, b""), "elsewhere"),
    "an error with status 200": (say(200, {"error": {"message": "engine died"}}), "engine died"),
    "vLLM's own": (say(200, {"object": "error", "message": "engine died"}), "engine died"),
    "later, before now": (later("-5"), "HTTP 429"),
    "later, in 30 years": (later("1000000000"), "HTTP 503"),
    "later, in the past": (later("Wed, 21 Oct 2015 07:28:00 GMT"), "HTTP 503"),
    "later, some day": (later("soon\u00e9"), "HTTP 503"),
}
"""What is done instead of an answer, for ever."""


def mangled(change: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
    def mangle(answer: Any) -> Any:
        if isinstance(answer, list):
            return change(answer)
        return {**answer, "choices": change(answer["choices"])}

    return mangle


def with_ids(ids: Any) -> Callable[[Any], Any]:
    def change(found: list[Any]) -> list[Any]:
        return [{**found[0], "token_ids": ids, "output_ids": ids}, *found[1:]]

    return mangled(change)


MANGLED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one row less": (mangled(lambda found: found[:-1]), "2 vectors with 1"),
    "one row more": (mangled(lambda found: [*found, found[0]]), "2 vectors with 3"),
    "ids of another vocabulary": (with_ids([10**6]), "beyond the"),
    "ids that are none": (with_ids([float("nan")]), "no token ids"),
    "too short": (with_ids([5]), "ended the answer"),
}


def goes_on(
    server: ModelServer, there: NLA, nla: NLA, out: Path, said: str, heal: Callable[[], object]
) -> None:
    """4 rows are kept of 10; after the server is honest again the same call asks for the rest."""
    with pytest.raises(NLARemoteError, match=said) as caught:
        explain_corpus(there, many(10), out, **SHORT)
    assert server.url in str(caught.value)
    wanted = nla.explain(many(10), **SHORT)
    kept = open_store(out)
    assert [row["row"] for row in kept.rows()] == [0, 1, 2, 3]
    assert [e.token_ids for e in kept.explanations()] == [e.token_ids for e in wanted[:4]]
    heal()
    server.bodies.clear()
    done = explain_corpus(there, many(10), out, **SHORT)
    assert n_asked(server) == 6
    assert [e.token_ids for e in done.explanations()] == [e.token_ids for e in wanted]


@pytest.mark.parametrize("lie", LIES)
def test_a_job_whose_server_lies_from_row_4_on(
    lie: str, serve: Callable, load: Callable, nla: NLA, tmp_path: Path
) -> None:
    act, said = LIES[lie]
    server = serve("sglang" if lie in ("a page", "later, some day") else "vllm")
    there = load(server)
    server.acts.extend([None, None, *[act] * 50])
    goes_on(server, there, nla, tmp_path / "s", said, server.acts.clear)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lie", MANGLED)
def test_a_job_whose_answers_are_mangled_from_row_4_on(
    engine: str, lie: str, serve: Callable, load: Callable, nla: NLA, tmp_path: Path
) -> None:
    server = serve(engine)
    there, (mangle, said) = load(server), MANGLED[lie]

    def honest() -> None:
        server.mangle = lambda answer: answer

    server.mangle = lambda answer: mangle(answer) if len(server.bodies) > 2 else answer
    goes_on(server, there, nla, tmp_path / "s", said, honest)


# --- other models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [{"name": "another"}, {"max_len": 300}])
def test_a_server_that_became_another_is_not_asked(
    engine: str, change: dict[str, Any], serve: Callable, load: Callable
) -> None:
    """Between two calls. SGLang answers whatever model it is asked for."""
    server = serve(engine)
    there = load(server)
    assert len(there.explain(many(2), **SHORT)) == 2
    server.bodies.clear()
    vars(server).update(change)
    with pytest.raises(NLARemoteError, match=r"does not serve .* load it again") as caught:
        there.explain(many(2), **SHORT)
    assert caught.value.cause == "not_deployed" and server.bodies == []


@pytest.mark.parametrize("engine", ENGINES)
def test_one_that_was_away_and_is_another_is_not_asked(
    engine: str, serve: Callable, load: Callable, nla: NLA
) -> None:
    """In the middle of a job, while a request is tried again."""
    server = serve(engine)
    there = load(server, patience=5.0)

    def restart(handler: Handler) -> Answered:
        server.name = "another"
        return 503, b"restarting"

    server.acts.extend([None, restart])
    with pytest.raises(NLARemoteError, match="does not serve") as caught:
        there.explain(many(8), **SHORT)
    assert len(server.bodies) == 2
    found = caught.value.explanations
    assert found is not None
    assert [e.token_ids for e in found] == [e.token_ids for e in nla.explain(many(2), **SHORT)]


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_that_say_they_are_of_another_model(
    engine: str, serve: Callable, load: Callable, nla: NLA, tmp_path: Path
) -> None:
    """vLLM names its model, SGLang the version of weights that are updated in place."""
    server = serve(engine)
    version = "step-100"

    def mangle(answer: Any) -> Any:
        if engine == "vllm":
            return {**answer, "model": version}
        for one in answer:
            one["meta_info"]["weight_version"] = version
        return answer

    server.mangle = mangle
    there = load(server)

    def update(handler: Handler) -> Answered:
        nonlocal version
        version = "step-200"
        status, answer = (server._vllm if engine == "vllm" else server._sglang)(
            json.loads(handler.body)
        )
        return status, mangle(answer)

    def heal() -> None:
        nonlocal version
        version = "step-100"
        server.acts.clear()

    server.acts.extend([None, None, update])
    goes_on(server, there, nla, tmp_path / "s", "answered as 'step-200', and before", heal)


@pytest.mark.parametrize("engine", ENGINES)
def test_servers_of_other_weights_are_refused_when_they_are_loaded(
    engine: str, serve: Callable, load: Callable, other: Any
) -> None:
    """They bear the same name, and allow as many tokens."""
    first, second = serve(engine), serve(engine, other)
    with pytest.raises(NLAError, match="compute something else of the same embedding") as caught:
        load(first, second)
    assert first.url in str(caught.value) and second.url in str(caught.value)
    load(first, serve(engine))


def test_one_that_comes_back_with_other_weights_is_not_used(
    serve: Callable,
    load: Callable,
    nla: NLA,
    other: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nla_lens.engines.served.spreading._LOOK_AGAIN_SECONDS", 0.05)
    dies, lives = serve(), serve()
    there = load(dies, lives)

    def become_another(handler: Handler) -> None:
        dies.model = other
        handler.connection.close()

    def slow(handler: Handler) -> Answered:
        time.sleep(0.05)
        return lives._vllm(json.loads(handler.body))

    dies.acts.append(become_another)
    lives.acts.extend([slow] * 400)
    assert there.explain(many(30), **SHORT) == nla.explain(many(30), **SHORT)
    assert "is back" not in caplog.text
    assert all(len(body["prompt_embeds"]) == 1 for body in dies.bodies[1:]), "more than probes"


def test_one_of_several_that_became_another_before_a_job_gets_none_of_it(
    serve: Callable, load: Callable, nla: NLA, caplog: pytest.LogCaptureFixture
) -> None:
    changes, stays = serve("sglang"), serve("sglang")
    there = load(changes, stays)
    changes.name = "another"
    assert there.explain(many(12), **SHORT) == nla.explain(many(12), **SHORT)
    assert changes.bodies == [] and "is set aside" in caplog.text


def test_two_servers_differ_by_more_than_rounding() -> None:
    one = [(5, -0.5), (7, -1.0), (9, -0.25)]
    fp32, bf16 = torch.float32, torch.bfloat16
    assert not are_apart(one, [(5, -0.5004), (7, -1.0), (9, -0.25)], fp32)
    assert are_apart(one, [(5, -0.502), (7, -1.0), (9, -0.25)], fp32)
    assert not are_apart(one, [(5, -0.45), (7, -1.0), (9, -0.25)], bf16)
    # Two tokens as likely as one another, and what follows has another beginning.
    assert not are_apart(one, [(5, -0.5), (8, -1.0), (3, -4.0)], fp32)
    assert are_apart(one, [(5, -0.5), (8, -1.2), (3, -4.0)], bf16)
    assert are_apart(one, [(5, float("nan"))], bf16)
    assert not are_apart(None, one, fp32) and not are_apart([], one, fp32)


def test_another_revision_out_of_the_hubs_cache() -> None:
    def root(revision: str) -> str:
        return f"/cache/models--kitft--x-av/snapshots/{revision * 40}"

    here: Any = SimpleNamespace(name="kitft/x-av", path=Path(root("a")))
    server = Server("http://h:1")
    assert pick([Served("kitft/x-av", root("a"), 9)], here, server).max_len == 9
    assert pick([Served("kitft/x-av", "kitft/x-av", 9)], here, server).max_len == 9
    with pytest.raises(NLARemoteError, match=f"revision {'b' * 40}.*pass that revision="):
        pick([Served("kitft/x-av", root("b"), 9)], here, server)


def test_a_store_is_not_gone_on_with_by_another_served_checkpoint(
    serve: Callable, load: Callable, pair_dirs: Callable, tmp_path: Path
) -> None:
    """Its weights are elsewhere; what the client read of them tells."""
    server, later_av = serve(), tmp_path / "later"
    shutil.copytree(pair_dirs("llama", "replace")[0], later_av)
    weights = load_file(later_av / "model.safetensors")
    for name in weights:
        if "layers" in name:
            weights[name] = weights[name] + 1
    save_file(weights, later_av / "model.safetensors", {"format": "pt"})
    explain_corpus(load(server), many(4), tmp_path / "s", limit=2, **SHORT)
    assert len(explain_corpus(load(server), many(4), tmp_path / "s", limit=2, **SHORT)) == 2
    server.name = str(later_av)
    with pytest.raises(NLAError, match=r"made with nla\.weights\.av="):
        explain_corpus(load(server, av=later_av), many(4), tmp_path / "s", limit=2, **SHORT)


# --- threads --------------------------------------------------------------------------------------


class Interrupted(SGLangVerbalizer):
    """One whose `_written` another thread replaces after each time it is looked at or set."""

    THEIRS = (((9, 9, 9), 1), "[9.0,9.0], ", "[9.0,9.0], ")

    @property
    def _written(self) -> Any:  # type: ignore[override]
        found = vars(self).get("kept", (None, "", ""))
        self.kept: Any = self.THEIRS
        return found

    @_written.setter
    def _written(self, written: Any) -> None:
        self.kept = self.THEIRS


def test_two_threads_send_their_own_prompts() -> None:
    """What a prompt has in common with the next vector's is kept, and is another thread's soon."""
    engine: Any = Interrupted.__new__(Interrupted)
    engine.rows = SimpleNamespace(dtype=torch.float32)
    for value in (2, 2, 9, 9):
        job: Any = SimpleNamespace(prompt_ids=[value] * 3, marker=1)
        written = json.loads(engine._prompt(torch.full((3, 2), float(value)), job))
        assert written == [[value] * 2] * 3


def test_a_thread_that_gives_up_leaves_the_other_alone(
    serve: Callable, load: Callable, nla: NLA
) -> None:
    server = serve()
    there = load(server)
    found: list[Any] = []
    whole = threading.Thread(target=lambda: found.append(there.explain(many(12), **SHORT)))
    rows = there.explain_iter(many(12) + 1, **SHORT)
    next(rows)
    whole.start()
    rows.close()  # type: ignore[attr-defined]
    asked = n_asked(server)
    whole.join()
    assert found[0] == nla.explain(many(12), **SHORT)
    assert n_asked(server) - asked <= 12, "requests of the one that gave up went on"


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_while_requests_are_under_way(
    engine: str, serve: Callable, load: Callable, nla: NLA, tmp_path: Path
) -> None:
    """A real signal: what is finished is in the store, nothing is asked or written afterwards."""
    server = serve(engine)
    there = load(server, connections=3)
    over = threading.Event()

    def interrupted(handler: Handler) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        over.wait(10)

    def never(handler: Handler) -> None:
        over.wait(10)

    server.acts.extend([None, None, never, never, interrupted])
    with pytest.raises(KeyboardInterrupt):
        explain_corpus(there, many(30), tmp_path / "s", **SHORT)
    files = sorted(path.name for path in (tmp_path / "s").iterdir())
    asked, kept = n_asked(server), open_store(tmp_path / "s").rows()
    over.set()
    time.sleep(0.2)
    assert n_asked(server) == asked
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == files
    wanted = nla.explain(many(30), **SHORT)
    assert 4 <= len(kept) < 30
    assert all(row["token_ids"] == wanted[row["row"]].token_ids for row in kept)
    server.acts.clear()
    server.bodies.clear()
    done = explain_corpus(there, many(30), tmp_path / "s", **SHORT)
    assert n_asked(server) == 30 - len(kept)
    assert [e.token_ids for e in done.explanations()] == [e.token_ids for e in wanted]
