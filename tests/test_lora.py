"""LoRA halves: an adapter directory where a full model is, against adapters merged by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_lens import NLA, NLAError

from .checkpoints import (
    EXPLANATIONS,
    FAMILIES,
    build_lora_ar,
    build_lora_av,
    build_source,
    reference,
    vectors,
)
from .checkpoints.builders import AV_SEEDS

pytest.importorskip("peft")

each_family = pytest.mark.parametrize("family", FAMILIES)
TEXTS = list(EXPLANATIONS[:4])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[[str], Path]:
    def build(family: str) -> Path:
        return build_source(tmp_path_factory.mktemp(family), family, seed=AV_SEEDS[family])

    return cache(build)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def same_tokens(nla: NLA, wanted: reference.AV, n_tokens: int = 12) -> None:
    """Equal as long as the reference's best logit leads by more than rounding."""
    greedy = wanted.greedy(vectors(), n_tokens)
    explained = nla.explain(vectors(), max_new_tokens=n_tokens, score=False)
    for row, e in enumerate(explained):
        clear = int((greedy.margins[row] > 1e-3).long().cumprod(0).sum())
        assert clear >= 3
        assert list(e.token_ids)[:clear] == greedy.ids[row, :clear].tolist()


@each_family
@pytest.mark.parametrize("rule", ["replace", "norm_matched_add"])
def test_both_halves(base, tmp_path: Path, family: str, rule: str) -> None:
    av = build_lora_av(tmp_path / "av", family, base(family), injection=rule)
    ar = build_lora_ar(tmp_path / "ar", family, base(family))
    nla = NLA.from_pretrained(av=av, ar=ar, injection=rule)
    same_tokens(nla, reference.AV(av, rule))
    wanted = reference.AR(ar).vectors(TEXTS)
    assert relative(nla.reconstruct(TEXTS), wanted) < 2e-5
    bare = reference.AR(ar)
    bare.model = reference.decoder(
        reference.read_tensors(base(family)),
        reference.read_text_config(ar),
        4,
        torch.float32,
        False,
    )
    assert relative(bare.vectors(TEXTS), wanted) > 0.05  # the adapter does something


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        {"bare_prefix": True},
        {"all_blocks": True},
        {"head_bias": True},
        {"rslora": True, "alpha": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_layouts_of_reconstructors(base, tmp_path: Path, family: str, options: dict) -> None:
    av = build_lora_av(tmp_path / "av", family, base(family))
    ar = build_lora_ar(tmp_path / "ar", family, base(family), **options)
    nla = NLA.from_pretrained(av=av, ar=ar)
    assert relative(nla.reconstruct(TEXTS), reference.AR(ar).vectors(TEXTS)) < 2e-5


def test_rank_stabilised_verbalizers(base, tmp_path: Path) -> None:
    av = build_lora_av(tmp_path, "qwen2", base("qwen2"), rslora=True, alpha=3, rank=2)
    same_tokens(NLA.from_pretrained(av=av), reference.AV(av))


def test_an_adapter_without_a_tokenizer_takes_its_bases(base, tmp_path: Path) -> None:
    av = build_lora_av(tmp_path, "qwen2", base("qwen2"))
    wanted = reference.AV(av)
    for path in av.glob("*token*"):
        path.unlink()
    same_tokens(NLA.from_pretrained(av=av), wanted)


@pytest.fixture
def av(base, tmp_path: Path) -> Path:
    return build_lora_av(tmp_path / "av", "qwen2", base("qwen2"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None; expected a name"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path is ''"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is"),
        ({"base_model_name_or_path": "./not-here"}, "not-here cannot be loaded"),
        ({"peft_type": "WISHES"}, "does not fit its base|cannot be loaded"),
        ({"r": "four"}, "does not fit its base|cannot be loaded"),
        ({"r": 3}, "does not fit its base"),
        ({"target_modules": ["no_such_proj"]}, "does not fit its base"),
        ({"target_modules": ["q_proj"]}, "does not fit its base: no place for"),
    ],
)
def test_adapter_configs_that_are_refused(av: Path, values: dict, names: str) -> None:
    change(av / "adapter_config.json", **values)
    with pytest.raises(NLAError, match=names):
        NLA.from_pretrained(av=av)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "[" * 100_000])
def test_adapter_configs_that_are_none(av: Path, content: str) -> None:
    (av / "adapter_config.json").write_text(content)
    with pytest.raises(NLAError, match=r"adapter_config\.json does not name a base model"):
        NLA.from_pretrained(av=av)


def test_a_pickled_adapter_is_not_opened(av: Path, tmp_path: Path) -> None:
    weights = av / "adapter_model.safetensors"
    torch.save(load_file(weights), av / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(NLAError, match=r"no adapter_model.safetensors in .*only safetensors"):
        NLA.from_pretrained(av=av)


@pytest.mark.parametrize("damage", ["cut", "half", "extra"])
def test_damaged_adapters(av: Path, damage: str) -> None:
    path = av / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    elif damage == "half":
        save_file({k: v for k, v in tensors.items() if k != first}, path)
    else:
        save_file(
            {**tensors, first.replace("layers.0", "layers.1.extra"): tensors[first].clone()}, path
        )
    with pytest.raises(NLAError, match="adapter"):
        NLA.from_pretrained(av=av)


def test_a_base_of_another_width(av: Path, tmp_path: Path) -> None:
    wide = build_source(tmp_path / "wide", "qwen2", d_model=80)
    change(av / "adapter_config.json", base_model_name_or_path=str(wide))
    with pytest.raises(NLAError, match=r"does not fit its base|d_model"):
        NLA.from_pretrained(av=av)
