"""Engine "ndif" against a real NDIF server on loopback; `make test-ndif` runs this."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import nla_lens
from nla_lens import NLA
from nla_lens.doctor import examine
from nla_lens.errors import NLARemoteError

from .checkpoints import EXPLANATIONS, build_av, build_pair, build_source, vectors

if "NLA_LENS_TEST_NDIF" not in os.environ:
    pytest.skip("needs the server's environment: make test-ndif", allow_module_level=True)

import nnsight
from nnsight.schema.config import CONFIG

from .ndif_server.server import Server, model_key

pytestmark = pytest.mark.timeout(300)
K = 3
TEXTS = ["The garlic sizzles in the pan.", "Rain", "Rain falls on the roof."]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    source = build_source(directory / "source", "llama")
    av, ar = build_pair(directory, "llama", base=source)
    return {"source": source, "av": av, "ar": ar}


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[Server]:
    with Server() as started:
        started.deploy(list(models.values()))
        host, CONFIG.API.HOST = CONFIG.API.HOST, started.url
        try:
            yield started
        finally:
            CONFIG.API.HOST = host


@pytest.fixture
def load(models: dict[str, Path], server: Server) -> Callable[..., NLA]:
    def loaded(engine: Any = "ndif") -> NLA:
        return NLA.from_pretrained(av=models["av"], ar=models["ar"], engine=engine)

    return loaded


@pytest.fixture(scope="module")
def here(models: dict[str, Path]) -> Callable[[], NLA]:
    return cache(lambda: NLA.from_pretrained(av=models["av"], ar=models["ar"]))


def many(n: int) -> torch.Tensor:
    return torch.cat([vectors(seed=seed) for seed in range(n // 6 + 1)])[:n]


def settings(nla: NLA) -> Any:
    engine: Any = nla.verbalizer.engine
    return engine.server


def ids(explanations: Any) -> list[Any]:
    return [e.token_ids for e in explanations]


def test_extraction_is_equal(models: dict[str, Path], server: Server) -> None:
    for positions in (None, [-1]):
        there = nla_lens.extract(models["source"], TEXTS, K, positions=positions, remote=True)
        local = nla_lens.extract(models["source"], TEXTS, K, positions=positions)
        differences = [
            float((a.as_ordinary() - b.as_ordinary()).abs().max())
            for a, b in zip(there, local, strict=True)
        ]
        assert differences == [0.0] * len(TEXTS)


def test_sixteen_vectors_in_one_request(
    load: Callable[..., NLA], here: Callable[[], NLA], capsys: pytest.CaptureFixture[str]
) -> None:
    nla = load()
    found = nla.explain(many(16), max_new_tokens=24, score=False)
    assert ids(found) == ids(here().explain(many(16), max_new_tokens=24, score=False))
    traffic = settings(nla).traffic
    assert traffic.requests == 1
    with capsys.disabled():
        print(
            f"\nAV, d_model 64, 16 vectors in one request, per explanation: "
            f"{traffic.sent / 16:.0f} bytes sent, {traffic.received / 16:.0f} received"
        )
    sampled = {"max_new_tokens": 12, "score": False, "temperature": 1.0, "seed": 3}
    assert ids(nla.explain(many(4), **sampled)) == ids(here().explain(many(4), **sampled))


def test_reconstructions_are_equal(load: Callable[..., NLA], here: Callable[[], NLA]) -> None:
    difference = (load().reconstruct(EXPLANATIONS) - here().reconstruct(EXPLANATIONS)).abs().max()
    assert float(difference) <= 1e-6


def test_explain_text_from_end_to_end(
    load: Callable[..., NLA], here: Callable[[], NLA], capsys: pytest.CaptureFixture[str]
) -> None:
    nla = load()
    start = time.monotonic()
    found = nla.explain_text(TEXTS[0], positions=[-1], max_new_tokens=12)
    seconds = time.monotonic() - start
    wanted = here().explain_text(TEXTS[0], positions=[-1], max_new_tokens=12)
    assert ids(found) == ids(wanted)
    assert found[0].cos == wanted[0].cos
    reconstructor: Any = nla.reconstructor
    totals = [settings(nla).traffic, reconstructor.engine.server.traffic]
    totals.append(nla._source.remote.server.traffic)
    sent, received = sum(t.sent for t in totals), sum(t.received for t in totals)
    with capsys.disabled():
        print(
            f"\nexplain_text, one position: {sent} bytes sent, {received} received, {seconds:.2f} s"
        )


def test_jobs_without_a_connection(load: Callable[..., NLA], here: Callable[[], NLA]) -> None:
    nla = load()
    settings(nla).blocking = False
    found = nla.explain(many(8), max_new_tokens=8, score=False)
    assert ids(found) == ids(here().explain(many(8), max_new_tokens=8, score=False))


def test_a_probe_on_a_model_that_runs_there(
    models: dict[str, Path], load: Callable[..., NLA]
) -> None:
    nla = load()
    engine: Any = nla.verbalizer.engine
    model = nnsight.TransformersModel(
        str(models["source"]), task="text-generation", tokenizer=engine.model.tokenizer
    )
    # nnsight asks the hub for the spelling of a name; a directory has none.
    backend = replace(engine.remote, model=model, key=model_key(models["source"])).backend()
    with nla_lens.attach(model, nla), model.trace(TEXTS[0], backend=backend):
        h = model.model.layers[K].output[0, -1].save()
    local = nla_lens.extract(models["source"], TEXTS[:1], K, positions=[-1])[0][0]
    assert torch.equal(h.as_ordinary(), local.as_ordinary())
    there, here = (resid.explain(nla, max_new_tokens=4) for resid in (h, local))
    assert (there.text, there.position, there.token) == (here.text, here.position, here.token)


def test_blocks_of_users_who_are_not_trusted(
    models: dict[str, Path],
    load: Callable[..., NLA],
    here: Callable[[], NLA],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They run in a process without the model, and are served its values over a socket."""
    request = nnsight.schema.request.RequestModel
    plain = request.metadata
    monkeypatch.setattr(
        request, "metadata", lambda self: json.dumps(json.loads(plain(self)) | {"trusted": False})
    )
    nla, wishes = load(), {"max_new_tokens": 8, "score": False}
    assert ids(nla.explain(many(4), **wishes)) == ids(here().explain(many(4), **wishes))
    assert float((nla.reconstruct(TEXTS) - here().reconstruct(TEXTS)).abs().max()) <= 1e-6
    there = nla_lens.extract(models["source"], TEXTS, K, remote=True)
    local = nla_lens.extract(models["source"], TEXTS, K)
    for a, b in zip(there, local, strict=True):
        assert torch.equal(a.as_ordinary(), b.as_ordinary())


def test_the_doctor(models: dict[str, Path], server: Server) -> None:
    findings = {f.name: f for f in examine(str(models["av"]), ar=str(models["ar"]))}
    for name in ("the server answers", "verbalizer", "reconstructor", "source model"):
        assert findings[name].passed, findings[name]
    assert findings["version of nnsight"].passed


def test_a_killed_model(load: Callable[..., NLA], here: Callable[[], NLA], server: Server) -> None:
    nla, wanted = load(), here().explain(many(64), max_new_tokens=60, score=False)
    traffic, killed_at = settings(nla).traffic, [0.0]

    def kill() -> None:
        while traffic.requests < 5:
            time.sleep(0.01)
        killed_at[0] = time.monotonic()
        assert server.signal_actors(signal.SIGKILL) == 3

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(NLARemoteError, match="model's process on the server ended") as caught:
        nla.explain(many(64), max_new_tokens=60, score=False, batch_size=4)
    assert time.monotonic() - killed_at[0] < 10
    killer.join()
    finished = list(caught.value.explanations or ())
    assert 0 < len(finished) < 64
    assert ids(finished) == ids(wanted)[: len(finished)]

    until = time.monotonic() + 90
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


def test_a_frozen_model(load: Callable[..., NLA], server: Server) -> None:
    nla = load()
    nla.explain(many(2), max_new_tokens=2, score=False)
    settings(nla).patience.running = settings(nla).patience.queued = 3.0
    server.signal_actors(signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(NLARemoteError, match="silent for 3 s") as caught:
            nla.explain(many(2), max_new_tokens=2, score=False)
        assert caught.value.cause == "silent"
        assert time.monotonic() - start < 10
    finally:
        server.signal_actors(signal.SIGCONT)


def test_what_is_not_there(models: dict[str, Path], load: Callable[..., NLA]) -> None:
    elsewhere = models["av"].with_name("never-deployed-av")
    shutil.copytree(models["av"], elsewhere)
    nla = NLA.from_pretrained(av=elsewhere, engine="ndif")
    with pytest.raises(NLARemoteError, match="not deployed") as caught:
        nla.explain(many(1), max_new_tokens=2)
    assert caught.value.cause == "not_deployed"

    absent = load("ndif:http://127.0.0.1:9")
    settings(absent).patience.connect = 0.5
    with pytest.raises(NLARemoteError, match="cannot be reached"):
        absent.explain(many(1), max_new_tokens=2)


def test_another_version_of_the_model(
    models: dict[str, Path], tmp_path: Path, server: Server
) -> None:
    larger = NLA.from_pretrained(av=build_av(tmp_path, "llama", n_blocks=8), engine="ndif")
    engine: Any = larger.verbalizer.engine
    engine.remote = replace(engine.remote, key=model_key(models["av"]))
    with pytest.raises(NLARemoteError, match="compare both sides") as caught:
        larger.explain(many(1), max_new_tokens=2)
    assert caught.value.cause == "versions"
