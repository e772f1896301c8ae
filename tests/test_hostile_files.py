"""Files of strangers that lie: small files of every kind, weights elsewhere, absurd sizes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_lens import NLA, NLAError
from nla_lens.disk.reading import read_json, read_yaml


@pytest.fixture
def av(pair_dirs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair_dirs("qwen2", "replace")[0], tmp_path / "av"))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- the reader ---


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": pipe,
    "a device": device,
    "a directory": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a terabyte": large,
}
CONTENTS = {
    "nothing": "",
    "half of it": '{"a": [1, 2',
    "a list": "[1]",
    "null": "null",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a key twice": '{"a": 1, "a": 2}',
    "a key twice, deep": '{"a": [{"b": 1, "b": 1}]}',
    "NaN": '{"a": NaN}',
    "half of a surrogate pair": '{"a": ["\\ud800"]}',
    "half of one as a key": '{"\\udfff": 1}',
    "deep lists": '{"a": ' + "[" * 100 + "]" * 100 + "}",
    "deep objects": '{"a": ' * 100_000,
    "an integer of 5000 digits": '{"a": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_not_read(kind: str, read: Callable, tmp_path: Path) -> None:
    path = tmp_path / "x"
    KINDS[kind](path)
    with pytest.raises(NLAError, match=r"cannot be read|bytes; such a file has at most") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", CONTENTS)
def test_json_that_is_refused(content: str, tmp_path: Path) -> None:
    written = CONTENTS[content]
    (tmp_path / "x").write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(NLAError, match=r"cannot be read as JSON|must hold an object"):
        read_json(tmp_path / "x")


@pytest.mark.parametrize(
    "content",
    ["a: 1\na: 2\n", "a: {b: 1, b: 1}\n", 'a: "\\ud800"\n', '"\\udc00": 1\n', "a: &x [*x]\n"],
)
def test_yaml_that_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(content)
    with pytest.raises(NLAError, match=r"cannot be read as YAML"):
        read_yaml(tmp_path / "x")


def test_what_the_reader_lets_pass(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": [0.0, Infinity], "b": "\\ud83d\\ude00"}')
    # As in the hub's cache.
    (tmp_path / "x").symlink_to("blob")
    assert read_json(tmp_path / "x") == {"a": [0.0, float("inf")], "b": "😀"}


# --- every small file of a checkpoint ---

SMALL = ["config.json", "generation_config.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
     "chat_template.jinja", "model.safetensors", "model-00001-of-00002.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_what_transformers_would_wait_for(name: str, kind: str, av: Path) -> None:
    """It opens whatever has a name that it knows: a pipe is waited for, a device has no end."""
    if "-of-" in name:
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (av / "model.safetensors.index.json").write_text(json.dumps(index))
        (av / "model.safetensors").unlink()
    (av / name).unlink(missing_ok=True)
    KINDS[kind](av / name)
    with pytest.raises(NLAError, match="no regular file") as caught:
        NLA.from_pretrained(av=av)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_file_that_is_none(name: str, kind: str, av: Path) -> None:
    (av / name).unlink()
    KINDS[kind](av / name)
    with pytest.raises(NLAError, match=f"{name} (cannot be read|has .* bytes)"):
        NLA.from_pretrained(av=av)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_small_file_that_is_damaged(name: str, content: str, av: Path) -> None:
    written = CONTENTS[content]
    (av / name).write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(NLAError, match=f"{name} (cannot be read as JSON|must hold an object)"):
        NLA.from_pretrained(av=av)


@pytest.mark.parametrize("ends", ["5", [1, "2"], True, 1.0, {"a": 1}, [-1], [[1]]])
def test_ends_that_are_no_token_ids(ends: object, av: Path) -> None:
    change_json(av / "generation_config.json", eos_token_id=ends)
    with pytest.raises(NLAError, match=r"generation_config.json: eos_token_id is .* token ids"):
        NLA.from_pretrained(av=av)


@pytest.mark.parametrize("longest", ["2048", [1], True, -1, {}])
def test_a_length_that_is_no_number(longest: object, av: Path) -> None:
    change_json(av / "tokenizer_config.json", model_max_length=longest)
    with pytest.raises(NLAError, match=r"tokenizer_config.json: model_max_length is "):
        NLA.from_pretrained(av=av)


# --- weights elsewhere ---


def sharded(av: Path, file: str) -> Path:
    """The AV with its weights under an index that says they are in `file`."""
    from safetensors import safe_open

    with safe_open(av / "model.safetensors", framework="pt") as weights:
        keys = list(weights.keys())
    (av / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, file)})
    )
    return av


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_cannot_lead_out_of_the_checkpoint(absolute: bool, av: Path) -> None:
    outside = shutil.move(av / "model.safetensors", av.parent / "elsewhere.safetensors")
    shutil.copy(outside, av / "model.safetensors")
    sharded(av, str(outside) if absolute else "../elsewhere.safetensors")
    (av / "model.safetensors").unlink()
    with pytest.raises(NLAError, match=r"index.json says that .* expected a file beside it"):
        NLA.from_pretrained(av=av)


def test_a_config_cannot_lead_out_of_the_checkpoint(av: Path) -> None:
    shutil.move(av / "model.safetensors", av.parent / "elsewhere.safetensors")
    change_json(av / "config.json", transformers_weights="../elsewhere.safetensors")
    with pytest.raises(NLAError, match=r"transformers_weights is in .*expected a file beside it"):
        NLA.from_pretrained(av=av)


def test_links_into_the_hubs_cache_are_followed(av: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    sharded(av, "model-00001-of-00001.safetensors")
    (av / "model.safetensors").rename(av / "model-00001-of-00001.safetensors")
    for n, path in enumerate(sorted(p for p in av.iterdir() if p.is_file())):
        path.rename(blobs / str(n))
        path.symlink_to(Path("..") / "blobs" / str(n))
    assert NLA.from_pretrained(av=av).verbalizer.prompt_ids


# --- sizes ---


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 4000},
        {"intermediate_size": 10**9},
        {"head_dim": 10**9},
        {"num_attention_heads": 10**8},
        {"num_key_value_heads": 10**8},
        {"vocab_size": 10**10},
        {"hidden_size": 10**7},
    ],
)
def test_sizes_that_the_weights_cannot_have(values: dict, av: Path) -> None:
    change_json(av / "config.json", **values)
    with pytest.raises(NLAError):
        NLA.from_pretrained(av=av)


# --- weights that say two things ---


def held(av: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(av / "model.safetensors").items()}


def hold(av: Path, **changed: torch.Tensor) -> None:
    save_file(held(av) | changed, av / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_without_a_word_of_it(dtype: torch.dtype, av: Path) -> None:
    """They were cast as if they were numbers."""
    name = "model.layers.1.mlp.up_proj.weight"
    hold(av, **{name: held(av)[name].to(dtype)})
    with pytest.raises(NLAError, match=rf"{name} in .*model\.safetensors is .*quantization_config"):
        NLA.from_pretrained(av=av)


def test_a_weight_in_two_files(av: Path) -> None:
    """transformers takes the last it comes by, whatever the index says."""
    whole, name = held(av), "model.norm.weight"
    (av / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(whole, av / files[0], metadata={"format": "pt"})
    save_file({name: whole[name] + 1}, av / files[1], metadata={"format": "pt"})
    where = dict.fromkeys(whole, files[0]) | {"lm_head.weight": files[1]}
    index = {"metadata": {}, "weight_map": where}
    (av / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NLAError, match=rf"{name} is in .*{files[0]} and in {files[1]}"):
        NLA.from_pretrained(av=av)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_norm.weight", "model.layers.2.self_attn.o_proj.bias",
     "model.layers.1.self_attn.q_proj.lora_A.default.weight"],
)  # fmt: skip
def test_weights_that_the_model_has_no_place_for(name: str, av: Path) -> None:
    """A family taken for another, an adapter that was never merged: left out without a word."""
    hold(av, **{name: torch.ones(64)})
    with pytest.raises(NLAError, match=f"no place for .*{name}"):
        NLA.from_pretrained(av=av)


def test_a_family_taken_for_another(av: Path) -> None:
    """Llama is Qwen2 without the biases of its projections."""
    change_json(av / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(NLAError, match=r"LlamaForCausalLM has no place for .*k_proj\.bias"):
        NLA.from_pretrained(av=av)


def test_what_is_not_of_the_blocks_is_left_out(av: Path) -> None:
    more = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.mtp.layers.0.mlp.weight",
        "model.layers.99.self_attn.q_proj.weight",
        "score.weight",
    )
    hold(av, **{name: torch.ones(4) for name in more})
    assert NLA.from_pretrained(av=av).spec.d_model == 64


def test_a_weight_of_another_shape_is_named(av: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    hold(av, **{name: held(av)[name][:-2].contiguous()})
    with pytest.raises(NLAError, match=f"of another shape .*{name}"):
        NLA.from_pretrained(av=av)
