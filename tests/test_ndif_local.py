"""Engine "ndif" through nnsight's simulation of a server, and what a client needs to have."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import nla_lens
from nla_lens import NLA, NLAError

from .checkpoints import EXPLANATIONS, FAMILIES, build_pair, build_source, vectors

nnsight = pytest.importorskip("nnsight")
pytest.importorskip("tenacity")

from nla_lens.engines.ndif.engine import RemoteModel  # noqa: E402
from nla_lens.engines.ndif.server import Server  # noqa: E402
from nla_lens.models.weights import load_tokenizer  # noqa: E402

RULES = ("replace", "norm_matched_add")
LOCAL = "ndif:local"


@pytest.fixture(scope="module")
def load_remote(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[..., NLA]:
    def load(family: str = "llama", rule: str = "replace") -> NLA:
        av, ar = pair_dirs(family, rule)
        rule_by_caller = None if rule == "replace" else rule
        return NLA.from_pretrained(av=av, ar=ar, injection=rule_by_caller, engine=LOCAL)

    return cache(load)


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_source(tmp_path_factory.mktemp("source"), "llama")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_say_what_they_say_here(
    family: str, rule: str, load_remote: Callable[..., NLA], load_pair: Callable[..., NLA]
) -> None:
    there, here = load_remote(family, rule), load_pair(family, rule)
    several: tuple[dict[str, Any], ...] = ({"batch_size": 4}, {"temperature": 1.0, "seed": 2})
    for options in ({}, *several) if family == "llama" else ({},):
        found = there.explain(vectors(), max_new_tokens=8, score=False, **options)
        wanted = here.explain(vectors(), max_new_tokens=8, score=False, **options)
        assert [e.token_ids for e in found] == [e.token_ids for e in wanted]
    assert torch.equal(there.reconstruct(EXPLANATIONS), here.reconstruct(EXPLANATIONS))


def test_many_vectors_share_a_request(load_remote: Callable[..., NLA]) -> None:
    nla = load_remote()
    traffic = nla.verbalizer.engine.server.traffic  # type: ignore[attr-defined]
    before = traffic.requests, traffic.sent
    nla.explain(torch.randn(16, 64), max_new_tokens=2, score=False)
    assert traffic.requests == before[0] + 1
    # Vectors, one prompt a row (compressed), and the block itself.
    assert 16 * 64 * 4 < traffic.sent - before[1] < 16 * 64 * 4 + 16_000
    nla.explain(torch.randn(6, 64), max_new_tokens=2, score=False, batch_size=4)
    assert traffic.requests == before[0] + 3


def test_shipped_blocks_name_nothing_of_ours(
    load_remote: Callable[..., NLA], source_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs: list[bytes] = []
    request = nnsight.schema.request.RequestModel
    serialize = request.serialize

    def noted(tracer: Any, compress: bool = False) -> bytes:
        blobs.append(serialize(tracer, False))
        return serialize(tracer, compress)

    monkeypatch.setattr(request, "serialize", noted)
    nla = load_remote()
    nla.explain(vectors(), max_new_tokens=4)
    nla.explain(vectors(), max_new_tokens=4, temperature=1.0, seed=0)
    nla_lens.extract(source_dir, ["Rain"], 2, remote="local")
    nla.explain_text("Rain", [-1], model=str(source_dir), generate=1, max_new_tokens=2)
    assert len(blobs) >= 6
    for blob in blobs:
        # Where the block was written is shipped for tracebacks; that is no reference.
        kept = blob.replace(b"nla_lens/engines/local/nnsight_traces.py", b"")
        assert b"nla_lens" not in kept


def test_extract_remote(source_dir: Path) -> None:
    texts = ["The garlic sizzles in the pan.", "Rain", [{"role": "user", "content": "Hello"}]]
    for positions in (None, [-1, 0], slice(1, 3)):
        here = nla_lens.extract(source_dir, texts, 3, positions=positions)
        there = nla_lens.extract(source_dir, texts, 3, positions=positions, remote="local")
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a.as_ordinary(), b.as_ordinary())
            assert torch.equal(a.origin.where_LX3, b.origin.where_LX3)
            assert a.hook_name == b.hook_name
    tokenizer = nla_lens.stream.extraction.open_source(source_dir).tokenizer
    model = nnsight.TransformersModel(str(source_dir), task="text-generation", tokenizer=tokenizer)
    from_model = nla_lens.extract(model, texts, 3, remote="local")
    assert torch.equal(from_model[0].as_ordinary(), nla_lens.extract(source_dir, texts, 3)[0])


def test_explain_text_runs_the_source_there(
    tmp_path: Path, source_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    av, ar = build_pair(tmp_path, "llama", base=source_dir)
    there, here = (NLA.from_pretrained(av=av, ar=ar, engine=e) for e in (LOCAL, "transformers"))
    found = there.explain_text("Rain falls", [0, -1], generate=2, max_new_tokens=4)
    wanted = here.explain_text("Rain falls", [0, -1], generate=2, max_new_tokens=4)
    assert [(e.token_ids, e.token, e.position) for e in found.flat] == [
        (e.token_ids, e.token, e.position) for e in wanted.flat
    ]
    assert [e.cos for e in found.flat] == [e.cos for e in wanted.flat]
    assert type(there._source.loaded).__name__ == "NDIFSource"


def test_halves_may_run_in_different_places(pair_dirs: Callable[..., Any], nla: NLA) -> None:
    av, ar = pair_dirs("llama", "replace")
    mixed = NLA.from_pretrained(av=av, ar=ar, engine={"av": "transformers", "ar": LOCAL})
    kinds = type(mixed.verbalizer.engine), type(mixed.reconstructor.engine)  # type: ignore[union-attr]
    assert [kind.__name__ for kind in kinds] == ["TransformersVerbalizer", "NDIFReconstructor"]
    assert torch.equal(mixed.reconstruct(["a b"]), nla.reconstruct(["a b"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "ndof"}, "known are"),
        ({"engine": "ndif:ftp://x"}, "after the colon"),
        ({"engine": {"av": "ndif", "sauce": "ndif"}}, "its keys are"),
        ({"engine": LOCAL, "dtype": "bfloat16"}, "the server decides"),
    ],
)
def test_what_cannot_be_asked_for(
    options: dict[str, Any], said: str, pair_dirs: Callable[..., tuple[Path, Path]]
) -> None:
    av, ar = pair_dirs("llama", "replace")
    with pytest.raises(NLAError, match=said):
        NLA.from_pretrained(av=av, ar=ar, **options)


def test_a_revision_has_a_key_of_its_own(source_dir: Path) -> None:
    tokenizer = load_tokenizer(source_dir)
    named = [
        RemoteModel.open(str(source_dir), None, Server.named(LOCAL), tokenizer, revision)
        for revision in (None, "v2")
    ]
    found = [json.loads(remote.key.partition(":")[2]) for remote in named]
    assert [key["revision"] for key in found] == [None, "v2"]
    assert named[1].name == f"{source_dir} (revision v2)"


def test_remote_extraction_needs_a_name(load_pair: Callable[..., NLA], source_dir: Path) -> None:
    with pytest.raises(NLAError, match="layer 6 does not exist"):
        nla_lens.extract(source_dir, ["Rain"], 6, remote="local")
    with pytest.raises(NLAError, match="by their names"):
        nla_lens.extract(torch.nn.Linear(2, 2), ["Rain"], 1, remote="local")


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The shape of Llama-3.3-70B's pair, and a vocabulary of its size; no weights."""
    directory = tmp_path_factory.mktemp("large")
    large = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    }
    for half, n_blocks in zip(build_pair(directory, "llama"), (80, 54), strict=True):
        (half / "model.safetensors").unlink()
        config = json.loads((half / "config.json").read_text())
        (half / "config.json").write_text(
            json.dumps(config | large | {"num_hidden_layers": n_blocks})
        )
        meta = yaml.safe_load((half / "nla_meta.yaml").read_text(encoding="utf-8"))
        meta |= {"d_model": 8192, "extraction_layer_index": 53}
        meta["extraction"]["mse_scale"] = 8192**0.5
        if "ar" in meta:
            meta["ar"] |= {"num_hidden_layers": 53, "extraction_layer_index": 53}
        (half / "nla_meta.yaml").write_text(yaml.safe_dump(meta), encoding="utf-8")
    enlarge(half / "tokenizer.json", 128_256)
    shutil.copy(half / "tokenizer.json", directory / "llama-av" / "tokenizer.json")
    safetensors = pytest.importorskip("safetensors.torch")
    head = torch.full((8192, 8192), 0.01, dtype=torch.bfloat16)
    safetensors.save_file({"weight": head}, str(directory / "llama-ar" / "value_head.safetensors"))
    yield directory / "llama"


def enlarge(tokenizer: Path, n_tokens: int) -> None:
    """Adds tokens and merges that make them, of characters that byte-level BPE never sees."""
    read = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocab, merges = read["model"]["vocab"], read["model"]["merges"]
    first = max([*vocab.values(), *(added["id"] for added in read["added_tokens"])]) + 1
    letters = [chr(0xE000 + n) for n in range(512)]
    pairs = itertools.islice(itertools.product(letters, letters), n_tokens - first - len(letters))
    for n, token in enumerate([*letters, *map("".join, pairs)], start=first):
        vocab[token] = n
        if len(token) == 2:
            merges.append([*token])
    tokenizer.write_text(json.dumps(read), encoding="utf-8")


@pytest.mark.slow
def test_a_client_of_the_70b_is_small(large_pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three models, and a request written out: there is no server to take it."""
    code = f"""
import re, resource
import torch
from nla_lens import NLA, NLARemoteError
from nla_lens.engines.ndif.source import open_remote_source
nla = NLA.from_pretrained({str(large_pair)!r}, engine="ndif:http://127.0.0.1:9")
source = open_remote_source({str(large_pair) + "-av"!r}, "http://127.0.0.1:9")
server = nla.verbalizer.engine.server
server.patience.connect = 0.1
try:
    nla.explain(torch.randn(16, 8192))
except NLARemoteError as error:
    assert error.cause == "unreachable", error
halves = nla.verbalizer.engine, nla.reconstructor.engine, source.remote
print(*{{p.device.type for half in halves for p in half.model._module.parameters()}})
print(nla.spec.layer, len(nla.verbalizer.tokenizer), server.traffic.sent)
# Not ru_maxrss, where it can be helped: a new process begins with its parent's.
try: print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
except OSError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    devices, numbers, kibibytes = done.stdout.splitlines()
    layer, n_tokens, sent = map(int, numbers.split())
    assert (devices, layer, n_tokens) == ("meta", 53, 128256)
    n_bytes = int(kibibytes) * 1024
    with capsys.disabled():
        print(
            f"\nThe 70B's client: {n_bytes / 1e9:.2f} GB of memory at most; "
            f"{sent / 16:,.0f} bytes sent for each of 16 vectors"
        )
    assert n_bytes < 1.5e9
