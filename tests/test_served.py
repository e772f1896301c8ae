"""Engines "vllm" and "sglang" against servers on loopback that run the real small model."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nla_lens import NLA, NLAError
from nla_lens.checkpoints.files import Checkpoint
from nla_lens.engines.served.server import KEY_VARIABLE, Served, Server, pick
from nla_lens.errors import NLARemoteError

from .checkpoints import build_av, vectors
from .checkpoints import many_vectors as many
from .checkpoints.configs import FAMILIES
from .model_server import Answered, Handler, ModelServer

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

ENGINES = ("vllm", "sglang")
KEY = "sk-this-is-the-key-and-no-one-may-see-it"
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def model_of(pair_dirs: Callable[..., Pair]) -> Callable[[str], tuple[Any, Any]]:
    def load(family: str) -> tuple[Any, Any]:
        path = str(pair_dirs(family, "replace")[0])
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        return model, AutoTokenizer.from_pretrained(path)

    return cache(load)


@pytest.fixture
def serve(
    model_of: Callable[[str], tuple[Any, Any]], pair_dirs: Callable[..., Pair]
) -> Iterator[Callable[..., ModelServer]]:
    """`serve(engine, family)` -> a server that runs the family's verbalizer."""
    with ExitStack() as stack:

        def start(engine: str, family: str = "llama") -> ModelServer:
            name = str(pair_dirs(family, "replace")[0])
            return stack.enter_context(ModelServer(engine, *model_of(family), name))

        yield start


@pytest.fixture
def load(pair_dirs: Callable[..., Pair]) -> Callable[..., NLA]:
    """`load(server)` -> an NLA whose verbalizer is there, without a reconstructor."""

    def loaded(server: ModelServer, family: str = "llama", ar: Any = None, **wishes: Any) -> NLA:
        reads = server.kind == "sglang" and family == "gemma3"
        url = Server(server.url, **{"patience": 0.5, "reads_embeds": reads, **wishes})
        av = pair_dirs(family, "replace")[0]
        nla = NLA.from_pretrained(av=av, ar=ar, engine=server.kind, url=url)
        server.bodies.clear()
        return nla

    return loaded


def ids(explanations: Any) -> list[list[int]]:
    return [e.token_ids for e in explanations]


def rows_in(body: Any) -> int:
    return len(body.get("prompt_embeds", body.get("input_embeds")))


def refuses(action: Callable[[], object], *words: str) -> NLAError:
    with pytest.raises(NLAError) as caught:
        action()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    return caught.value


def explains(nla: NLA, n: int = 6, **options: Any) -> Callable[[], Any]:
    return lambda: nla.explain(many(n), **{"max_new_tokens": 4, "score": False, **options})


# --- how it was started -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "settings", "words"),
    [
        ("sglang", {"chunked_prefill_size": 8192}, ["chunked_prefill_size=8192", "size -1"]),
        ("sglang", {"chunked_prefill_size": 64}, ["chunks", "--disable-radix-cache"]),
        ("sglang", {"chunked_prefill_size": 2048.0, "disable_radix_cache": False}, ["radix", "it"]),
        ("sglang", {"skip_tokenizer_init": True}, ["without --skip-tokenizer-init"]),
        ("sglang", {"enable_tokenizer_batch_encode": True}, ["batch-encode"]),
        ("sglang", {"preferred_sampling_params": {"min_new_tokens": 9}}, ["min_new_tokens"]),
        ("sglang", {"preferred_sampling_params": '{"logit_bias": {"1": 2}}'}, ["logit_bias"]),
        ("sglang", {"dtype": "bfloat16"}, ["bfloat16", "dtype='float32'"]),
        ("sglang", {"dtype": "half"}, ["float16"]),
        ("vllm", {"model_config": {"enable_prompt_embeds": False}}, ["--enable-prompt-embeds"]),
        ("vllm", {"model_config": {"skip_tokenizer_init": True}}, ["--skip-tokenizer-init"]),
        ("vllm", {"model_config": {"dtype": "torch.bfloat16"}}, ["bfloat16", "dtype='float32'"]),
    ],
)
def test_settings_that_make_answers_wrong(
    engine: str,
    settings: dict,
    words: list[str],
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
) -> None:
    server = serve(engine)
    server.settings = settings
    error = refuses(lambda: load(server, dtype="float32"), server.url, *words)
    assert isinstance(error, NLARemoteError)
    assert error.cause == "settings"
    assert server.bodies == [], "something was sent"
    server.settings_path = "/get_server_info"
    refuses(lambda: load(server, dtype="float32"), *words)


@pytest.mark.parametrize(
    ("engine", "settings", "said"),
    [
        ("sglang", {"quantization": "fp8"}, "quantization=fp8"),
        ("sglang", {"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype=fp8_e5m2"),
        ("sglang", {"speculative_algorithm": "EAGLE"}, "EAGLE"),
        ("sglang", {"dtype": "bfloat16"}, "computes in bfloat16, not float32"),
        ("vllm", {"model_config": {"quantization": "awq"}}, "quantization=awq"),
        ("vllm", {"cache_config": {"cache_dtype": "fp8"}}, "cache_dtype=fp8"),
        ("vllm", {"model_config": {"logits_processors": ["a.B"]}}, "a.B"),
        ("vllm", {"speculative_config": {"method": "ngram"}}, "ngram"),
    ],
)
def test_settings_that_round_otherwise_are_said(
    engine: str,
    settings: dict,
    said: str,
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = serve(engine)
    server.settings = settings
    caplog.set_level(logging.WARNING)
    nla = load(server)
    assert [said in words for words in nla.verbalizer.engine.said] == [True]  # type: ignore[attr-defined]
    assert said in caplog.text
    assert server.url in caplog.text


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"chunked_prefill_size": None, "dtype": None, "preferred_sampling_params": "{}"},
        {"chunked_prefill_size": 0, "preferred_sampling_params": {"temperature": 0.7, "top_k": 5}},
        {"chunked_prefill_size": "x", "dtype": 5, "preferred_sampling_params": "[" * 10_000},
        {"model_config": {"dtype": "torch.float32"}, "cache_config": {"cache_dtype": "auto"}},
        {"model_config": [], "cache_config": "x", "speculative_config": None},
        {"dtype": "float32", "kv_cache_dtype": "float32"},
    ],
)
def test_settings_that_change_nothing_say_nothing(
    engine: str, settings: dict, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine)
    server.settings = settings
    assert load(server).verbalizer.engine.said == ()  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_tells_nothing_is_taken(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine)
    server.settings_path = "/nowhere"
    assert load(server).verbalizer.engine.said == ()  # type: ignore[attr-defined]


# --- the same answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_the_local_engine(
    engine: str,
    family: str,
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
    load_pair: Callable[..., NLA],
) -> None:
    there, here = load(serve(engine, family), family), load_pair(family, "replace")
    sent = there.verbalizer.prompt_embeds(vectors())
    assert torch.equal(sent, here.verbalizer.prompt_embeds(vectors()))
    wishes: dict[str, Any] = {"max_new_tokens": 12, "score": False}
    assert ids(there.explain(vectors(), **wishes)) == ids(here.explain(vectors(), **wishes))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_arrives_is_what_enters_block_0(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine, "gemma3_text")
    nla = load(server, "gemma3_text")
    explains(nla, 2)()
    arrived = _arrived(server)
    assert torch.equal(arrived, nla.verbalizer.prompt_embeds(many(2)))


def _arrived(server: ModelServer) -> torch.Tensor:
    from .model_server import _decoded

    body = server.bodies[0]
    if server.kind == "vllm":
        return torch.stack([_decoded(one) for one in body["prompt_embeds"]]).float()
    return torch.tensor(body["input_embeds"])


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_end_where_they_do_here(
    engine: str, tmp_path: Path, load: Callable[..., NLA]
) -> None:
    """Closing tags that overhang a token, ends of sequence, and answers that go on."""
    av = build_av(tmp_path / "ends-av", "qwen2", closing=True, quiet_eos=False)
    model = AutoModelForCausalLM.from_pretrained(str(av)).eval()
    here = NLA.from_pretrained(av=av)
    with ModelServer(engine, model, AutoTokenizer.from_pretrained(str(av)), str(av)) as server:
        there = NLA.from_pretrained(av=av, engine=engine, url=server.url)
        wishes: dict[str, Any] = {"max_new_tokens": 40}
        wanted = here.explain(many(18), **wishes)
        assert ids(there.explain(many(18), **wishes)) == ids(wanted)
        assert len({len(e.token_ids) for e in wanted}) > 2

        def on_and_on(answer: Any) -> Any:
            for one in answer["choices"] if engine == "vllm" else answer:
                one["token_ids" if engine == "vllm" else "output_ids"] += [5, 6, 7]
            return answer

        server.mangle = on_and_on
        assert ids(there.explain(many(18), **wishes)) == ids(wanted)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [None, 1, 3, 7, 64])
def test_batch_size_is_the_most_vectors_under_way(
    engine: str,
    batch_size: int | None,
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
    nla: NLA,
) -> None:
    server = serve(engine)
    most, under_way, lock = 0, 0, threading.Lock()
    post = server.post

    def counted(path: str, handler: Handler) -> Answered | None:
        nonlocal most, under_way
        n = rows_in(json.loads(handler.body))
        with lock:
            under_way += n
            most = max(most, under_way)
        answered = post(path, handler)
        with lock:
            under_way -= n
        return answered

    there = load(server)
    server.post = counted  # type: ignore[method-assign]
    found = explains(there, 11, batch_size=batch_size)()
    assert ids(found) == ids(explains(nla, 11)())
    assert most <= (batch_size or 11)
    assert sum(map(rows_in, server.bodies)) == 11


@pytest.mark.parametrize("engine", ENGINES)
def test_explain_iter_is_in_order_and_lazy(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA], nla: NLA
) -> None:
    server = serve(engine)
    there = load(server, connections=2, rows_per_request=1)
    # The first request is the slowest.
    server.acts.append(lambda handler: time.sleep(0.3) or _answered(server, handler))
    found = there.explain_iter(many(12), max_new_tokens=4)
    assert not server.bodies
    assert next(found).token_ids == explains(nla, 1)()[0].token_ids
    time.sleep(0.5)
    seen = len(server.bodies)
    assert seen < 12, "all was sent before anyone asked"
    time.sleep(0.2)
    assert len(server.bodies) == seen
    assert [e.token_ids for e in found] == ids(explains(nla, 12)())[1:]


def _answered(server: ModelServer, handler: Handler) -> Answered:
    make = server._vllm if server.kind == "vllm" else server._sglang
    return make(json.loads(handler.body))


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_have_seeds_of_their_own(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine)
    there = load(server)
    wishes: dict[str, Any] = {"temperature": 1.0, "seed": 3, "num_samples": 2}
    first = explains(there, 4, **wishes)()
    seeds = []
    for body in server.bodies:
        if engine == "vllm":
            assert rows_in(body) == 1
            seeds.append(body["seed"])
        else:
            seeds += [params["sampling_seed"] for params in body["sampling_params"]]
    assert len(set(seeds)) == 8
    again = explains(there, 4, batch_size=3, **wishes)()
    assert ids(again) == ids(first)
    assert ids(explains(there, 4, **{**wishes, "seed": 4})()) != ids(first)


def test_nothing_of_generation_config_leaks_in(
    serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    """vLLM takes from it whatever a request leaves open."""
    server = serve("vllm")
    explains(load(server), 1)()
    body = server.bodies[0]
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "temperature": 0.0}
    assert {key: body[key] for key in neutral} == neutral
    assert body["ignore_eos"] is True
    assert body["stop"] == ["</explanation>"]


def test_numbers_of_numpy_are_written(
    serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    for engine in ENGINES:
        there = load(serve(engine))
        wishes = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": 1}
        assert len(explains(there, 2, **wishes)()) == 2


def test_the_reconstructor_runs_here(
    serve: Callable[..., ModelServer], load: Callable[..., NLA], pair_dirs: Callable[..., Pair]
) -> None:
    ar = pair_dirs("llama", "replace")[1]
    server = serve("vllm")
    found = load(server, ar=ar).explain(many(3), max_new_tokens=4)
    assert all(e.cos is not None for e in found)
    explicit = NLA.from_pretrained(
        av=pair_dirs("llama", "replace")[0],
        ar=ar,
        engine={"av": "vllm", "ar": "transformers"},
        url=server.url,
    )
    assert ids(explicit.explain(many(3), max_new_tokens=4)) == ids(found)


# --- refused before anything is sent --------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_norm_matched_add_is_refused(
    engine: str, pair_dirs: Callable[..., Pair], serve: Callable[..., ModelServer]
) -> None:
    server = serve(engine)
    av = pair_dirs("llama", "norm_matched_add")[0]
    load = lambda: NLA.from_pretrained(  # noqa: E731
        av=av, injection="norm_matched_add", engine=engine, url=server.url
    )
    refuses(load, "norm_matched_add", "block 1", "engine='transformers'")
    assert not server.bodies


@pytest.mark.parametrize("engine", ENGINES)
def test_vectors_and_options_are_checked_first(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine)
    there = load(server)
    bad = many(3)
    bad[1, 2] = float("nan")
    refuses(lambda: there.explain(bad), "nan")
    refuses(lambda: there.explain(torch.ones(2, 5)), "d_model=64")
    refuses(explains(there, max_new_tokens=500), "max_new_tokens=500", "512", server.url)
    assert not server.bodies


@pytest.mark.parametrize("engine", ENGINES)
def test_what_overflows_in_the_servers_dtype_is_never_sent(
    engine: str, serve: Callable[..., ModelServer], pair_dirs: Callable[..., Pair]
) -> None:
    server = serve(engine)
    av = pair_dirs("llama", "replace")[0]
    nla = NLA.from_pretrained(
        av=av, engine=engine, url=Server(server.url, dtype="float16"), injection_scale=1e6
    )
    server.bodies.clear()
    refuses(explains(nla), "row 0", "float16", "nothing was sent")
    assert not server.bodies


@pytest.mark.parametrize(
    ("url", "word"),
    [
        (None, "needs url="),
        ("localhost:8000", "http://HOST:PORT"),
        ("ftp://host", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("http://host:port", "http://HOST:PORT"),
        ("http://user:secret@host", "api_key="),
        ("http://host/?key=1", "http://HOST:PORT"),
        ("http://host\n", "http://HOST:PORT"),
        (3, "found a int"),
    ],
)
def test_addresses(url: Any, word: str, pair_dirs: Callable[..., Pair]) -> None:
    av = pair_dirs("llama", "replace")[0]
    error = refuses(lambda: NLA.from_pretrained(av=av, engine="vllm", url=url), word)
    assert "secret" not in str(error)


def test_engines_and_halves(pair_dirs: Callable[..., Pair]) -> None:
    av, ar = pair_dirs("llama", "replace")
    load = NLA.from_pretrained
    refuses(lambda: load(av=av, url="http://host"), "url=", "'transformers'")
    for half in ("ar", "source"):
        engine = {"av": "vllm", half: "sglang"}
        refuses(
            lambda e=engine: load(av=av, ar=ar, engine=e, url="http://host"), half, "no vectors"
        )


@pytest.mark.parametrize(
    "wrong",
    [{"timeout": 0}, {"patience": "long"}, {"connections": 0}, {"rows_per_request": 1.5}],
)
def test_settings(wrong: dict[str, Any]) -> None:
    refuses(lambda: Server("http://host", **wrong), next(iter(wrong)))


def test_sglang_ignores_embeddings_in_the_wrapper(
    serve: Callable[..., ModelServer], pair_dirs: Callable[..., Pair]
) -> None:
    server = serve("sglang", "gemma3")
    av = pair_dirs("gemma3", "replace")[0]
    load = lambda: NLA.from_pretrained(av=av, engine="sglang", url=server.url)  # noqa: E731
    refuses(load, "wrapper", "reads_embeds=True")
    assert not server.bodies


# --- a server that is not what it should be -------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "flag"), [("vllm", "--enable-prompt-embeds"), ("sglang", "radix")]
)
def test_a_missing_flag_is_named(
    engine: str, flag: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine)
    server.flag = False
    assert refuses(lambda: load(server), flag, server.url).cause == "settings"  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", ENGINES)
def test_another_model(
    engine: str,
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
    pair_dirs: Callable[..., Pair],
) -> None:
    server = serve(engine)
    own, server.name = server.name, "someone/else"
    error = refuses(lambda: load(server), "someone/else", str(pair_dirs("llama", "replace")[0]))
    assert error.cause == "not_deployed"  # type: ignore[attr-defined]
    refuses(lambda: load(server, model="a-third"), "a-third", "someone/else")
    assert len(explains(load(server, model="someone/else"))()) == 6
    server.name = f"elsewhere/{Path(own).name}"
    assert len(explains(load(server))()) == 6


@pytest.mark.parametrize(
    ("there", "name", "same"),
    [
        ("someone/x-av", "someone/x-av", True),
        ("/data/X-av/", "someone/x-av", True),
        ("x-av", "someone/x-av", True),
        ("/cache/models--someone--x-av/snapshots/0a1b", "someone/x-av", True),
        ("/cache/models--other--x-av/snapshots/0a1b", "someone/x-av", False),
        ("someone/x-ar", "someone/x-av", False),
        ("y-x-av", "someone/x-av", False),
        ("/data/pair/av", "pair/av", True),
        ("/data/other/av", "pair/av", False),
        ("av", "pair/av", False),
        ("", "someone/x-av", False),
    ],
)
def test_names_that_stand_for_a_checkpoint(there: str, name: str, same: bool) -> None:
    checkpoint = Checkpoint(name, Path(name))
    models = [Served("another", "another", None), Served("served", there, None)]
    server = Server("http://host")
    if same:
        assert pick(models, checkpoint, server).name == "served"
    else:
        refuses(lambda: pick(models, checkpoint, server), name, "'served'")


def test_another_width(
    tmp_path: Path, serve: Callable[..., ModelServer], pair_dirs: Callable[..., Pair]
) -> None:
    av = build_av(tmp_path / "wide-av", "llama", d_model=128)
    url = serve("vllm").url
    server = Server(url, model=str(pair_dirs("llama", "replace")[0]))
    refuses(lambda: NLA.from_pretrained(av=av, engine="vllm", url=server), "d_model=128", "64")


@pytest.mark.parametrize("engine", ENGINES)
def test_no_server(engine: str, pair_dirs: Callable[..., Pair]) -> None:
    av = pair_dirs("llama", "replace")[0]
    start = time.monotonic()
    url = Server("http://127.0.0.1:9", patience=0.2)
    error = refuses(lambda: NLA.from_pretrained(av=av, engine=engine, url=url), "127.0.0.1:9")
    assert error.cause == "unreachable"  # type: ignore[attr-defined]
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("models", [[], {"data": "x"}, {"data": [{"id": 3}]}, {"data": []}, "no"])
def test_model_lists_that_are_none(
    models: Any, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve("vllm")
    server.models = models or {"data": []}
    refuses(lambda: load(server), "/v1/models")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_key(
    engine: str,
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(engine)
    server.key = KEY
    assert refuses(lambda: load(server), "API key").cause == "key"  # type: ignore[attr-defined]
    nla = load(server, api_key=KEY)
    assert len(explains(nla)()) == 6
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert len(explains(load(server))()) == 6
    # A server that repeats what it was sent.
    server.acts.append(lambda handler: (400, {"error": handler.headers["Authorization"]}))
    error = refuses(explains(nla), "HTTP 400")
    refuses(lambda: load(server, api_key=f"{KEY}\n"), "printable")
    engine_of: Any = nla.verbalizer.engine
    shown = [str(error), repr(engine_of.server), repr(nla), caplog.text]
    assert not any(KEY in text for text in shown)


# --- failures on the way --------------------------------------------------------------------------


def reset(handler: Handler) -> None:
    """The connection breaks before the answer."""
    handler.connection.close()


def half(handler: Handler) -> None:
    """It breaks in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(64):
        handler.wfile.write(b" " * (1 << 20))


def squeezed(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", "3")
    handler.end_headers()
    handler.wfile.write(b"abc")


def say(status: int, body: Any) -> Callable[[Handler], Answered]:
    return lambda handler: (status, body)


FAILURES = [
    (reset, "lost", "hung up"),
    (half, "lost", "hung up"),
    (endless, "failed", "more than"),
    (squeezed, "failed", "compressed"),
    (say(200, b"{"), "failed", "not JSON"),
    (say(200, b"[" * 100_000), "failed", "not JSON"),
    (say(200, b""), "failed", "not JSON"),
    (say(200, None), "failed", "answered"),
    (say(200, {}), "failed", "answered"),
    (say(200, []), "failed", "answered"),
    (say(400, {"error": {"message": "no\x1b[31m\u202e!"}}), "failed", "no\\x1b[31m\\u202e!"),
    (say(400, {"error": []}), "failed", "HTTP 400"),
    (say(400, b"\xff" * 100_000), "failed", "HTTP 400"),
    (say(401, b""), "key", "API key"),
    (say(403, b""), "key", "API key"),
    (say(404, b""), "not_deployed", "no model"),
    (say(413, b""), "too_large", "batch_size"),
    (say(307, b""), "failed", "elsewhere"),
    (say(500, {"error": {"message": "CUDA out of memory"}}), "memory", "batch_size"),
    (say(500, b"oh"), "failed", "oh"),
    (say(204, b""), "failed", "HTTP 204"),
]


# The two engines share what reads an answer: for the second, some suffice.
@pytest.mark.parametrize(
    ("engine", "act", "cause", "word"),
    [("vllm", *row) for row in FAILURES]
    + [("sglang", *row) for row in (FAILURES[1], FAILURES[7], FAILURES[8])]
    + [("sglang", say(404, b""), "not_found", "HTTP 404")],
)
def test_a_request_that_fails(
    engine: str,
    act: Any,
    cause: str,
    word: str,
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
    nla: NLA,
) -> None:
    """It is not sent again, and what was finished is kept."""
    server = serve(engine)
    there = load(server, connections=1, rows_per_request=2)
    server.acts.extend([None, act])
    error = refuses(explains(there, 8), server.url, word)
    assert isinstance(error, NLARemoteError)
    assert error.cause == cause
    assert len(str(error)) < 1500
    assert len(server.bodies) == 2, "a request that failed was sent again"
    assert error.explanations is not None
    assert ids(error.explanations) == ids(explains(nla, 2)())


@pytest.mark.parametrize("engine", ENGINES)
def test_requests_beside_one_that_fails_are_kept(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA], nla: NLA
) -> None:
    server = serve(engine)
    there = load(server, connections=4, rows_per_request=2)

    def fails_soon(handler: Handler) -> Answered:
        time.sleep(0.1)
        return 500, b"oh"

    def slow(handler: Handler) -> Answered:
        time.sleep(0.4)
        return _answered(server, handler)

    server.acts.extend([fails_soon, slow, slow, slow])
    error = refuses(explains(there, 20), "oh")
    assert len(server.bodies) == 4
    assert len(error.later) + len(error.explanations or ()) == 6
    wanted = explains(nla, 20)()
    assert all(e.token_ids == wanted[i].token_ids for i, e in error.later.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_token_ids_that_are_none(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine)
    there = load(server)
    key = "token_ids" if engine == "vllm" else "output_ids"
    for wrong in (None, "abc", ["1"], [1.5], [True], [-1], [640], [10**30], [], [5], {"a": 1}):

        def mangle(answer: Any, wrong: Any = wrong) -> Any:
            (answer["choices"] if engine == "vllm" else answer)[0][key] = wrong
            return answer

        server.mangle = mangle
        refuses(explains(there, 2), server.url)


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_that_are_too_few_or_none(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine)
    there = load(server)
    wrong: list[Callable[[list], Any]] = [
        lambda found: found[:-1],
        lambda found: [*found, found[0]],
        lambda found: [],
        lambda found: ["x"] * len(found),
        lambda found: {"0": found},
    ]
    if engine == "vllm":
        wrong.append(lambda found: [{**one, "index": 0} for one in found])
        wrong.append(lambda found: [{**one, "index": "0"} for one in found])
    for change in wrong:

        def mangle(answer: Any, change: Any = change) -> Any:
            return {"choices": change(answer["choices"])} if engine == "vllm" else change(answer)

        server.mangle = mangle
        refuses(explains(there, 3), server.url)


def test_choices_are_matched_by_their_index(
    serve: Callable[..., ModelServer], load: Callable[..., NLA], nla: NLA
) -> None:
    server = serve("vllm")
    there = load(server)
    server.mangle = lambda answer: {**answer, "choices": answer["choices"][::-1]}
    assert ids(explains(there, 7)()) == ids(explains(nla, 7)())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_server_is_asked_again(
    engine: str,
    status: int,
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
    nla: NLA,
) -> None:
    server = serve(engine)
    patient = load(server, connections=1, rows_per_request=8, patience=30.0)
    server.acts.extend([say(status, b"busy")] * 2)
    assert ids(explains(patient)()) == ids(explains(nla)())
    assert len(server.bodies) == 3
    there = load(server, connections=1, rows_per_request=8)
    server.acts.extend([say(status, b"busy")] * 1000)
    error = refuses(explains(there), "time and again", str(status))
    assert error.cause == "busy"  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", ENGINES)
def test_silence(engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]) -> None:
    server = serve(engine)
    there = load(server, timeout=0.3)
    over = threading.Event()

    def say_nothing(handler: Handler) -> None:
        over.wait(5.0)

    server.acts.append(say_nothing)
    start = time.monotonic()
    error = refuses(explains(there), "within 0.3 s", "not sent again")
    assert error.cause == "silent"  # type: ignore[attr-defined]
    assert time.monotonic() - start < 4.0
    over.set()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_that_is_left_gives_up_its_requests(
    engine: str, serve: Callable[..., ModelServer], load: Callable[..., NLA]
) -> None:
    server = serve(engine)
    there = load(server, connections=2, rows_per_request=1)
    threads = threading.active_count()
    found = there.explain_iter(many(6), max_new_tokens=4)
    slow, left = 4.0, threading.Event()

    def answer_late(handler: Handler) -> Answered | None:
        # Of two requests either may arrive first, so this one is answered if it is waited for.
        return None if left.wait(slow) else _answered(server, handler)

    server.acts.extend([None, answer_late])
    next(found)
    start = time.monotonic()
    found.close()  # type: ignore[attr-defined]
    took = time.monotonic() - start
    left.set()
    assert took < 0.75 * slow
    assert not [t for t in threading.enumerate() if "run_forever" in t.name]
    assert threading.active_count() <= threads + 2  # the server's own


@pytest.mark.parametrize("engine", ENGINES)
def test_interrupted(
    engine: str,
    serve: Callable[..., ModelServer],
    load: Callable[..., NLA],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C ends at once, and what was finished is in the exception."""
    from nla_lens.engines.served import spreading

    server = serve(engine)
    # One after the other: of two, the second may be back first, again and again.
    there = load(server, connections=1, rows_per_request=1)
    waited = spreading.wait
    finished = 0

    def wait(*args: Any, **options: Any) -> Any:
        nonlocal finished
        if finished > 1:
            raise KeyboardInterrupt
        found = waited(*args, **options)
        finished += len(found.done)
        return found

    monkeypatch.setattr(spreading, "wait", wait)
    with pytest.raises(KeyboardInterrupt) as caught:
        explains(there, 8)()
    assert len(caught.value.explanations) >= 1  # type: ignore[attr-defined]
