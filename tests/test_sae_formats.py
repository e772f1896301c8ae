"""Every dictionary format: latents as arithmetic of its own has them, and as sae-lens does."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_lens import NLAError, ResidPost
from nla_lens.adapters.sae import load_dictionary

from . import dictionary_files as files

CASES: dict[str, Callable[[Path], files.Case]] = {
    "qresearch": files.qresearch,
    "goodfire": files.goodfire,
    "saelens-standard": files.saelens,
    "saelens-no-input-bias": lambda root: files.saelens(root, apply_b_dec_to_input=False),
    "saelens-jumprelu": lambda root: files.saelens(root, "jumprelu"),
    "saelens-topk": lambda root: files.saelens(root, "topk"),
    "saelens-topk-scaled": lambda root: files.saelens(
        root, "topk", rescale_acts_by_decoder_norm=True
    ),
    "saelens-gated": lambda root: files.saelens(root, "gated"),
    "saelens-before-6": files.saelens_before_6,
    "gemma-scope": files.gemma_scope,
    "gemma-scope-attn": lambda root: files.gemma_scope(root, "attn_out_all"),
    "gemma-scope-mlp": lambda root: files.gemma_scope(root, "mlp_out"),
    "llama-scope": files.llama_scope,
    "llama-scope-attn": lambda root: files.llama_scope(root, "A"),
    "llama-scope-mlp": lambda root: files.llama_scope(root, "M"),
    "llama-scope-own-lengths": lambda root: files.llama_scope(
        root, sparsity_include_decoder_norm=False
    ),
    "qwen-scope": files.qwen_scope,
    "sparsify": files.sparsify,
    **{
        kind: lambda root, kind=kind: files.dictionary_learning(root, kind)
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
            "JumpReluAutoEncoder",
            "GatedAutoEncoder",
        )
    },
}
X = torch.randn(6, files.D, generator=torch.Generator().manual_seed(5))
has_sae_lens = importlib.util.find_spec("sae_lens") is not None


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> files.Case:
    return CASES[request.param](tmp_path)


def test_latents_and_reconstruction_are_those_of_arithmetic(case: files.Case) -> None:
    sae = load_dictionary(case.source)
    acts = case.encode(X)
    assert 0 < (acts != 0).mean() < 1
    np.testing.assert_allclose(sae.encode(X).numpy(), acts, atol=2e-6)
    np.testing.assert_allclose(sae.decode(torch.tensor(acts)).numpy(), case.decode(acts), atol=2e-6)
    np.testing.assert_allclose(sae(X).numpy(), case.decode(acts), atol=5e-6)
    assert sae.encode(X.reshape(2, 3, -1)).shape == (2, 3, files.F)


def test_directions_and_biases_are_those_in_the_file(case: files.Case) -> None:
    sae = load_dictionary(case.source)
    assert torch.equal(sae.W_dec, case.weights.W_dec)
    assert torch.equal(sae.W_enc, case.weights.W_enc)
    assert torch.equal(sae.b_dec, case.weights.b_dec / case.scale)
    picked = [31, 3, 4, 3, 39, 0]
    assert torch.equal(sae.rows(picked), case.weights.W_dec[picked])
    # Parts are read from the file itself, not from the mapping.
    assert sae.decoder.stored.offset is not None
    assert sae.encoder.stored.offset is not None


def test_the_place_is_named(case: files.Case) -> None:
    sae = load_dictionary(case.source)
    assert sae.cfg.hook_name == case.hook_name
    assert sae.cfg.metadata.hook_name == case.hook_name
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (files.D, files.F)
    said = load_dictionary(case.source, hook_name="blocks.1.hook_resid_post")
    assert said.cfg.hook_name == "blocks.1.hook_resid_post"


def test_the_input_of_a_block_is_the_output_of_the_one_before(tmp_path: Path) -> None:
    sae = load_dictionary(files.qresearch(tmp_path).source)
    assert ResidPost.parse(sae.cfg.hook_name) == ResidPost(8)


def test_a_batch_topk_of_the_training_kind_is_read_with_its_one_threshold(tmp_path: Path) -> None:
    case = files.saelens(tmp_path, "batchtopk", k=5, rescale_acts_by_decoder_norm=True)
    path = case.source / "sae_weights.safetensors"
    save_file({**load_file(path), "topk_threshold": torch.tensor(0.6)}, path)
    acts = load_dictionary(case.source).encode(X)
    w = case.weights
    scaled = torch.relu((X - w.b_dec) @ w.W_enc + w.b_enc) * w.W_dec.norm(dim=-1)
    kept = load_dictionary(case.source).encode(X) > 0
    assert torch.allclose(acts[kept], scaled[kept], atol=1e-6)
    assert torch.equal(kept, scaled > 0.6)


# --- as sae-lens has it -------------------------------------------------------------------------

SAE_LENS = [name for name in CASES if name.startswith("saelens")]


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
@pytest.mark.parametrize("name", SAE_LENS)
def test_the_same_as_sae_lens(name: str, tmp_path: Path) -> None:
    import sae_lens

    case = CASES[name](tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(case.source), load_dictionary(case.source)
    acts = theirs.encode(X)
    assert torch.allclose(ours.encode(X), acts, atol=1e-6)
    assert torch.allclose(ours.decode(acts), theirs.decode(acts), atol=1e-6)
    assert torch.equal(ours.W_dec, theirs.W_dec)


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
@pytest.mark.parametrize("kind", ["BatchTopKTrainingSAE", "GatedTrainingSAE", "TopKTrainingSAE"])
def test_what_sae_lens_saves_is_read(kind: str, tmp_path: Path) -> None:
    import sae_lens

    torch.manual_seed(0)
    own = {} if kind.startswith("Gated") else {"k": 4}
    config = getattr(sae_lens, f"{kind}Config")(d_in=files.D, d_sae=files.F, **own)
    trained = getattr(sae_lens, kind)(config)
    if kind.startswith("Batch"):
        trained.topk_threshold = torch.tensor(0.3, dtype=torch.double)
    trained.save_inference_model(tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path), load_dictionary(tmp_path)
    assert torch.allclose(ours.encode(X), theirs.encode(X), atol=1e-6)
    assert torch.allclose(ours(X), theirs(X), atol=1e-6)


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
def test_gemma_scope_is_the_same_as_sae_lens_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    case = files.gemma_scope(tmp_path)
    config = json.loads((case.source / "config.json").read_text())
    shapes = {"w_enc": [files.D, files.F], "w_dec": [files.F, files.D]}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *a, **k: shapes)
    monkeypatch.setattr(
        loaders,
        "hf_hub_download",
        lambda repo_id, filename, subfolder=None, **k: tmp_path / (subfolder or "") / filename,
    )
    assert config["architecture"] == "jump_relu"
    theirs, _, _ = loaders.gemma_3_sae_huggingface_loader(
        "google/gemma-scope-2-4b-it", case.source.relative_to(tmp_path).as_posix()
    )
    ours = load_dictionary(case.source)
    assert theirs["hook_name"] == ours.cfg.hook_name
    assert theirs["architecture"] == ours.cfg.architecture
    assert theirs["apply_b_dec_to_input"] == ours.cfg.apply_b_dec_to_input


def converted_by_sae_lens(loader: Callable, *args: object) -> Any:
    """What one of sae-lens' converters makes of files that are here and not on the hub."""
    import sae_lens
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    cfg, state, _ = loader(*args)
    cfg = handle_config_defaulting(cfg)
    kind = sae_lens.SAE.get_sae_config_class_for_architecture(cfg["architecture"])
    sae = sae_lens.SAE.get_sae_class_for_architecture(cfg["architecture"])(kind.from_dict(cfg))
    sae.load_state_dict(state)
    return sae


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_dictionary_learning_is_the_same_as_sae_lens_converts_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    case = files.dictionary_learning(tmp_path, kind)
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, **k: tmp_path / filename
    )
    loader = loaders.dictionary_learning_sae_huggingface_loader_1
    theirs, ours = converted_by_sae_lens(loader, "a/b", kind), load_dictionary(case.source)
    # sae-lens leaves latents in units of their own: activations differ by ||W_dec||, no more.
    lengths = ours.W_dec.norm(dim=-1) if case.scaled else 1.0
    assert torch.allclose(ours.encode(X), theirs.encode(X) * lengths, atol=1e-5)
    assert torch.allclose(ours(X), theirs(X), atol=1e-5)
    assert theirs.cfg.metadata.hook_name == ours.cfg.hook_name


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
@pytest.mark.parametrize("name", ["qresearch", "goodfire"])
def test_linear_files_are_the_same_as_sae_lens_converts_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    case = CASES[name](tmp_path)
    path = next(tmp_path.rglob("*.pt*"))
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **k: path)
    sizes = {"d_in": files.D, "d_sae": files.F, "dtype": "float32", "device": "cpu"}
    if name == "goodfire":
        loader, repo = (
            loaders.get_goodfire_huggingface_loader,
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        )
    else:
        # Of the same layout, and from the same people.
        loader, repo = loaders.deepseek_r1_sae_huggingface_loader, "a/b"
    theirs = converted_by_sae_lens(loader, repo, path.name, "cpu", False, sizes)
    ours = load_dictionary(case.source)
    assert torch.allclose(ours.encode(X), theirs.encode(X), atol=1e-6)
    assert torch.allclose(ours(X), theirs(X), atol=1e-6)
    side = "pre" if name == "qresearch" else "post"
    assert ours.cfg.hook_name == theirs.cfg.metadata.hook_name.replace("post", side)


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
def test_what_is_not_read_here_is_left_to_sae_lens(tmp_path: Path) -> None:
    case = files.saelens(tmp_path, normalize_activations="layer_norm")
    sae = load_dictionary(case.source)
    assert type(sae).__module__.startswith("sae_lens")


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"architecture": "temporal"}, "temporal"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
    ],
)
def test_what_is_not_read_is_named(
    cfg: dict, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_lens.adapters.dictionaries.loading._by_sae_lens", lambda folder: None)
    case = files.saelens(tmp_path)
    settings = json.loads((case.source / "cfg.json").read_text())
    (case.source / "cfg.json").write_text(json.dumps({**settings, **cfg}))
    with pytest.raises(NLAError, match=named):
        load_dictionary(case.source)


# --- a place or a format that is not known stays unknown ----------------------------------------


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("layers.7", "blocks.7.hook_resid_post"),
        ("gpt_neox.layers.7", "blocks.7.hook_resid_post"),
        ("model.layers.7", "blocks.7.hook_resid_post"),
        ("transformer.h.7", "blocks.7.hook_resid_post"),
        ("layers.7.mlp", "blocks.7.hook_mlp_out"),
        ("layers.7.attention", "blocks.7.hook_attn_out"),
        ("layers.7.self_attn", "blocks.7.hook_attn_out"),
        ("h.7.attn", "blocks.7.hook_attn_out"),
        ("layers.7.attention.dense", None),
        ("layers.7.self_attn.o_proj", None),
        ("layers.7.input_layernorm", None),
        ("layers.7.post_attention_layernorm", None),
        ("layers.7.mixer", None),
        ("layers.7.block_sparse_moe", None),
        ("layers.7.mlp.down_proj", None),
        ("encoder.layers.7", None),
        ("vision_model.layers.7", None),
        ("layers.7_old", None),
        ("somewhere", None),
        ("embed_tokens", "hook_embed"),
        ("embed_in", "hook_embed"),
    ],
)
def test_the_place_of_a_module(folder: str, place: str | None, tmp_path: Path) -> None:
    case = files.sparsify(tmp_path, folder)
    assert load_dictionary(case.source).cfg.hook_name == place
    assert load_dictionary(tmp_path, subfolder=folder).cfg.hook_name == place


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({"submodule_name": "resid_pre_layer_8"}, "blocks.8.hook_resid_pre"),
        ({"submodule_name": "mlp_out_layer_8"}, "blocks.8.hook_mlp_out"),
        ({"submodule_name": "attention_out_layer_8"}, "blocks.8.hook_attn_out"),
        ({"submodule_name": "model.layers.8"}, "blocks.8.hook_resid_post"),
        ({"submodule_name": "gpt_neox.layers.8.mlp"}, "blocks.8.hook_mlp_out"),
        ({"submodule_name": "model.layers.8.mlp.down_proj"}, None),
        ({"submodule_name": "router_layer_8"}, None),
        ({"submodule_name": "resid_post_layer_9"}, None),  # and layer 8
        ({"submodule_name": None}, None),
        ({"submodule_name": 5}, None),
        ({"layer": "8; DROP"}, None),
        ({"layer": None}, "blocks.8.hook_resid_post"),
    ],
)
def test_the_place_of_a_submodule(said: dict, place: str | None, tmp_path: Path) -> None:
    case = files.dictionary_learning(tmp_path, "AutoEncoder")
    config = json.loads((case.source / "config.json").read_text())
    config["trainer"] |= said
    (case.source / "config.json").write_text(json.dumps(config))
    assert load_dictionary(case.source).cfg.hook_name == place


def test_what_reads_the_input_of_a_module_is_one_block_before(tmp_path: Path) -> None:
    case = files.dictionary_learning(tmp_path, "AutoEncoder")
    config = json.loads((case.source / "config.json").read_text())
    config["trainer"]["submodule_name"] = "model.layers.8"
    for io, place in (("in", "blocks.8.hook_resid_pre"), ("odd", None)):
        (case.source / "config.json").write_text(json.dumps(config | {"buffer": {"io": io}}))
        assert load_dictionary(case.source).cfg.hook_name == place
    (case.source / "config.json").write_text(json.dumps(config | {"buffer": {"io": "in_and_out"}}))
    with pytest.raises(NLAError, match="transcoder"):
        load_dictionary(case.source)


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"type": "transcoder"}, "transcoder"),
        ({"type": "clt", "hf_hook_point_in": "model.layers.{all}.output"}, "clt"),
        ({"type": "crosscoder"}, "crosscoder"),
        ({"type": ["sae"]}, "type="),
        ({"affine_connection": True}, "affine"),
        (
            {
                "type": None,
                "hf_hook_point_in": "model.layers.12.pre_feedforward_layernorm.output",
                "hf_hook_point_out": "model.layers.12.post_feedforward_layernorm.output",
            },
            "transcoder",
        ),
        ({"hf_hook_point_out": "model.layers.13.output"}, "writes"),
        ({"architecture": "topk"}, "topk"),
    ],
)
def test_gemma_scopes_other_kinds_are_refused(cfg: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(NLAError, match=named):
        load_dictionary(files.gemma_scope(tmp_path, **cfg).source)


def test_gemma_scope_without_a_config_goes_by_its_folder(tmp_path: Path) -> None:
    for kind, (_, place) in files.GEMMA_SCOPE_2.items():
        case = files.gemma_scope(tmp_path / "x", kind)
        (case.source / "config.json").unlink()
        assert load_dictionary(case.source).cfg.hook_name == f"blocks.12.{place}"
    there = case.source
    for kind in ("transcoder", "crosscoder_all", "clt"):
        moved = tmp_path / kind / there.name
        moved.parent.mkdir()
        there = there.rename(moved)
        with pytest.raises(NLAError, match="folder of"):
            load_dictionary(there)
    there = there.rename(tmp_path / there.name)
    assert load_dictionary(there).cfg.hook_name is None


def test_a_point_of_gemma_scope_that_is_not_known_is_not_the_stream(tmp_path: Path) -> None:
    point = "model.vision_tower.layers.12.output"
    case = files.gemma_scope(tmp_path, hf_hook_point_in=point, hf_hook_point_out=point)
    place = load_dictionary(case.source).cfg.hook_name
    assert place == point
    assert ResidPost.find(place) is None


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"hook_point_in": "blocks.15.ln2.hook_normalized"}, "transcoder"),
        ({"dataset_average_activation_norm": {"in": 64.0, "out": 3.4}}, "transcoder"),
        ({"dataset_average_activation_norm": None, "norm_activation": None}, "norm_activation"),
        ({"dataset_average_activation_norm": {"in": "x"}}, "dataset_average"),
        ({"dataset_average_activation_norm": {}}, "dataset_average"),
        ({"dataset_average_activation_norm": {"in": 0.0, "out": 0.0}}, "dataset_average"),
        ({"norm_activation": "token-wise"}, "token-wise"),
        ({"act_fn": "batchtopk"}, "batchtopk"),
        ({"act_fn": None}, "act_fn"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold"),
        ({"jump_relu_threshold": -1.0}, "jump_relu_threshold"),
        ({"use_glu_encoder": True}, "glu"),
        ({"use_decoder_bias": False}, "use_decoder_bias"),
        ({"hook_point_in": None, "hook_point_out": None, "side": "TC"}, "transcoder"),
        ({"d_model": 13}, "shape"),
    ],
)
def test_what_of_llama_scope_is_refused(cfg: dict, named: str, tmp_path: Path) -> None:
    given = dict(cfg)
    side = given.pop("side", "R")
    with pytest.raises(NLAError, match=named):
        load_dictionary(files.llama_scope(tmp_path, side, **given).source)


def test_llama_scopes_threshold_is_in_units_of_the_model(tmp_path: Path) -> None:
    """Not of the scaled input, where it would be too low by s and let in what is noise."""
    case = files.llama_scope(tmp_path)
    w, sae = case.weights, load_dictionary(case.source)
    normed = torch.relu(X * case.scale @ w.W_enc + w.b_enc) * w.W_dec.norm(dim=-1)
    on = sae.encode(X) > 0
    assert torch.equal(on, normed > case.least * case.scale)
    assert on.sum() < (normed > case.least).sum() < (normed > 0).sum()


def test_llama_scope_by_any_of_its_paths(tmp_path: Path) -> None:
    case = files.llama_scope(tmp_path)
    weights = case.source / "checkpoints" / "final.safetensors"
    wanted = load_dictionary(case.source)
    for source in (weights, weights.parent):
        assert load_dictionary(source).cfg == wanted.cfg
    folder = case.source.name
    for inside in (folder, f"{folder}/checkpoints", f"{folder}/checkpoints/final.safetensors"):
        assert load_dictionary(tmp_path, subfolder=inside).cfg == wanted.cfg
    assert load_dictionary(tmp_path, subfolder=folder, filename="checkpoints").cfg == wanted.cfg
    with pytest.raises(NLAError, match=r"L15R-8x.*subfolder"):
        load_dictionary(tmp_path)
    # The place by the name, where the config does not say it.
    own = files.llama_scope(tmp_path / "m", "M", hook_point_in=None, hook_point_out=None)
    assert load_dictionary(own.source).cfg.hook_name == "blocks.15.hook_mlp_out"


def test_topk_with_a_threshold_is_used_with_the_threshold(tmp_path: Path) -> None:
    """As the authors' loader does; without one it stays TopK."""
    case = files.llama_scope(tmp_path, act_fn="topk", top_k=4)
    assert load_dictionary(case.source).cfg.architecture == "jumprelu"
    np.testing.assert_allclose(load_dictionary(case.source).encode(X), case.encode(X), atol=2e-6)
    own = files.llama_scope(tmp_path / "k", act_fn="topk", top_k=4, jump_relu_threshold=0.0)
    sae = load_dictionary(own.source)
    assert (sae.cfg.architecture, sae.cfg.k) == ("topk", 4)
    assert (sae.encode(X) > 0).sum(-1).max() == 4


def test_qwen_scope_has_a_file_a_layer(tmp_path: Path) -> None:
    case = files.qwen_scope(tmp_path, layers=(3, 20))
    folder = case.source.parent
    with pytest.raises(NLAError, match=r"several.*layer20.*filename"):
        load_dictionary(folder)
    for layer in (3, 20):
        sae = load_dictionary(folder, filename=f"layer{layer}.sae.pt")
        assert sae.cfg.hook_name == f"blocks.{layer}.hook_resid_post"
        assert torch.equal(sae.W_dec, files.weights(seed=layer).W_dec)
        assert (sae.cfg.k, sae.cfg.model_name) == (files.K, "Qwen/Qwen3-1.7B-Base")


def test_qwen_scope_without_its_config(tmp_path: Path) -> None:
    """The repository's name says k; without either nothing does."""
    case = files.qwen_scope(tmp_path, config=False)
    with pytest.raises(NLAError, match="k=50"):  # of 40 latents
        load_dictionary(case.source.parent)
    case.source.rename(tmp_path / case.source.name)
    with pytest.raises(NLAError, match=r"nothing\s+says k"):
        load_dictionary(tmp_path / case.source.name)
    config = {"model_type": "topk_sae", "k": files.K, "hook_point": "somewhere"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_dictionary(tmp_path / case.source.name).cfg.hook_name is None


@pytest.mark.parametrize(
    "name", ["final.safetensors", "sae.pt", "model.pt", "layer9.pt", "SAE-length9.pt"]
)
def test_four_bare_tensors_prove_no_format(name: str, tmp_path: Path) -> None:
    state = files._linear(files.weights(), "encoder", "decoder")
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save(state, path)
    else:
        save_file(state, path)
    with pytest.raises(NLAError, match=r"prove no format.*format="):
        load_dictionary(path)
    sae = load_dictionary(path, format="qresearch")
    assert (sae.cfg.format, sae.cfg.hook_name) == ("qresearch", None)
    told = load_dictionary(path, format="QResearch", hook_name="blocks.1.hook_resid_post")
    assert told.cfg.hook_name == "blocks.1.hook_resid_post"
    for wrong in ("relu", 7):
        with pytest.raises(NLAError, match="none of qresearch"):
            load_dictionary(path, format=wrong)  # type: ignore[arg-type]


def test_a_config_that_says_something_else_is_no_qresearch(tmp_path: Path) -> None:
    case = files.qresearch(tmp_path)
    (case.source / "config.json").write_text('{"activation": "topk", "k": 50}')
    with pytest.raises(NLAError, match="prove no format"):
        load_dictionary(case.source)


# --- dictionary_learning without its config, and files that wrappers wrote ----------------------


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_dictionary_learnings_classes_are_told_by_their_names(kind: str, tmp_path: Path) -> None:
    case = files.dictionary_learning(tmp_path, kind)
    (case.source / "config.json").unlink()
    sae = load_dictionary(case.source)
    np.testing.assert_allclose(sae.encode(X).numpy(), case.encode(X), atol=2e-6)
    assert sae.cfg.hook_name is None


@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_two_of_its_classes_are_not(kind: str, tmp_path: Path) -> None:
    case = files.dictionary_learning(tmp_path, kind)
    (case.source / "config.json").unlink()
    with pytest.raises(NLAError, match=r"both AutoEncoderTopK and BatchTopKSAE.*format="):
        load_dictionary(case.source)
    sae = load_dictionary(case.source, format=kind)
    np.testing.assert_allclose(sae.encode(X).numpy(), case.encode(X), atol=2e-6)


def test_what_is_missing_of_it_is_named(tmp_path: Path) -> None:
    case = files.dictionary_learning(tmp_path, "GatedAutoEncoder")
    (case.source / "config.json").unlink()
    path = case.source / "ae.pt"
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "mag_bias"}, path)
    with pytest.raises(NLAError, match=r"missing \['mag_bias'\]"):
        load_dictionary(case.source)


def test_a_threshold_that_was_never_measured_is_refused(tmp_path: Path) -> None:
    case = files.dictionary_learning(tmp_path, "BatchTopKSAE")
    change(case, "threshold", lambda t: torch.tensor(-1.0))
    with pytest.raises(NLAError, match="never measured"):
        load_dictionary(case.source)


WRAPPED: dict[str, Callable[[dict], dict]] = {
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "both": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "parts": lambda state: {
        k.replace("encoder.", "encoder._orig_mod."): v for k, v in state.items()
    },
    "model": lambda state: {"model": state, "step": 3},
    "state_dict": lambda state: {"state_dict": WRAPPED["compiled"](state)},
    "trainer": lambda state: {
        "model_state_dict": WRAPPED["parallel"](state),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 2)}}, "param_groups": []},
    },
    "module": lambda state: {f"autoencoder.{k}": v for k, v in state.items()},
    "deep": lambda state: {"checkpoint": {"model": WRAPPED["module"](state)}},
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("name", ["qresearch", "goodfire", "AutoEncoder", "GatedAutoEncoder"])
def test_prefixes_and_nests_are_opened(name: str, wrapped: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    folder = case.source if case.source.is_dir() else case.source.parent
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".pth"))
    state = dict(torch.load(path, weights_only=True))
    torch.save(WRAPPED[wrapped](state), path)
    sae = load_dictionary(case.source)
    np.testing.assert_allclose(sae.encode(X).numpy(), case.encode(X), atol=2e-6)
    assert sae.cfg.hook_name == case.hook_name


def test_of_two_dicts_none_is_chosen(tmp_path: Path) -> None:
    case = files.qresearch(tmp_path)
    path = next(case.source.iterdir())
    state = torch.load(path, weights_only=True)
    torch.save({"sae": state, "model": state}, path)
    with pytest.raises(NLAError, match=r"several dicts.*model.*sae"):
        load_dictionary(case.source)
    torch.save({**state, **WRAPPED["compiled"](state)}, path)
    with pytest.raises(NLAError, match="twice"):
        load_dictionary(case.source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    path = case.source / "sae_weights.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path)
    sae = load_dictionary(case.source)
    rounded = case.weights.W_dec.to(dtype).float()
    assert torch.equal(sae.W_dec, rounded)
    assert torch.equal(sae.rows([3, 9]), rounded[[3, 9]])
    assert sae.encode(X).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    change(case, "W_dec", lambda t: t.to(dtype))
    with pytest.raises(NLAError, match=r"W_dec.*quantized"):
        load_dictionary(case.source)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    case = files.sparsify(tmp_path)
    whole = load_file(case.source / "sae.safetensors")
    (case.source / "sae.safetensors").unlink()
    index = {}
    for i, (name, tensor) in enumerate(sorted(whole.items())):
        shard = f"sae-{i + 1:05}-of-00004.safetensors"
        save_file({name: tensor}, case.source / shard)
        index[name] = shard
    path = case.source / "sae.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    sae = load_dictionary(case.source, format="sparsify")
    assert torch.equal(sae.rows([1, 30]), case.weights.W_dec[[1, 30]])
    np.testing.assert_allclose(sae.encode(X).numpy(), case.encode(X), atol=2e-6)
    for wrong, named in (
        ({**index, "W_dec": "../layers.8/sae.safetensors"}, "beside it"),
        ({**index, "W_dec": "/etc/passwd"}, "beside it"),
        ({**index, "W_dec": 7}, "beside it"),
        ({**index, "W_gone": index["W_dec"]}, "W_gone"),
        ({**index, "W_dec": "gone.safetensors"}, "gone"),
        ({}, "weight_map"),
    ):
        path.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(NLAError, match=named):
            load_dictionary(case.source, format="sparsify")


# --- SAELens through its versions -----------------------------------------------------------------


def resave(case: files.Case, **cfg: object) -> Path:
    path = case.source / "cfg.json"
    settings = {**json.loads(path.read_text()), **cfg}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return case.source


@pytest.mark.parametrize(
    ("cfg", "place"),
    [
        ({"metadata": None, "hook_name": "blocks.8.hook_resid_pre"}, "blocks.8.hook_resid_pre"),
        (
            {"metadata": None, "hook_name": "blocks.{layer}.hook_resid_post", "hook_layer": 4},
            "blocks.4.hook_resid_post",
        ),
        ({"metadata": None, "hook_name": "blocks.{layer}.hook_resid_post"}, None),
        ({"metadata": None, "hook_point": "blocks.3.hook_mlp_out"}, "blocks.3.hook_mlp_out"),
        ({"metadata": None}, None),
        ({"metadata": {}}, None),
    ],
)
def test_where_each_version_says_its_place(cfg: dict, place: str | None, tmp_path: Path) -> None:
    assert load_dictionary(resave(files.saelens(tmp_path), **cfg)).cfg.hook_name == place


_OTHER_KINDS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "temporal", "abstopk")
_NORMALIZED = ("expected_average_only_in", "constant_norm_rescale", "covariance_whitening", True)


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        *(({"architecture": name}, name) for name in _OTHER_KINDS),
        ({"architecture": ["standard"]}, "architecture="),
        ({"architecture": {}}, "architecture="),
        ({"activation_fn": ["relu"]}, "activation_fn="),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        *(({"normalize_activations": name}, str(name)) for name in _NORMALIZED),
        ({"metadata": {"hook_name": "blocks.2.attn.hook_q", "hook_head_index": 3}}, "head_index=3"),
        ({"hook_head_index": 0}, "head_index=0"),
        ({"metadata": {"hook_name": "blocks.2.attn.hook_z"}}, "hook_z"),
        (
            {
                "metadata": {
                    "hook_name": "blocks.2.hook_mlp_in",
                    "hook_name_out": "blocks.2.hook_mlp_out",
                }
            },
            "hook_name_out",
        ),
        ({"metadata": {"hook_name": 5}}, "hook_name"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": [1]}}, "model_name"),
        ({"d_in": "12"}, "d_in="),
        ({"d_in": True}, "d_in="),
        ({"d_sae": 10**30}, "shape"),
        ({"sae_type": "sae", "hook_point_in": "blocks.1.hook_resid_post"}, "OpenMOSS"),
    ],
)
def test_what_of_saelens_is_refused(
    cfg: dict, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_lens.adapters.dictionaries.loading._by_sae_lens", lambda folder: None)
    with pytest.raises(NLAError, match=named):
        load_dictionary(resave(files.saelens(tmp_path), **cfg))


def test_saelens_weights_alone_say_nothing(tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    (case.source / "cfg.json").unlink()
    with pytest.raises(NLAError, match=r"no cfg\.json"):
        load_dictionary(case.source)


def test_a_threshold_beside_relu_is_contradictory(tmp_path: Path) -> None:
    case = files.saelens(tmp_path, "jumprelu")
    with pytest.raises(NLAError, match="threshold"):
        load_dictionary(resave(case, architecture="standard"))


def test_the_logarithm_of_a_threshold(tmp_path: Path) -> None:
    case = files.saelens(tmp_path, "jumprelu")
    path = case.source / "sae_weights.safetensors"
    state = load_file(path)
    state["log_threshold"] = state.pop("threshold").log()
    save_file(state, path)
    np.testing.assert_allclose(load_dictionary(case.source).encode(X), case.encode(X), atol=2e-6)


@pytest.mark.parametrize("scale", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_scale_that_was_not_folded_in_is_refused(
    scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_lens.adapters.dictionaries.loading._by_sae_lens", lambda folder: None)
    case = files.saelens(tmp_path)
    path = case.source / "sae_weights.safetensors"
    state = load_file(path)
    save_file({**state, scale: torch.ones(files.F)}, path)
    load_dictionary(case.source)
    save_file({**state, scale: torch.full((files.F,), 1.5)}, path)
    with pytest.raises(NLAError, match=scale):
        load_dictionary(case.source)


# --- damaged and hostile files ------------------------------------------------------------------


def change(case: files.Case, name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Replaces one tensor of a case's file."""
    folder = case.source if case.source.is_dir() else case.source.parent
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".safetensors"))
    if path.suffix == ".safetensors":
        state = {k: v.clone() for k, v in load_file(path).items()}
        save_file({**state, name: to(state[name]).contiguous()}, path)
    else:
        state = torch.load(path, weights_only=True)
        torch.save({**state, name: to(state[name]).contiguous()}, path)
    return path


MATRICES = {
    "qresearch": ("encoder.weight", "decoder.weight"),
    "goodfire": ("encoder_linear.weight", "decoder_linear.weight"),
    "saelens-standard": ("W_enc", "W_dec"),
    "gemma-scope": ("w_enc", "w_dec"),
    "sparsify": ("encoder.weight", "W_dec"),
    "AutoEncoderTopK": ("encoder.weight", "decoder.weight"),
}
EACH = [(case, name) for case, names in MATRICES.items() for name in names]


@pytest.mark.parametrize(("name", "tensor"), EACH)
@pytest.mark.parametrize(
    "damage",
    [lambda t: t.T, lambda t: t[:, :-1], lambda t: t[:-1], lambda t: t.reshape(-1)],
    ids=["transposed", "narrower", "shorter", "flat"],
)
def test_a_matrix_of_another_shape_is_named(
    name: str, tensor: str, damage: Callable, tmp_path: Path
) -> None:
    case = CASES[name](tmp_path)
    change(case, tensor, damage)
    with pytest.raises(NLAError, match=tensor.replace(".", r"\.")):
        load_dictionary(case.source)


@pytest.mark.parametrize(("name", "tensor"), EACH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_named(name: str, tensor: str, bad: float, tmp_path: Path) -> None:
    def spoil(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[3, 5] = bad
        return t

    case = CASES[name](tmp_path)
    change(case, tensor, spoil)
    with pytest.raises(NLAError, match=tensor.replace(".", r"\.") + r".*(nan|inf)"):
        load_dictionary(case.source)


def test_nan_in_a_bias_is_named(tmp_path: Path) -> None:
    case = files.goodfire(tmp_path)
    change(case, "decoder_linear.bias", lambda t: t * float("nan"))
    with pytest.raises(NLAError, match=r"decoder_linear\.bias"):
        load_dictionary(case.source)


def test_a_large_file_is_looked_through_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_lens.adapters.dictionaries.dictionary._SCANNED", 0)
    case = files.qresearch(tmp_path)

    def spoil(t: torch.Tensor) -> torch.Tensor:
        t[2, 7] = float("nan")
        return t

    change(case, "decoder.weight", spoil)
    sae = load_dictionary(case.source)
    assert torch.equal(sae.rows([6, 8]), case.weights.W_dec[[6, 8]])
    with pytest.raises(NLAError, match=r"decoder\.weight"):
        sae.rows([6, 7])


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused(name: str, share: float, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    folder = case.source if case.source.is_dir() else case.source.parent
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(NLAError, match=path.name):
        load_dictionary(case.source)


def test_the_cut_tensor_is_named(tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    path = case.source / "sae_weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(NLAError, match=r"ends in the middle of \w+"):
        load_dictionary(case.source)


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["qresearch", "goodfire", "AutoEncoder"])
def test_a_hostile_pickle_leaves_no_trace(name: str, zipped: bool, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    folder = case.source if case.source.is_dir() else case.source.parent
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".pth"))
    trace = tmp_path / "trace"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "x": Hostile(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(NLAError, match="refused"):
        load_dictionary(case.source)
    assert not trace.exists()
    # The file would have done it.
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_a_file_of_old_torch_and_a_turned_tensor_are_read_whole(tmp_path: Path) -> None:
    case = files.qresearch(tmp_path)
    path = next(case.source.iterdir())
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_dictionary(path).rows([1, 9]), case.weights.W_dec[[1, 9]])
    torch.save({**state, "decoder.weight": case.weights.W_dec.T}, path)
    assert torch.equal(load_dictionary(path).rows([1, 9]), case.weights.W_dec[[1, 9]])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda root: root / "nowhere", "no dictionary"),
        (lambda root: root, "no dictionary"),
        (lambda root: torch.save([1], root / "x.pt") or root, "list"),
        (lambda root: torch.save({"a": torch.ones(2)}, root / "x.pt") or root, "'a'"),
        (lambda root: (root / "x.safetensors").write_bytes(b"{}") and root, "x.safetensors"),
        (lambda root: SimpleNamespace(W_dec=torch.ones(2, 2)), "encode, decode"),
        (lambda root: 7, "W_dec"),
    ],
)
def test_what_is_no_dictionary_is_named(make: Callable, named: str, tmp_path: Path) -> None:
    with pytest.raises(NLAError, match=named):
        load_dictionary(make(tmp_path))


def test_a_folder_of_several_asks_which(tmp_path: Path) -> None:
    case = files.sparsify(tmp_path)
    with pytest.raises(NLAError, match=r"layers\.7.*subfolder"):
        load_dictionary(tmp_path)
    assert load_dictionary(tmp_path, subfolder="layers.7").cfg.hook_name == case.hook_name


def test_links_that_lead_nowhere_are_passed_by(tmp_path: Path) -> None:
    case = files.sparsify(tmp_path)
    for folder in (tmp_path, case.source):
        (folder / "loop").symlink_to("loop")
        (folder / "dangling").symlink_to("nowhere")
    assert load_dictionary(case.source).cfg.hook_name == case.hook_name
    with pytest.raises(NLAError, match=r"layers\.7.*subfolder"):
        load_dictionary(tmp_path)


def test_an_object_with_the_three_names_is_taken_as_it_is() -> None:
    class Own:
        W_dec = torch.ones(3, 4)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        decode = encode

    own = Own()
    assert load_dictionary(own) is own
    with pytest.raises(NLAError, match="hook_name"):
        load_dictionary(own, hook_name="blocks.1.hook_resid_post")


def test_an_object_that_writes_elsewhere_is_refused() -> None:
    """A transcoder of sae-lens has the three names, too."""

    def of(**metadata: str) -> SimpleNamespace:
        verbs = {"encode": torch.relu, "decode": torch.relu}
        cfg = SimpleNamespace(metadata=SimpleNamespace(**metadata))
        return SimpleNamespace(W_dec=torch.ones(3, 4), cfg=cfg, **verbs)

    place = "blocks.1.hook_resid_post"
    load_dictionary(of(hook_name=place, hook_name_out=place))
    with pytest.raises(NLAError, match="transcoder"):
        load_dictionary(of(hook_name="blocks.1.hook_mlp_in", hook_name_out="blocks.1.hook_mlp_out"))


def test_dictionaries_need_none_of_the_tools() -> None:
    code = (
        "import sys, nla_lens.adapters.sae, nla_lens.adapters.dictionaries.command;"
        "print({'sae_lens', 'transformer_lens', 'nnsight'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# --- memory ---------------------------------------------------------------------------------------

MEMORY = """
import re, sys
from nla_lens.adapters.sae import load_dictionary

# Not ru_maxrss: a new process begins with its parent's.
def highest():
    with open("/proc/self/status") as status:
        return re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1]

base = highest()
sae = load_dictionary(sys.argv[1])
rows = sae.rows([0, 11, 977, 4096, 9999, 20000, 31000, 44444, 60000, 65535])
peak = highest()
print(base, peak, [round(float(r[0]), 3) for r in rows], tuple(rows.shape))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
@pytest.mark.parametrize("name", ["goodfire", "saelens"])
def test_ten_latents_of_a_2_gb_matrix_cost_megabytes(name: str, tmp_path: Path) -> None:
    """The files have holes in place of zeros, so they take no room and no time to write."""
    d, f = 8192, 65536
    if name == "goodfire" and not hasattr(torch.serialization, "skip_data"):
        pytest.skip("torch.save writes no holes before 2.6")
    path = sparse_file(tmp_path, name, d, f)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    base, peak, rest = run.stdout.split(" ", 2)
    assert "(10, 8192)" in rest
    # In KiB, torch itself included in both.
    assert int(peak) - int(base) < 100 * 1024, (base, peak)


def sparse_file(root: Path, name: str, d: int, f: int) -> Path:
    """A dictionary of zeros whose two matrices have 2 GB each."""
    if name == "saelens":
        shapes = {"W_dec": [f, d], "W_enc": [d, f], "b_dec": [d], "b_enc": [f]}
        header, at = {}, 0
        for key, shape in shapes.items():
            size = 4 * int(np.prod(shape))
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        said = json.dumps(header).encode()
        path = root / "sae_weights.safetensors"
        with path.open("wb") as file:
            file.write(len(said).to_bytes(8, "little") + said)
            file.truncate(8 + len(said) + at)
        (root / "cfg.json").write_text(json.dumps({"d_in": d, "d_sae": f}))
        return path
    shapes = {
        "encoder_linear.weight": (f, d),
        "encoder_linear.bias": (f,),
        "decoder_linear.weight": (d, f),
        "decoder_linear.bias": (d,),
    }
    path = root / "X-SAE-l19.pth"
    # Never touched, so the two gigabytes are no memory; and left out of the file.
    with torch.serialization.skip_data():
        torch.save({k: torch.empty(s) for k, s in shapes.items()}, path)
    return path
