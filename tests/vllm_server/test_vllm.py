"""Engine "vllm" against real servers, token by token in float32."""

import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from nla_lens import NLA, NLAError
from nla_lens.cli.doctor import examine
from nla_lens.engines.served.server import Server as Address
from nla_lens.errors import NLARemoteError
from tests.checkpoints import reference

from .conftest import D_MODEL, KEY
from .server import Server

pytestmark = pytest.mark.timeout(400)
N, N_TOKENS = 64, 48
Load = Callable[..., NLA]


def many(n: int = N) -> torch.Tensor:
    return torch.randn(N, D_MODEL, generator=torch.Generator().manual_seed(0))[:n]


def ids(explanations: Any) -> list[list[int]]:
    return [e.token_ids for e in explanations]


@pytest.fixture
def load(models: dict[str, Path], servers: dict[str, Server]) -> Load:
    """`load(family)` -> an NLA whose verbalizer is on that family's server."""

    def loaded(family: str = "qwen2", av: str | None = None, **settings: Any) -> NLA:
        known = {"qwen2": {"api_key": KEY}, "gemma3_text": {"model": "gemma"}}.get(family, {})
        url = Address(servers[family].url, **{**known, **settings})
        return NLA.from_pretrained(av=models[av or family], engine="vllm", url=url)

    return loaded


@pytest.fixture(scope="session")
def here(models: dict[str, Path]) -> Load:
    return cache(lambda family="qwen2": NLA.from_pretrained(av=models[family]))


@pytest.fixture(scope="session")
def wanted(here: Load) -> Callable[..., list[list[int]]]:
    """Greedy ids of the local engine."""
    return cache(
        lambda family="qwen2": ids(
            here(family).explain(many(), max_new_tokens=N_TOKENS, score=False)
        )
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_sixty_four_vectors_token_by_token(
    family: str, load: Load, here: Load, wanted: Any
) -> None:
    there = load(family)
    sent, own = (nla.verbalizer.prompt_embeds(many(4)) for nla in (there, here(family)))
    assert torch.equal(sent, own)
    found = ids(there.explain(many(), max_new_tokens=N_TOKENS, score=False))
    equal = sum(a == b for a, b in zip(found, wanted(family), strict=True))
    assert equal == N, f"{equal} of {N} equal"
    assert len({tuple(one) for one in found}) > N // 2


def test_an_adapter_beside_its_base(load: Load, models: dict[str, Path]) -> None:
    """Found by its directory; peft is not needed."""
    own = reference.AV(models["lora"])
    greedy = own.greedy(many(8), 16)
    there = load("gemma3_text", av="lora", model=None)
    engine: Any = there.verbalizer.engine
    assert engine.served.name == "adapter"
    found = ids(there.explain(many(8), max_new_tokens=16))
    assert found == [row[: len(f)] for row, f in zip(greedy.ids.tolist(), found, strict=True)]
    assert found != ids(load("gemma3_text").explain(many(8), max_new_tokens=16))


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_the_doctor(family: str, models: dict[str, Path], servers: dict[str, Server]) -> None:
    known = {"api_key": KEY} if family == "qwen2" else {"model": "gemma"}
    url = Address(servers[family].url, **known)  # type: ignore[arg-type]
    findings = list(examine(str(models[family]), engine="vllm", url=url))
    assert len(findings) == 4
    assert all(f.passed for f in findings), findings


def test_explain_iter_is_in_order(load: Load, wanted: Any) -> None:
    found = load().explain_iter(many(), max_new_tokens=N_TOKENS, batch_size=12)
    assert [e.token_ids for e in found] == wanted()


def test_the_reconstructor_runs_here(
    models: dict[str, Path], servers: dict[str, Server], wanted: Any
) -> None:
    nla = NLA.from_pretrained(
        av=models["qwen2"],
        ar=models["ar"],
        engine={"av": "vllm", "ar": "transformers"},
        url=Address(servers["qwen2"].url, api_key=KEY),
    )
    found = nla.explain(many(5), max_new_tokens=N_TOKENS)
    assert ids(found) == wanted()[:5]
    assert all(e.cos is not None for e in found)


def test_a_custom_prompt_and_a_single_vector(load: Load, here: Load) -> None:
    wishes: dict[str, Any] = {"max_new_tokens": 12, "prompt": "What is <INJECT>? Say it."}
    found, own = (nla.explain(many()[0], **wishes) for nla in (load(), here()))
    assert found == own


def test_samples_are_repeatable(load: Load) -> None:
    nla = load()
    wishes: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "num_samples": 2}
    first = [[s.token_ids for s in e.samples] for e in nla.explain(many(4), seed=7, **wishes)]
    again = [[s.token_ids for s in e.samples] for e in nla.explain(many(4), seed=7, **wishes)]
    other = [[s.token_ids for s in e.samples] for e in nla.explain(many(4), seed=8, **wishes)]
    assert first == again != other
    assert all(a != b for a, b in first)


def test_refused_before_anything_is_sent(load: Load, servers: dict[str, Server]) -> None:
    nla = load()
    before = servers["qwen2"].metric("vllm:request_success_total")
    bad = many(3)
    bad[1, 2] = float("nan")
    with pytest.raises(NLAError, match="nan"):
        nla.explain(bad)
    with pytest.raises(NLAError, match="max_new_tokens=500 are more than the 512"):
        nla.explain(many(1), max_new_tokens=500)
    assert servers["qwen2"].metric("vllm:request_success_total") == before


def test_another_width(load: Load, models: dict[str, Path]) -> None:
    with pytest.raises(NLARemoteError, match="another width than d_model=64") as caught:
        load(av="narrow", model=str(models["qwen2"]))
    assert caught.value.cause == "not_deployed"


def test_another_model(load: Load, models: dict[str, Path]) -> None:
    with pytest.raises(NLARemoteError) as caught:
        load(av="llama")
    assert str(models["llama"]) in str(caught.value)
    assert str(models["qwen2"]) in str(caught.value)


def test_prompt_embeds_are_off(load: Load) -> None:
    with pytest.raises(NLARemoteError, match="start it with --enable-prompt-embeds") as caught:
        load("llama")
    assert caught.value.cause == "settings"


def test_the_key(load: Load) -> None:
    with pytest.raises(NLARemoteError, match="does not accept the API key") as caught:
        load(api_key="another")
    assert caught.value.cause == "key"
    assert "another" not in str(caught.value)


def test_a_loop_that_is_left_stops_the_server_working(
    load: Load, servers: dict[str, Server]
) -> None:
    found = load().explain_iter(many().repeat(8, 1), max_new_tokens=300)
    next(found)
    start = time.monotonic()
    found.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 5
    until = time.monotonic() + 20
    while servers["qwen2"].metric("vllm:num_requests_running") > 0:
        assert time.monotonic() < until, "the server goes on with what nobody waits for"
        time.sleep(0.2)


def test_throughput(
    load: Load, here: Load, capsys: pytest.CaptureFixture[str], wanted: Any
) -> None:
    def rate(nla: NLA) -> float:
        seconds = []
        for _ in range(3):
            start = time.monotonic()
            nla.explain(many(), max_new_tokens=N_TOKENS, score=False)
            seconds.append(time.monotonic() - start)
        return N / median(seconds)

    there, own = rate(load()), rate(here())
    with capsys.disabled():
        print(
            f"\nvLLM on the CPU: {there:.0f} explanations/s, the local engine {own:.0f} "
            f"(d_model {D_MODEL}, {N} vectors, {N_TOKENS} tokens, float32, one thread)"
        )


# The last: it ends the server.
def test_a_server_that_is_killed_midway(load: Load, servers: dict[str, Server], here: Load) -> None:
    nla = load(connections=4, rows_per_request=2)
    finished: list[Any] = []
    found = nla.explain_iter(many().repeat(8, 1), max_new_tokens=N_TOKENS)
    finished.extend(next(found) for _ in range(4))
    threading.Timer(0.2, servers["qwen2"].kill).start()
    start = time.monotonic()
    with pytest.raises(NLARemoteError) as caught:
        finished.extend(found)
    assert time.monotonic() - start < 30
    assert caught.value.cause in ("lost", "unreachable", "failed")
    assert servers["qwen2"].url in str(caught.value)
    n = len(finished)
    assert 4 <= n < 8 * N
    own = here().explain(many().repeat(8, 1)[:n], max_new_tokens=N_TOKENS, score=False)
    assert ids(finished) == ids(own)
    with pytest.raises(NLARemoteError, match="cannot be reached"):
        load(patience=0.5)
