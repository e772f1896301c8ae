"""Rows of embedding tables: what enters block 0, read without any other weight."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_lens import NLA, NLAError
from nla_lens.checkpoints.files import open_checkpoint
from nla_lens.engines.served.prompt_rows import PromptRows, open_rows
from nla_lens.models.weights import load_configs

from .checkpoints import build_av, build_lora_av, build_source
from .checkpoints.configs import FAMILIES

IDS = [5, 3, 5, 600, 0, 7]


def rows_of(path: Path, dtype: Any = None) -> PromptRows:
    checkpoint = open_checkpoint(path, weights=False)
    base = (
        json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
        if (checkpoint.is_adapter)
        else path
    )
    return open_rows(checkpoint, load_configs(base)[0], dtype)


def table_alone(path: Path) -> None:
    """Leaves nothing in the weights but the embedding table."""
    file = path / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if k.endswith("embed_tokens.weight")}
    assert len(kept) == 1
    save_file(kept, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_what_the_embedding_module_gives(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In the model's dtype: sqrt(d) of Gemma is rounded before it multiplies."""
    av = build_av(tmp_path / "x-av", family, d_model=80, dtype=dtype)
    engine = NLA.from_pretrained(av=av).verbalizer.engine
    wanted = engine.embed(IDS)
    table_alone(av)
    rows = rows_of(av)
    assert rows.dtype == dtype
    assert torch.equal(rows.of(IDS), wanted)
    assert torch.equal(rows.of(IDS[::-1]), wanted.flip(0))


def test_another_dtype_than_the_files(tmp_path: Path) -> None:
    av = build_av(tmp_path / "x-av", "gemma3_text", dtype=torch.float32)
    wanted = NLA.from_pretrained(av=av, dtype="bfloat16").verbalizer.engine.embed(IDS)
    assert torch.equal(rows_of(av, torch.bfloat16).of(IDS), wanted)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("layout", ["single", "sharded", "indexed", "stale_index"])
@pytest.mark.parametrize("key_names", ["hub", "module"])
def test_layouts(family: str, layout: str, key_names: str, tmp_path: Path) -> None:
    av = build_av(tmp_path / "x-av", family, layout=layout, key_names=key_names)
    wanted = NLA.from_pretrained(av=av).verbalizer.engine.embed(IDS)
    assert torch.equal(rows_of(av).of(IDS), wanted)


def test_an_adapter_has_its_bases_rows(tmp_path: Path) -> None:
    base = build_source(tmp_path / "base", "gemma3_text")
    av = build_lora_av(tmp_path / "x-av", "gemma3_text", base)
    assert torch.equal(rows_of(av).of(IDS), rows_of(base).of(IDS))


@pytest.mark.parametrize(
    "trained",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [5]},
    ],
)
def test_an_adapter_that_trained_them_is_refused(trained: dict, tmp_path: Path) -> None:
    base = build_source(tmp_path / "base", "llama")
    av = build_lora_av(tmp_path / "x-av", "llama", base)
    config = av / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | trained))
    with pytest.raises(NLAError, match="trained embeddings"):
        rows_of(av)


def test_its_weights_tell_too(tmp_path: Path) -> None:
    base = build_source(tmp_path / "base", "llama")
    av = build_lora_av(tmp_path / "x-av", "llama", base)
    weights = av / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file(load_file(weights) | {key: torch.ones(2, 640)}, weights)
    with pytest.raises(NLAError, match="trained embeddings"):
        rows_of(av)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_from_the_hub_one_file_is_fetched(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_av(tmp_path / "whole", "qwen2", layout=layout)
    there = tmp_path / "snapshots" / "c0ffee"
    there.mkdir(parents=True)
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            (there / file.name).write_bytes(file.read_bytes())
    fetched: list[tuple[str, str, str]] = []

    def download(repo: str, name: str, *, revision: str) -> str:
        fetched.append((repo, name, revision))
        return str(whole / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    from nla_lens.checkpoints.files import Checkpoint

    rows = open_rows(Checkpoint("someone/x-av", there), load_configs(there)[0], None)
    assert torch.equal(rows.of(IDS), rows_of(whole).of(IDS))
    assert [(repo, revision) for repo, _, revision in fetched] == [("someone/x-av", "c0ffee")]

    def offline(*args: object, **options: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(NLAError, match="cannot be fetched from the hub"):
        open_rows(Checkpoint("someone/x-av", there), load_configs(there)[0], None)


def index_of(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors").rename(path / "elsewhere.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        ({"model.embed_tokens.weight": "../elsewhere.safetensors"}, "a file beside it"),
        ({"model.embed_tokens.weight": "/etc/hostname"}, "a file beside it"),
        ({"model.embed_tokens.weight": "weights.bin"}, "a file beside it"),
        ({"model.embed_tokens.weight": 3}, "a file beside it"),
        ({"model.embed_tokens.weight": "gone.safetensors"}, "no gone.safetensors"),
        ({f"{n}.embed_tokens.weight": "x.safetensors" for n in "ab"}, "2 embedding"),
        ({}, "0 embedding tables"),
        (None, "no index"),
        ("text", "no index"),
        ([1], "no index"),
    ],
)
def test_damaged_and_hostile_indices(weight_map: Any, word: str, tmp_path: Path) -> None:
    av = build_av(tmp_path / "x-av", "llama")
    index_of(av, weight_map)
    with pytest.raises(NLAError, match=word):
        rows_of(av)


def spoil_bytes(file: Path) -> None:
    file.write_bytes(b"no safetensors")


def spoil(change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    def spoiled(file: Path) -> None:
        key = "model.embed_tokens.weight"
        save_file({key: change(load_file(file)[key])}, file)

    return spoiled


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (spoil_bytes, "safetensors"),
        (Path.unlink, "no model.safetensors"),
        (spoil(lambda table: table[:, 0].clone()), "vocab, d"),
        (spoil(lambda table: table.to(torch.int8)), "is I8"),
        (spoil(lambda table: table * float("nan")), "NaN"),
        (spoil(lambda table: table[:100].clone()), "go beyond"),
    ],
)
def test_damaged_tables(change: Callable[[Path], None], word: str, tmp_path: Path) -> None:
    av = build_av(tmp_path / "x-av", "llama")
    change(av / "model.safetensors")
    with pytest.raises(NLAError, match=word):
        rows_of(av).of(IDS)


def test_other_families_are_refused(tmp_path: Path) -> None:
    """Granite multiplies embeddings inside its model: nobody looked at what a server does there."""
    av = build_av(tmp_path / "x-av", "llama")
    config = json.loads((av / "config.json").read_text())
    config |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    (av / "config.json").write_text(json.dumps(config))
    with pytest.raises(NLAError, match=r"'granite'.*use another engine"):
        rows_of(av)
