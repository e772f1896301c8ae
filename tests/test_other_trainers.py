"""Sidecars of other trainers: read where the arithmetic is clear, else refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nla_lens import NLA, NLAError, NLAWarning
from nla_lens.checkpoints.releases import KNOWN_RELEASES
from nla_lens.checkpoints.sidecar import read_sidecar
from nla_lens.checkpoints.spec import read_spec

from .checkpoints import ABSENT, build_ar, build_av, reference, vectors, write_sidecar
from .checkpoints.sidecars import override

D, K = 64, 3
TEXTS = ["One.", "Another text."]


@pytest.fixture
def pair(tmp_path: Path, pair_dirs) -> Path:
    """`av/` and `ar/` of a llama pair, to be changed."""
    for source, name in zip(pair_dirs("llama", "replace"), ("av", "ar"), strict=True):
        shutil.copytree(source, tmp_path / "nla" / name)
    return tmp_path / "nla"


def change(root: Path, overrides, *halves: str) -> None:
    for half in halves or ("av", "ar"):
        write_sidecar(root / half, override(reference.read_sidecar(root / half), overrides))


def tokens(nla: NLA, vectors_ND: torch.Tensor) -> list[list[int]]:
    return [list(e.token_ids) for e in nla.explain(vectors_ND, max_new_tokens=6, score=False)]


# --- a mean that is subtracted --------------------------------------------------------------------


@pytest.fixture
def mean_D() -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(5)) * 3


def put_mean(root: Path, mean_D: torch.Tensor, name: str, key: str = "centre_mean") -> None:
    for half in ("av", "ar"):
        if name.endswith(".npy"):
            np.save(root / half / name, mean_D.double().numpy())
        else:
            save_file({"mean": mean_D}, root / half / name)
    change(root, {"extraction": {key: name}})


@pytest.mark.parametrize("name", ["centre_mean.npy", "center_mean.safetensors", "mu.npy"])
def test_a_centred_pair(pair: Path, mean_D: torch.Tensor, name: str) -> None:
    """Injected is x - mean; reconstructed is AR(text) + mean; compared are both without it."""
    plain = NLA.from_pretrained(pair)
    put_mean(pair, mean_D, name, "center_mean" if name.startswith("center") else "centre_mean")
    nla = NLA.from_pretrained(pair)
    assert (nla.spec.centre_mean, nla.spec.origins["centre_mean"]) == (name, "sidecar")
    x_ND = vectors()[:3] + mean_D
    at = nla.verbalizer.marker_position
    injected = nla.verbalizer.prompt_embeds(x_ND)[:, at].double()
    wanted = (x_ND - mean_D).double()
    wanted = wanted * 30.0 / wanted.norm(dim=-1, keepdim=True)
    assert torch.allclose(injected, wanted, rtol=1e-5, atol=1e-6)
    centred = (x_ND - mean_D).contiguous()
    assert tokens(nla, x_ND) == tokens(plain, centred)
    assert tokens(nla, x_ND) != tokens(plain, x_ND)
    got, raw = nla.reconstruct(TEXTS), plain.reconstruct(TEXTS)
    assert torch.equal(got, raw + mean_D)
    scores = nla.score(TEXTS, x_ND[:2])
    by_hand = reference.cos(raw.double(), centred[:2].double())
    assert torch.allclose(scores.cos.double(), by_hand, atol=1e-5)
    explained = nla.explain(x_ND, max_new_tokens=6)
    again = plain.explain(centred, max_new_tokens=6)
    assert [e.cos for e in explained] == pytest.approx([e.cos for e in again], abs=1e-5)
    assert explained[0].norm == pytest.approx(float(x_ND[0].norm()))
    # The mean cancels in a difference.
    assert torch.allclose(
        nla.steering_vector(*TEXTS), plain.steering_vector(*TEXTS), rtol=0, atol=1e-5
    )


def test_under_norm_matched_add(tmp_path: Path, mean_D: torch.Tensor) -> None:
    root = tmp_path / "nla"
    rule = {"extraction": {"injection_rule": "norm_matched_add"}}
    build_av(root / "av", "llama", injection="norm_matched_add", sidecar_overrides=rule)
    build_ar(root / "ar", "llama")
    plain = NLA.from_pretrained(root)
    put_mean(root, mean_D, "centre_mean.npy")
    x_ND = vectors()[:2] + mean_D
    assert tokens(NLA.from_pretrained(root), x_ND) == tokens(plain, x_ND - mean_D)


def test_a_vector_that_is_the_mean(pair: Path, mean_D: torch.Tensor) -> None:
    put_mean(pair, mean_D, "centre_mean.npy")
    nla = NLA.from_pretrained(pair)
    with pytest.raises(NLAError, match=r"the mean that this NLA subtracts"):
        nla.explain(mean_D)


@pytest.mark.parametrize("name", ["centre_mean.npy", "center_mean.safetensors"])
def test_a_mean_that_no_sidecar_speaks_of(pair: Path, mean_D: torch.Tensor, name: str) -> None:
    put_mean(pair, mean_D, name)
    change(pair, {"extraction": {"centre_mean": ABSENT}})
    with pytest.raises(NLAError, match=rf"av/{name} lies there.*extraction: {{centre_mean: {name}"):
        NLA.from_pretrained(pair)


def test_means_that_are_none(pair: Path, mean_D: torch.Tensor) -> None:
    change(pair, {"extraction": {"centre_mean": "gone.npy"}})
    with pytest.raises(NLAError, match=r"names gone.npy \(extraction.centre_mean\): it is not"):
        NLA.from_pretrained(pair)
    for name in ("../mean.npy", "/etc/passwd", "mean.pkl", "a/b.npy"):
        change(pair, {"extraction": {"centre_mean": name}})
        with pytest.raises(NLAError, match=r"centre_mean is .*beside the sidecar"):
            NLA.from_pretrained(pair)
    put_mean(pair, mean_D, "centre_mean.npy")
    change(pair, {"extraction": {"centre_mean": ABSENT}}, "ar")
    (pair / "ar" / "centre_mean.npy").unlink()
    with pytest.raises(NLAError, match=r"contradictory centre_mean"):
        NLA.from_pretrained(pair)


@pytest.mark.parametrize(
    ("array", "names"),
    [
        (np.zeros(D - 1), r"holds \[\[63\]\]; expected one vector \[64\]"),
        (np.zeros((1, D)), r"expected one vector"),
        (np.full(D, np.nan), "holds NaN or infinity"),
        (np.array([object()] * D), "cannot be read: ValueError"),
        (np.zeros(200_000), "too many for a vector of 64"),
    ],
)
def test_files_that_hold_no_mean(pair: Path, array: np.ndarray, names: str) -> None:
    for half in ("av", "ar"):
        np.save(pair / half / "mean.npy", array, allow_pickle=True)
    change(pair, {"extraction": {"centre_mean": "mean.npy"}})
    with pytest.raises(NLAError, match=names):
        NLA.from_pretrained(pair)


def test_two_different_means(pair: Path, mean_D: torch.Tensor) -> None:
    put_mean(pair, mean_D, "mean.npy")
    np.save(pair / "ar" / "mean.npy", mean_D.numpy() + 1)
    with pytest.raises(NLAError, match="hold different vectors"):
        NLA.from_pretrained(pair)


# --- a reconstructor that is cut elsewhere --------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 6])
def test_a_reconstructor_of_another_depth(tmp_path: Path, blocks: int) -> None:
    build_av(tmp_path / "av", "llama")
    ar = build_ar(tmp_path / "ar", "llama", layer=blocks - 1)
    by_hand = reference.AR(ar)  # before its sidecar says otherwise
    said = {"extraction_layer_index": K, "ar": {"num_hidden_layers": K}}
    said["ar"]["extraction_layer_index"] = K
    write_sidecar(ar, override(reference.read_sidecar(ar), said))
    with pytest.raises(
        NLAError,
        match=r"contradictory layer: .*num_hidden_layers - 1\) says \d.*ar: \{n_blocks: N\}",
    ):
        NLA.from_pretrained(tmp_path)
    said["ar"]["n_blocks"] = blocks
    write_sidecar(ar, override(reference.read_sidecar(ar), said))
    nla = NLA.from_pretrained(tmp_path)
    assert (nla.spec.layer, nla.spec.ar_blocks) == (K, blocks)
    wanted = torch.stack([by_hand.vector(text) for text in TEXTS]).double()
    got = nla.reconstruct(TEXTS).double()
    assert float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()) < 2e-5


def test_a_depth_that_its_config_does_not_have(pair: Path) -> None:
    change(pair, {"ar": {"n_blocks": 9}}, "ar")
    with pytest.raises(
        NLAError, match=r"contradictory number of the reconstructor's blocks.*says 4"
    ):
        NLA.from_pretrained(pair)


# --- a layer in the prompt ------------------------------------------------------------------------


def test_one_verbalizer_for_all_layers(tmp_path: Path) -> None:
    """`{layer}` becomes K: the sidecar's, or the caller's."""
    template = "Layer {layer}: <concept>{injection_char}</concept>"
    changes = {
        "prompt_templates": {"av": template},
        "extraction_layer_index": ABSENT,
        "extraction": {"layers": [1, 3, 4]},
    }
    av = build_av(tmp_path / "av", "llama", sidecar_overrides=changes)
    with pytest.raises(
        NLAError, match=r"trained on layers \[1, 3, 4\].*layer is None; pass layer="
    ):
        NLA.from_pretrained(av=av)
    with pytest.raises(NLAError, match=r"layer is 2; pass layer= with one of them"):
        NLA.from_pretrained(av=av, layer=2)
    for layer in (1, 4):
        nla = NLA.from_pretrained(av=av, layer=layer)
        text = nla.verbalizer.tokenizer.decode(nla.verbalizer.prompt_ids)
        assert f"Layer {layer}: <concept>" in text
        assert nla.spec.hook_name == f"blocks.{layer}.hook_resid_post"
    assert nla.spec.av_template == template
    again = NLA.from_pretrained(nla.save_pretrained(tmp_path / "out"))
    assert again.verbalizer.prompt_ids == nla.verbalizer.prompt_ids


@pytest.mark.parametrize("place", ["{depth}", "{layer_frac}", "{hook}", "{norm}", "{explanation}"])
def test_places_nobody_knows(tmp_path: Path, place: str) -> None:
    template = f"At {place}: <concept>{{injection_char}}</concept>"
    changes = {"prompt_templates": {"av": template}}
    av = build_av(tmp_path / "av", "llama", sidecar_overrides=changes)
    with pytest.raises(NLAError, match=rf"a place for \['{place[1:-1]}'\].*known are"):
        NLA.from_pretrained(av=av)


def test_a_layer_in_the_prompt_and_none_known(tmp_path: Path) -> None:
    changes = {
        "prompt_templates": {"av": "{layer} <concept>{injection_char}</concept>"},
        "extraction_layer_index": ABSENT,
    }
    av = build_av(tmp_path / "av", "llama", sidecar_overrides=changes)
    with pytest.raises(
        NLAError, match=r"a place for \{layer\}, and no layer is known; pass layer="
    ):
        NLA.from_pretrained(av=av)


# --- keys that would change the arithmetic --------------------------------------------------------

REFUSED = {
    "extraction.normalize": {"extraction": {"normalize": True}},
    "extraction.norm": {"extraction": {"norm": "rms"}},
    "extraction.whiten": {"extraction": {"whiten": "zca"}},
    "extraction.whitening_matrix": {"extraction": {"whitening_matrix": "w.npy"}},
    "extraction.pca_components": {"extraction": {"pca_components": 128}},
    "extraction.scale_mode": {"extraction": {"scale_mode": "per_token"}},
    "extraction.activation_scale": {"extraction": {"activation_scale": 0.1}},
    "extraction.subtract_mean": {"extraction": {"subtract_mean": True}},
    "extraction.center": {"extraction": {"center": True}},
    "extraction.mean": {"extraction": {"mean": [0.0, 1.0]}},
    "extraction.standardize": {"extraction": {"standardize": "yes"}},
    "extraction.clip": {"extraction": {"clip": 10}},
    "extraction.preprocessing": {"extraction": {"preprocessing": {"kind": "layernorm"}}},
    "extraction.rotation": {"extraction": {"rotation": "hadamard"}},
    "extraction.projection": {"extraction": {"projection": "p.safetensors"}},
    "normalization": {"normalization": "layernorm"},
    "transform": {"transform": "log"},
    "injection_layer": {"injection_layer": 2},
    "extraction.injection_position": {"extraction": {"injection_position": "all"}},
    "tokens.injection_repeat": {"tokens": {"injection_repeat": 3}},
    "ar.output_scale": {"ar": {"num_hidden_layers": K, "output_scale": 2.0}},
    "ar.pooling": {"ar": {"num_hidden_layers": K, "pooling": "mean"}},
    "av.steering_coefficient": {"av": {"steering_coefficient": 2.0}},
}
HARMLESS = {
    "nothing is done": {
        "extraction": {
            "norm": "none", "normalize": False, "whiten": None, "scale_mode": "raw", "center": 0,
            "pca": [], "preprocessing": {}, "activation_scale": 1.0,
        }
    },
    "of the training": {
        "loss_scale": 1024, "clip_grad_norm": 1.0, "kl_coeff": 0.02, "normalize_advantages": True,
        "lora_scaling": 2.0, "train": {"normalize": True}, "optimizer_bias_correction": True,
    },
    "of other things": {
        "transformers_version": "5.23.0", "wandb_project": "nla", "community": "x",
        "value_head_bias": True, "future": {"normalize": True}, "meaning": "words",
    },
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_would_change_the_arithmetic(pair: Path, key: str) -> None:
    change(pair, REFUSED[key], "av")
    with pytest.raises(NLAError, match=rf"av/nla_meta.yaml: {key} is .* would change what is comp"):
        read_spec(pair)


@pytest.mark.parametrize("name", HARMLESS)
def test_keys_that_change_nothing(pair: Path, name: str) -> None:
    before = read_spec(pair)
    change(pair, HARMLESS[name])
    assert read_spec(pair) == before


# --- two definitions of var_nrm -------------------------------------------------------------------


def test_which_var_nrm(pair: Path) -> None:
    assert read_spec(pair).var_nrm_definition == "around_mean"
    change(pair, {"extraction": {"var_nrm": 0.9, "var_nrm_definition": "around_unit_mean"}})
    spec = read_spec(pair)
    assert ("var_nrm_definition", "'around_unit_mean'", "sidecar") in spec.rows()
    change(pair, {"extraction": {"var_nrm_definition": "of the run"}})
    with pytest.raises(NLAError, match=r"var_nrm_definition is 'of the run'; known are"):
        read_spec(pair)


def test_the_two_definitions_differ() -> None:
    """Around the mean 1 - m^2, around the mean at full norm 2 (1 - m), m the mean's own norm."""
    from nla_lens.results.metrics import mse_nrm, var_nrm

    x_ND = torch.randn(500, D, generator=torch.Generator().manual_seed(0)) + 1.0
    unit = x_ND / x_ND.norm(dim=-1, keepdim=True)
    m = float(unit.mean(0).norm())
    assert var_nrm(x_ND, D**0.5) == pytest.approx(1 - m * m, abs=1e-5)
    guess_ND = unit.mean(0).expand_as(x_ND)
    assert float(mse_nrm(guess_ND, x_ND, D**0.5).mean()) == pytest.approx(2 * (1 - m), abs=1e-5)


# --- the known releases, each as a small copy of its layout ---------------------------------------

FAMILY = {"Qwen/Qwen2.5": "qwen2", "google/gemma-3": "gemma3", "meta-llama": "llama"}


@pytest.mark.parametrize("release", KNOWN_RELEASES, ids=lambda release: release.stem)
def test_a_small_copy_of_each_release(tmp_path: Path, release) -> None:
    family = next(
        (f for name, f in FAMILY.items() if release.source_model.startswith(name)), "qwen3"
    )
    layer, av_name = release.layer, release.av.split("/")[1]
    deep = {"n_blocks": 3}
    changes = {"extraction": {"injection_scale": release.injection_scale}}
    if release.injection == "norm_matched_add":
        changes = None
    av = build_av(
        tmp_path / av_name, family, layer=layer, injection=release.injection,
        base=release.source_model, sidecar_overrides=changes, **deep,
    )  # fmt: skip
    with pytest.warns(NLAWarning, match="only its injection rule is taken over"):
        spec = read_spec(av)
    assert (spec.injection, spec.layer, spec.source_model) == (
        release.injection, layer, release.source_model,
    )  # fmt: skip
    assert spec.injection_scale == release.injection_scale and spec.var_nrm is None
    # At its own width every number of the table holds.
    meta = {"extraction": {"d_model": release.d_model}}
    if reference.read_sidecar(av)["kind"] == "nla_model":
        meta = {"d_model": release.d_model}
    write_sidecar(av, override(reference.read_sidecar(av), meta))
    config = json.loads((av / "config.json").read_text())
    config.get("text_config", config)["hidden_size"] = release.d_model
    (av / "config.json").write_text(json.dumps(config))
    spec = read_spec(av)
    assert (spec.d_model, spec.var_nrm) == (release.d_model, release.var_nrm)
    assert spec.origins["var_nrm"] == "known release"
    assert read_sidecar(av).var_nrm is None
