"""Written and read again: the same spec, the same texts, the same vectors to the last bit."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nla_lens import NLA, NLAError
from nla_lens.checkpoints.sidecar import read_sidecar

from .checkpoints import (
    FAMILIES,
    build_ar,
    build_av,
    build_lora_ar,
    build_lora_av,
    build_source,
    vectors,
)
from .checkpoints.builders import AV_SEEDS
from .checkpoints.layouts import LAYOUTS
from .hub_server import TOKEN, HubServer, use

TEXTS = ["One.", "Another text, and more of it."]


def texts(nla: NLA, **options) -> list[str]:
    explained = nla.explain(vectors()[:3], max_new_tokens=8, score=False, **options)
    return [e.raw_text for e in explained]


def same(nla: NLA, again: NLA) -> None:
    assert again.spec == nla.spec
    assert again.verbalizer.prompt_ids == nla.verbalizer.prompt_ids
    assert texts(again) == texts(nla)
    assert (again.reconstructor is None) == (nla.reconstructor is None)
    if nla.reconstructor is not None:
        assert torch.equal(again.reconstruct(TEXTS), nla.reconstruct(TEXTS))
        assert again.reconstructor.prompt_ids("x") == nla.reconstructor.prompt_ids("x")


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Callable[[str], Path]:
    return cache(lambda name: LAYOUTS[name](tmp_path_factory.mktemp("layouts") / name))


# --- comes back equal -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["replace", "norm_matched_add"])
def test_every_family_and_rule(load_pair, tmp_path: Path, family: str, rule: str) -> None:
    nla = load_pair(family, rule)
    assert nla.save_pretrained(tmp_path / "out") == tmp_path / "out"
    again = NLA.from_pretrained(tmp_path / "out")
    same(nla, again)
    # Nothing is needed besides: neither the rule nor a name that is known.
    assert again.spec.origins["injection"] == "sidecar"
    for half in ("av", "ar"):
        assert not list((tmp_path / "out" / half).glob("*.bin"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(layout, tmp_path: Path, name: str) -> None:
    pytest.importorskip("peft")
    nla = NLA.from_pretrained(layout(name))
    again = NLA.from_pretrained(nla.save_pretrained(tmp_path))
    same(nla, again)
    # A LoRA half is written as what it was merged into.
    assert again.spec.av_base is None and not list(tmp_path.rglob("adapter*"))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_lora_reconstructors_are_cut(tmp_path: Path, family: str) -> None:
    pytest.importorskip("peft")
    base = build_source(tmp_path / "base", family, seed=AV_SEEDS[family])
    av = build_lora_av(tmp_path / "av", family, base)
    nla = NLA.from_pretrained(av=av, ar=build_lora_ar(tmp_path / "ar", family, base))
    same(nla, NLA.from_pretrained(nla.save_pretrained(tmp_path / "out")))
    config = json.loads((tmp_path / "out" / "ar" / "config.json").read_text())
    assert config.get("text_config", config)["num_hidden_layers"] == 4


@pytest.mark.parametrize("name", ["tiny", "tiny-norm-matched"])
def test_the_embedded_pairs(tmp_path: Path, name: str) -> None:
    nla = NLA.from_pretrained(name)
    again = NLA.from_pretrained(nla.save_pretrained(tmp_path))
    assert again.spec == nla.spec
    vector = torch.randn(nla.spec.d_model, generator=torch.Generator().manual_seed(0))
    assert again.explain(vector).raw_text == nla.explain(vector).raw_text
    assert read_sidecar(tmp_path).source_model == "nla_lens/tiny"
    if name == "tiny":
        assert texts_of(again) == texts_of(nla)


def texts_of(nla: NLA) -> list[str]:
    return [e.text for e in nla.explain_text("Nora lives in Naples.", positions=[-1, -2])]


def test_a_verbalizer_alone(load_pair, tmp_path: Path) -> None:
    nla = NLA(load_pair("qwen2").verbalizer)
    same(nla, NLA.from_pretrained(nla.save_pretrained(tmp_path)))
    assert sorted(os.listdir(tmp_path)) == ["README.md", "av", "nla_meta.yaml"]


def test_each_half_by_itself(nla: NLA, tmp_path: Path) -> None:
    """As readers of the first releases take them: each with a sidecar of its own role."""
    nla.save_pretrained(tmp_path)
    same(nla, NLA.from_pretrained(av=tmp_path / "av", ar=tmp_path / "ar"))
    roles = {half: read_sidecar(tmp_path / half).role for half in ("av", "ar", "")}
    assert roles == {"av": "av", "ar": "ar", "": None}
    for half, missing in (("av", set()), ("ar", {"nla_meta.yaml"})):
        whole = yaml.safe_load((tmp_path / half / "nla_meta.yaml").read_text("utf-8"))
        top = yaml.safe_load((tmp_path / "nla_meta.yaml").read_text("utf-8"))
        assert whole.pop("role") == half and whole == top, missing


def test_everything_a_sidecar_can_say(tmp_path: Path) -> None:
    mean = torch.randn(64, generator=torch.Generator().manual_seed(1))
    changes = {
        "extraction": {
            "var_nrm": 0.1 + 0.2,
            "var_nrm_definition": "around_unit_mean",
            "min_position": 0,
            "centre_mean": "centre_mean.safetensors",
            "mse_scale": None,
        },
        "chat_template_kwargs": {"enable_thinking": False, "name": "x", "n": 3},
    }
    av = build_av(tmp_path / "in" / "av", "qwen3", sidecar_overrides=changes)
    ar = build_ar(
        tmp_path / "in" / "ar", "qwen3", layer=4, head_bias=True,
        sidecar_overrides={
            **changes, "extraction_layer_index": 3,
            "ar": {"num_hidden_layers": 3, "n_blocks": 5, "extraction_layer_index": 3},
        },
    )  # fmt: skip
    for half in (av, ar):
        save_file({"mean": mean}, half / "centre_mean.safetensors")
    nla = NLA.from_pretrained(tmp_path / "in")
    spec = nla.spec
    assert (spec.mse_scale, spec.ar_blocks, spec.layer, spec.min_position) == (None, 5, 3, 0)
    again = NLA.from_pretrained(nla.save_pretrained(tmp_path / "out"))
    same(nla, again)
    assert torch.equal(again.verbalizer.mean_D, mean)
    third = NLA.from_pretrained(again.save_pretrained(tmp_path / "third"))
    assert (tmp_path / "third" / "nla_meta.yaml").read_bytes() == (
        tmp_path / "out" / "nla_meta.yaml"
    ).read_bytes()
    same(nla, third)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_kept(pair_dirs, tmp_path: Path, dtype: str) -> None:
    av, ar = pair_dirs("llama", "replace")
    nla = NLA.from_pretrained(av=av, ar=ar, dtype=dtype)
    nla.save_pretrained(tmp_path)
    wanted = getattr(torch, dtype)
    for half in ("av", "ar"):
        tensors = load_file(tmp_path / half / "model.safetensors")
        assert {t.dtype for t in tensors.values()} == {wanted}
    again = NLA.from_pretrained(tmp_path)
    assert again.verbalizer.engine.model.dtype == wanted
    assert torch.equal(again.reconstruct(TEXTS), nla.reconstruct(TEXTS))
    # The head stays float32 here: in a shorter dtype something of it would be lost.
    head = load_file(tmp_path / "ar" / "value_head.safetensors")["weight"]
    assert head.dtype == torch.float32


def test_a_head_that_fits_its_models_dtype_keeps_it(tmp_path: Path) -> None:
    av = build_av(tmp_path / "in" / "av", "llama", dtype=torch.bfloat16)
    build_ar(tmp_path / "in" / "ar", "llama", dtype=torch.bfloat16)
    nla = NLA.from_pretrained(av.parent)
    nla.save_pretrained(tmp_path / "out")
    head = load_file(tmp_path / "out" / "ar" / "value_head.safetensors")["weight"]
    assert head.dtype == torch.bfloat16
    again = NLA.from_pretrained(tmp_path / "out")
    assert torch.equal(again.reconstructor.weight_DD, nla.reconstructor.weight_DD)


def test_what_runs_is_what_is_written(pair_dirs, tmp_path: Path) -> None:
    av, ar = pair_dirs("llama", "replace")
    nla = NLA.from_pretrained(av=av, ar=ar)
    with torch.no_grad():
        nla.verbalizer.engine.model.lm_head.weight.mul_(-1)
    before = texts(nla)
    assert texts(NLA.from_pretrained(nla.save_pretrained(tmp_path))) == before


def test_the_tokenizers_files_are_copied_as_they_are(pair_dirs, nla: NLA, tmp_path: Path) -> None:
    nla.save_pretrained(tmp_path)
    for half, source in zip(("av", "ar"), pair_dirs("llama", "replace"), strict=True):
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            assert (tmp_path / half / name).read_bytes() == (source / name).read_bytes()


def test_over_the_directory_it_was_loaded_from(load_pair, tmp_path: Path) -> None:
    nla = load_pair("llama")
    nla.save_pretrained(tmp_path)
    again = NLA.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    same(nla, NLA.from_pretrained(tmp_path))


# --- the directory --------------------------------------------------------------------------------


def test_nothing_of_anybody_elses_is_lost(nla: NLA, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "av").mkdir()
    with pytest.raises(NLAError, match=r"not empty.*\['thesis.tex'\].*overwrite=True"):
        nla.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert os.listdir(tmp_path.parent).count(tmp_path.name) == 1
    nla.save_pretrained(tmp_path, overwrite=True)
    assert not (tmp_path / "thesis.tex").exists()
    same(nla, NLA.from_pretrained(tmp_path))


def test_our_own_is_written_over(nla: NLA, tmp_path: Path) -> None:
    nla.save_pretrained(tmp_path)
    (tmp_path / "av" / "model-00002-of-00009.safetensors").write_text("left over")
    nla.save_pretrained(tmp_path)
    assert not (tmp_path / "av" / "model-00002-of-00009.safetensors").exists()


def test_a_failure_leaves_what_was_there(
    nla: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    nla.save_pretrained(target)
    before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(NLAError, match=r"out cannot be written: .*No space left.*make room"):
        nla.save_pretrained(target)
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_fills_at_any_file(nla: NLA, tmp_path: Path) -> None:
    """safetensors, tokenizers and numpy raise each its own there."""
    nla.save_pretrained(tmp_path / "whole")
    sizes = {p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sorted(size for size in sizes if size > 2000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
        try:
            with pytest.raises(NLAError, match="cannot be written"):
                nla.save_pretrained(tmp_path / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(tmp_path) == ["whole"]


def test_no_temporary_folder(
    nla: NLA, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(NLAError, match="set TMPDIR"):
        nla.push_to_hub("me/nla", token=TOKEN)


def test_a_file_or_a_link_in_its_place(nla: NLA, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(NLAError, match="no directory"):
            nla.save_pretrained(tmp_path / name, overwrite=True)


def test_the_usual_permissions(nla: NLA, tmp_path: Path) -> None:
    nla.save_pretrained(tmp_path / "out")
    plain = tmp_path / "plain"
    plain.write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "out").rglob("*"):
        like = plain if path.is_file() else tmp_path / "folder"
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(like.stat().st_mode), path


# --- the card -------------------------------------------------------------------------------------


def front_matter(card: str) -> dict:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_the_card(nla: NLA, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    nla.save_pretrained(tmp_path, evaluation={"fve_nrm": 0.75321, "controls": "shuffled | pairs"})
    card = (tmp_path / "README.md").read_text("utf-8")
    head = front_matter(card)
    assert head["library_name"] == "nla-lens"
    assert head["base_model"] == nla.spec.source_model == "test/llama-source"
    assert {"nla-lens", "interpretability"} <= set(head["tags"])
    assert "| fve_nrm | 0.7532 |" in card and "shuffled \\| pairs" in card
    assert "blocks.3.hook_resid_post" in card and "at norm 30" in card
    assert ModelCard(card).data.library_name == "nla-lens"


def test_the_card_says_what_is_not_known_and_no_path(tmp_path: Path) -> None:
    nla = NLA.from_pretrained("tiny")
    nla.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "base_model" not in front_matter(card)
    assert "| fve_nrm | not measured |" in card and "| var_nrm |" in card
    assert str(Path(nla.spec.source_model)) not in card


@pytest.mark.parametrize("wrong", [["fve_nrm"], {"fve_nrm": [1]}, {3: 1.0}, {"x": True}])
def test_evaluations_that_are_none(nla: NLA, tmp_path: Path, wrong: object) -> None:
    with pytest.raises(NLAError, match="evaluation="):
        nla.save_pretrained(tmp_path / "out", evaluation=wrong)
    assert not os.listdir(tmp_path)


# --- other engines --------------------------------------------------------------------------------


def test_engines_without_weights_refuse(nla: NLA, tmp_path: Path) -> None:
    from .scripted import scripted

    with pytest.raises(NLAError, match=r"the AV runs by ScriptedVerbalizer.*engine=.transformers"):
        scripted(nla, ["x"]).save_pretrained(tmp_path / "out")
    with pytest.raises(NLAError, match="the AV runs by"):
        scripted(nla, ["x"]).push_to_hub("someone/x")
    assert not os.listdir(tmp_path)


def test_a_served_verbalizer_refuses(pair_dirs, tmp_path: Path, nla: NLA) -> None:
    from .model_server import ModelServer

    av, _ = pair_dirs("llama", "replace")
    engine = nla.verbalizer.engine
    with ModelServer("vllm", engine.model, nla.verbalizer.tokenizer, str(av)) as server:
        served = NLA.from_pretrained(av=av, engine="vllm", url=server.url)
    with pytest.raises(NLAError, match=r"the AV runs by VLLMVerbalizer, and its weights are not"):
        served.save_pretrained(tmp_path / "out")


def test_nnsight_in_this_process(pair_dirs, nla: NLA, tmp_path: Path) -> None:
    pytest.importorskip("nnsight")
    av, ar = pair_dirs("llama", "replace")
    here = NLA.from_pretrained(av=av, ar=ar, engine="nnsight")
    same(nla, NLA.from_pretrained(here.save_pretrained(tmp_path)))


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with HubServer() as server:
        use(server, monkeypatch, tmp_path / "cache")
        yield server


@pytest.mark.parametrize("name", LAYOUTS)
def test_pushed_and_loaded_back(hub: HubServer, layout, name: str) -> None:
    pytest.importorskip("peft")
    nla = NLA.from_pretrained(layout(name))
    address = nla.push_to_hub("someone/made", token=TOKEN)
    assert address.startswith(f"{hub.url}/someone/made/commit/")
    assert {file.split("/")[0] for file in hub.files("someone/made")} == {
        "av", "ar", "nla_meta.yaml", "README.md"
    }  # fmt: skip
    assert not hub.repos["someone/made"].private
    card = hub.files("someone/made")["README.md"].decode()
    assert 'NLA.from_pretrained("someone/made")' in card
    same(nla, NLA.from_pretrained("someone/made"))


def test_pushing_again_leaves_nothing_over(hub: HubServer, nla: NLA) -> None:
    nla.push_to_hub("someone/made", token=TOKEN, private=True)
    repo = hub.repos["someone/made"]
    assert repo.private
    for name in ("av/model-00002-of-00002.safetensors", "ar/old.json", "notes.md"):
        repo.files[name] = b"left over"
    repo.commit()
    nla.push_to_hub("someone/made", token=TOKEN)
    assert "notes.md" in repo.files
    assert not {"av/model-00002-of-00002.safetensors", "ar/old.json"} & set(repo.files)


def test_a_token_that_may_not(hub: HubServer, nla: NLA) -> None:
    for token in ("hf_" + "b" * 34, None):
        with pytest.raises(NLAError, match=r"made cannot be written.*may not.*hf auth login"):
            nla.push_to_hub("someone/made", token=token)
    assert "someone/made" not in hub.repos


@pytest.mark.parametrize("name", ["made", "a/b/c", "", "someone/", 5, None, "../x"])
def test_names_that_are_no_repositories(nla: NLA, name: object) -> None:
    with pytest.raises(NLAError, match="is not the name of a hub repository"):
        nla.push_to_hub(name)


def test_no_hub(hub: HubServer, nla: NLA) -> None:
    hub.out_of_order = True
    with pytest.raises(NLAError, match=r"cannot be written to on the hub.*out of order"):
        nla.push_to_hub("someone/made", token=TOKEN)
