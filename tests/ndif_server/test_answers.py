"""What a real NDIF server answers is what one has here."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.schema.config import CONFIG

import nla_lens
from nla_lens import NLA
from nla_lens.cli.doctor import examine
from nla_lens.models.weights import load_tokenizer
from tests.checkpoints import EXPLANATIONS

from .conftest import REPO, REVISION, ids, many, settings
from .server import GUEST, KEY, OWNER, Server, model_key

pytestmark = pytest.mark.timeout(900)
K = 3
TEXTS = ["The garlic sizzles in the pan.", "Rain", "Rain falls on the roof."]


def test_extraction_is_equal(
    models: dict[str, Path], server: Server, say: Callable[[str], None]
) -> None:
    model = nnsight.TransformersModel(
        str(models["source"]),
        task="text-generation",
        tokenizer=load_tokenizer(models["source"]),
        dispatch=True,
    )
    local = {"nnsight": model, "transformers": models["source"]}
    for positions in (None, [-1]):
        there = nla_lens.extract(models["source"], TEXTS, K, positions=positions, remote=True)
        differences = {
            name: max(
                float((a.as_ordinary() - b.as_ordinary()).abs().max())
                for a, b in zip(
                    there, nla_lens.extract(here, TEXTS, K, positions=positions), strict=True
                )
            )
            for name, here in local.items()
        }
        say(f"extraction, positions {positions}: largest difference from local {differences}")
        assert differences == {"nnsight": 0.0, "transformers": 0.0}


def test_sixteen_vectors_in_one_request(
    load: Callable[..., NLA], here: Callable[[], NLA], say: Callable[[str], None]
) -> None:
    nla = load()
    found = nla.explain(many(16), max_new_tokens=24, score=False)
    wanted = here().explain(many(16), max_new_tokens=24, score=False)
    traffic = settings(nla).traffic
    say(
        f"AV, d_model 64, 16 vectors, {traffic.requests} request, "
        f"{sum(a == b for a, b in zip(ids(found), ids(wanted), strict=True))} rows equal; "
        f"per explanation {traffic.sent / 16:.0f} bytes sent, {traffic.received / 16:.0f} received"
    )
    assert ids(found) == ids(wanted)
    assert traffic.requests == 1
    sampled = {"max_new_tokens": 12, "score": False, "temperature": 1.0, "seed": 3}
    assert ids(nla.explain(many(4), **sampled)) == ids(here().explain(many(4), **sampled))


def test_reconstructions_are_equal(
    load: Callable[..., NLA], here: Callable[[], NLA], say: Callable[[str], None]
) -> None:
    there = load().reconstruct(EXPLANATIONS)
    same_traces = load("nnsight").reconstruct(EXPLANATIONS)
    difference = float((there - same_traces).abs().max())
    plain = float((there - here().reconstruct(EXPLANATIONS)).abs().max())
    say(f"AR: largest difference {difference} from engine nnsight here, {plain} from transformers")
    assert difference <= 1e-6
    assert plain <= 1e-6


def test_explain_text_from_end_to_end(
    load: Callable[..., NLA], here: Callable[[], NLA], say: Callable[[str], None]
) -> None:
    nla = load()
    start = time.monotonic()
    found = nla.explain_text(TEXTS[0], positions=[-1], max_new_tokens=12)
    seconds = time.monotonic() - start
    wanted = here().explain_text(TEXTS[0], positions=[-1], max_new_tokens=12)
    assert ids(found) == ids(wanted)
    assert found[0].cos == pytest.approx(wanted[0].cos, abs=1e-6)
    reconstructor: Any = nla.reconstructor
    totals = [settings(nla).traffic, reconstructor.engine.server.traffic]
    totals.append(nla._source.loaded.remote.server.traffic)
    sent, received = sum(t.sent for t in totals), sum(t.received for t in totals)
    say(f"explain_text, one position: {sent} bytes sent, {received} received, {seconds:.2f} s")


def test_jobs_without_a_connection(load: Callable[..., NLA], here: Callable[[], NLA]) -> None:
    nla = load()
    settings(nla).blocking = False
    found = nla.explain(many(8), max_new_tokens=8, score=False)
    assert ids(found) == ids(here().explain(many(8), max_new_tokens=8, score=False))


def test_a_result_too_large_for_the_connection(
    models: dict[str, Path], load: Callable[..., NLA], server: Server
) -> None:
    """It is fetched from the object store."""
    texts = ["Rain falls on the roof. " * 130 + str(n) for n in range(56)]
    there = nla_lens.extract(models["source"], texts, K, remote=True)
    assert sum(t.numel() * 4 for t in there) > 10 << 20
    local = nla_lens.extract(models["source"], texts[:1], K)
    assert torch.equal(there[0].as_ordinary(), local[0].as_ordinary())


def test_a_probe_on_a_model_that_runs_there(
    models: dict[str, Path], load: Callable[..., NLA]
) -> None:
    nla = load()
    engine: Any = nla.verbalizer.engine
    model = nnsight.TransformersModel(
        str(models["source"]), task="text-generation", tokenizer=engine.model.tokenizer
    )
    # nnsight asks the hub for the spelling of a name; a directory has none.
    there = replace(engine.remote, model=model, key=model_key(models["source"]))
    backend = there.backend(nla.spec.d_model)
    with nla_lens.attach(model, nla), model.trace(TEXTS[0], backend=backend):
        h = model.model.layers[K].output[0, -1].save()
    local = nla_lens.extract(models["source"], TEXTS[:1], K, positions=[-1])[0][0]
    assert torch.equal(h.as_ordinary(), local.as_ordinary())
    said, wanted = (resid.explain(nla, max_new_tokens=4) for resid in (h, local))
    assert (said.text, said.position, said.token) == (wanted.text, wanted.position, wanted.token)


def test_blocks_of_users_who_are_not_trusted(
    models: dict[str, Path],
    load: Callable[..., NLA],
    here: Callable[[], NLA],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They run in a process without the model, and are served its values over a socket."""
    monkeypatch.setattr(CONFIG.API, "APIKEY", GUEST)
    nla, wishes = load(), {"max_new_tokens": 8, "score": False}
    assert ids(nla.explain(many(4), **wishes)) == ids(here().explain(many(4), **wishes))
    same_traces = load("nnsight").reconstruct(TEXTS)
    assert float((nla.reconstruct(TEXTS) - same_traces).abs().max()) <= 1e-6
    there = nla_lens.extract(models["source"], TEXTS, K, remote=True)
    local = nla_lens.extract(models["source"], TEXTS, K)
    for a, b in zip(there, local, strict=True):
        assert float((a.as_ordinary() - b.as_ordinary()).abs().max()) <= 1e-6


def test_a_revision_is_a_model_of_its_own(
    server: Server, hub_cache: Path, here: Callable[[], NLA]
) -> None:
    code = f"""
import sys
from nla_lens import NLA, NLAError
from tests.ndif_server.conftest import ids, many
nla = NLA.from_pretrained(av={REPO!r}, revision=sys.argv[1], engine="ndif")
try:
    print(ids(nla.explain(many(2), max_new_tokens=6)))
except NLAError as error:
    print(error)
"""
    own = {"HF_HUB_CACHE": str(hub_cache), "NDIF_HOST": server.url, "NDIF_API_KEY": KEY}
    said = {
        revision: subprocess.run(
            [sys.executable, "-c", code, revision],
            env=os.environ | own,
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        ).stdout.strip()
        for revision in (REVISION, "v1")
    }
    assert said[REVISION] == str(ids(here().explain(many(2), max_new_tokens=6, score=False)))
    assert "not deployed" in said["v1"] and f"{REPO} (revision v1)" in said["v1"]


def test_the_doctor(
    models: dict[str, Path], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> dict[str, Any]:
        return {f.name: f for f in examine(str(models["av"]), ar=str(models["ar"]))}

    findings = asked()
    for name in ("the server answers", "verbalizer", "reconstructor", "source model"):
        assert findings[name].passed, findings[name]
    assert findings["version of nnsight"].passed
    assert findings["the API key"].passed and OWNER in findings["the API key"].detail
    for wrong in (None, "sesame", KEY.replace("5", "6")):
        monkeypatch.setattr(CONFIG.API, "APIKEY", wrong)
        finding = asked()["the API key"]
        assert finding.passed is False and "nnsight login" in finding.detail
        assert wrong is None or wrong not in finding.detail


def test_the_bar_shows_the_state(
    load: Callable[..., NLA],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nla_lens.progress, "_SHOWN_AFTER_SECONDS", 0.0)
    load().explain_text(TEXTS[0], [-1], max_new_tokens=4, progress=True)
    shown = capsys.readouterr().err
    reading, _, explaining = shown.partition("explaining")
    for part in (reading, explaining):
        assert "received" in part and "running" in part
    load().explain_text(TEXTS[0], [-1], max_new_tokens=4, progress=False)
    assert capsys.readouterr().err == ""
