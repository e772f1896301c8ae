"""`nla-lens doctor --engine vllm` and `--engine sglang`, and the other commands with `--url`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from nla_lens import NLA, NLAError
from nla_lens.cli.doctor import doctor, examine
from nla_lens.cli.main import cli
from nla_lens.engines.served.server import Server

from .model_server import ModelServer

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

ENGINES = ("vllm", "sglang")


@pytest.fixture(params=ENGINES)
def server(
    request: pytest.FixtureRequest, pair_dirs: Callable[..., tuple[Path, Path]]
) -> Iterator[ModelServer]:
    av = str(pair_dirs("gemma3_text", "replace")[0])
    model = AutoModelForCausalLM.from_pretrained(av, dtype="auto").eval()
    with ModelServer(request.param, model, AutoTokenizer.from_pretrained(av), av) as started:
        yield started


def look(server: ModelServer, name: str | None = None, **settings: Any) -> dict[str, Any]:
    url = Server(server.url, patience=0.2, **settings)
    findings = examine(name or server.name, engine=server.kind, url=url)
    return {f.name: (f.passed, f.detail) for f in findings}


def test_all_is_well(server: ModelServer) -> None:
    found = look(server)
    assert list(found) == [
        "the server can run it",
        "context length",
        "its tokenizer",
        "embeddings are read as they are sent",
    ]
    assert all(passed for passed, _ in found.values()), found


def test_embeddings_that_are_read_otherwise(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's factor left out changes the log-probabilities, whatever it does to the tokens."""
    from nla_lens.engines.served import prompt_rows

    monkeypatch.setattr(prompt_rows, "SCALED", frozenset())
    monkeypatch.setattr(prompt_rows, "PLAIN", frozenset({"gemma3_text"}))
    passed, detail = look(server)["embeddings are read as they are sent"]
    assert passed is False
    assert "dtype=" in detail


def test_short_context_and_other_tokenizer(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.max_len = 150
    monkeypatch.setattr(server, "tokenizer", lambda *args, **options: {"input_ids": [1]})
    server.tokenizer.decode = lambda ids: ""  # type: ignore[attr-defined]
    found = look(server)
    assert found["context length"][0] is False
    assert found["its tokenizer"][0] is False


def test_what_stands_in_the_way(server: ModelServer) -> None:
    server.flag = False
    (passed, detail) = look(server)["the server can run it"]
    assert passed is False
    assert "start it with --" in detail
    server.flag, server.key = True, "key"
    assert "API key" in look(server)["the server can run it"][1]


def test_settings_are_told(server: ModelServer) -> None:
    vllm = server.kind == "vllm"
    server.settings = {"cache_config": {"cache_dtype": "fp8"}} if vllm else {"quantization": "fp8"}
    found = look(server)
    assert found["its settings"] == (
        None,
        f"{'cache_dtype' if vllm else 'quantization'}=fp8: texts may differ",
    )
    server.settings = {"chunked_prefill_size": 8192, "model_config": {"skip_tokenizer_init": True}}
    passed, detail = look(server)["the server can run it"]
    assert passed is False
    assert "start it with" in detail


def test_answers_of_another_kind(server: ModelServer) -> None:
    def no_log_probs(answer: Any) -> Any:
        for one in answer if isinstance(answer, list) else answer["choices"]:
            one.pop("logprobs", None)
            one.pop("meta_info", None)
        return answer

    server.mangle = no_log_probs
    assert look(server)["embeddings are read as they are sent"][0] is None


def test_command(server: ModelServer) -> None:
    arguments = ["--engine", server.kind, "--url", server.url, server.name]
    ran = CliRunner().invoke(doctor, arguments)
    assert ran.exit_code == 0, ran.output
    assert ran.output.count("ok  ") == 4
    server.flag = False
    assert CliRunner().invoke(doctor, arguments).exit_code == 1


def test_url_is_for_servers_only() -> None:
    with pytest.raises(NLAError, match="url="):
        examine("tiny", engine="ndif", url="http://host")
    with pytest.raises(NLAError, match="needs url="):
        examine("tiny", engine="vllm")


def test_explain_on_the_command_line() -> None:
    nla = NLA.from_pretrained("tiny")
    engine: Any = nla.verbalizer.engine
    tokenizer: Any = nla.verbalizer.tokenizer
    with ModelServer("vllm", engine.model, tokenizer, "tiny-av") as server:
        options = ["--engine", "vllm", "--url", server.url, "--positions", "-1", "--json"]
        command = ["explain", "Nora lives in Naples.", *options]
        server.name = "elsewhere/tiny/av"
        ran = CliRunner().invoke(cli, command)
        assert ran.exit_code == 0, ran.output
        assert len(server.bodies) == 2  # the probe, and the vector
    own = CliRunner().invoke(cli, ["explain", "Nora lives in Naples.", *options[4:]])
    there, here = (json.loads(r.output)["explanations"][0] for r in (ran, own))
    assert there["text"] == here["text"]
    assert there["fve_nrm"] == pytest.approx(here["fve_nrm"], abs=1e-5)
