"""Adapters as PEFT saves them, against the same adapters live in PEFT: kinds, and added tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nla_lens import NLA, NLAError
from nla_lens.errors import NLAWarning
from nla_lens.models.weights import load_backbone, load_causal_lm

from .checkpoints import build_source, families, sidecar, vocabulary, write_sidecar

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`base(family)`: a directory; those with a hyphen are of `families`."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            own = name in families.OPTIONS
            made[name] = families.save(name, path) if own else build_source(path, name)
        return made[name]

    return build


def adapter(base: Path, folder: Path, *, rows: int | None = None, **options: Any) -> Any:
    """Trains nothing, but gives an adapter random numbers and saves it; the live PEFT model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight.data[-2:] = torch.randn(2, table.weight.shape[1])
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    live = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **chosen)).eval()
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name or "magnitude" in name or "delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    # By itself PEFT leaves a wrapper's tables out.
    wrapped = rows is not None and hasattr(model.config, "text_config")
    live.save_pretrained(folder, save_embedding_layers=True if wrapped else "auto")
    return live


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def same(loaded: Any, live: Any, ids: list[int]) -> None:
    wanted = logits(live, ids)
    assert torch.allclose(logits(loaded, ids), wanted, atol=1e-4 * float(wanted.abs().max()))
    with live.disable_adapter():
        assert not torch.allclose(logits(live, ids), wanted, atol=1e-3)


KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "layers_to_transform": {"layers_to_transform": [0, 2], "target_modules": ["q_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(base: Any, tmp_path: Path, kind: str) -> None:
    live = adapter(base("qwen2"), tmp_path, **KINDS[kind])
    same(load_causal_lm(tmp_path), live, [5, 9, 77, 130])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon", "opt", "qwen3_5"])
def test_families(base: Any, tmp_path: Path, name: str) -> None:
    """GPT-2's layers are transposed (fan_in_fan_out); their blocks have other names."""
    if not families.is_known(name):
        pytest.skip("this transformers does not know it")
    live = adapter(base(name), tmp_path, fan_in_fan_out=name == "gpt2")
    same(load_causal_lm(tmp_path), live, [5, 9, 77, 130])
    cut, found = load_backbone(tmp_path, n_blocks=2), []
    from nla_lens.models.anatomy import blocks_of

    for model in (cut, live):
        blocks_of(model)[1].register_forward_hook(
            lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 9, 77, 130]]))
    assert len(blocks_of(cut)) == 2
    assert torch.allclose(*found, atol=1e-4 * float(found[0].abs().max()))


TABLES: dict[str, dict[str, Any]] = {
    "saved with it": {},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "targeted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize(
    ("family", "rows"), [("qwen2", 642), ("qwen2", 482), ("gemma3_text", 482), ("gemma3", 642)]
)
def test_added_tokens(base: Any, tmp_path: Path, family: str, tables: str, rows: int) -> None:
    """More tokens than the base's 640, or its padding cut off: as many as the adapter has."""
    live = adapter(base(family), tmp_path, rows=rows, **TABLES[tables])
    loaded = load_causal_lm(tmp_path)
    assert len(loaded.get_input_embeddings().weight) == rows
    same(loaded, live, [5, 9, rows - 2, 77, rows - 1, 130])


@pytest.mark.parametrize("table", ["embed_tokens", "lm_head"])
def test_a_change_of_one_of_two_tied_tables(base: Any, tmp_path: Path, table: str) -> None:
    live = adapter(base("gemma3_text"), tmp_path, target_modules=["q_proj", table])
    same(load_causal_lm(tmp_path), live, [5, 9, 77, 130])


def test_added_tokens_of_a_reconstructor(base: Any, tmp_path: Path) -> None:
    live = adapter(base("qwen2"), tmp_path, rows=642)
    cut = load_backbone(tmp_path, n_blocks=3)
    ids = torch.tensor([[5, 641, 9, 640]])
    with torch.no_grad():
        wanted = live(input_ids=ids, output_hidden_states=True).hidden_states[3]
        assert torch.allclose(cut(input_ids=ids).last_hidden_state, wanted, atol=1e-4)


def test_only_some_tokens_trained(base: Any, tmp_path: Path) -> None:
    options = {"trainable_token_indices": {"embed_tokens": [5, 9]}, "target_modules": ["q_proj"]}
    live = adapter(base("qwen2"), tmp_path, **options)
    same(load_causal_lm(tmp_path), live, [5, 9, 77, 130])


def test_a_marker_that_was_added(base: Any, tmp_path: Path) -> None:
    """An NLA whose marker the base does not have, from its files to its tokens."""
    live = adapter(base("qwen2"), tmp_path, rows=642)
    vocabulary.write_tokenizer(tmp_path, "qwen2")
    made = sidecar("av", "qwen2", d_model=64, layer=3, base="x/y", injection_scale=20.0)
    write_sidecar(tmp_path, made)
    nla = NLA.from_pretrained(av=tmp_path)
    engine = nla.verbalizer.engine
    assert len(engine.model.get_input_embeddings().weight) == 642
    same(engine.model, live, nla.verbalizer.prompt_ids)
    assert nla.explain(torch.ones(64), max_new_tokens=3).token_ids


def test_tokens_without_embeddings_are_said(base: Any, tmp_path: Path) -> None:
    adapter(base("qwen2"), tmp_path, rows=700, target_modules=["q_proj"])
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if ".lora_" in k}, weights)
    vocabulary.write_tokenizer(tmp_path, "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([f"<|added {i}|>" for i in range(645 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(NLAWarning, match="adds 5 tokens to its base and has no embeddings for them"):
        loaded = load_causal_lm(tmp_path)
    table = loaded.get_input_embeddings().weight
    assert len(table) == 645 and torch.allclose(table[644], table[:640].mean(0), atol=1e-6)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"peft_type": "IA3"}, "of the kind 'IA3' and cannot be loaded"),
        ({"peft_type": "PREFIX_TUNING"}, "of the kind 'PREFIX_TUNING' and cannot be loaded"),
        ({"alora_invocation_tokens": [5]}, "acts behind some tokens only"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "runs blocks more than once"),
    ],
)
def test_kinds_that_are_refused(base: Any, tmp_path: Path, values: dict, names: str) -> None:
    adapter(base("qwen2"), tmp_path, target_modules=["q_proj"])
    change(tmp_path / "adapter_config.json", **values)
    with pytest.raises(NLAError, match=names):
        load_causal_lm(tmp_path)


def test_tables_of_two_sizes(base: Any, tmp_path: Path) -> None:
    adapter(base("qwen2"), tmp_path, rows=642)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    (head,) = (key for key in tensors if key.endswith("lm_head.weight"))
    save_file({**tensors, head: tensors[head][:600].clone()}, weights)
    with pytest.raises(NLAError, match=re.escape("tables of [600, 642] tokens")):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("lead", ["_orig_mod.", "module.", "base_model.model.", "language_model."])
def test_what_stood_around_the_model_in_training(base: Any, tmp_path: Path, lead: str) -> None:
    live = adapter(base("qwen2"), tmp_path)
    weights, start = tmp_path / "adapter_model.safetensors", "base_model.model."
    tensors = load_file(weights)
    save_file({start + lead + k.removeprefix(start): v for k, v in tensors.items()}, weights)
    same(load_causal_lm(tmp_path), live, [5, 9, 77, 130])


def test_an_adapter_of_the_text_model_on_the_wrapper(base: Any, tmp_path: Path) -> None:
    """gemma3 here is the multimodal wrapper around exactly the weights of gemma3_text."""
    live = adapter(base("gemma3_text"), tmp_path, target_modules=["q_proj", "down_proj"])
    change(tmp_path / "adapter_config.json", base_model_name_or_path=str(base("gemma3")))
    same(load_causal_lm(tmp_path), live, [5, 9, 77, 130])
