"""Dictionaries that say two things, or more than is computed: the right numbers, or a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_lens import NLA, NLAError
from nla_lens.adapters.dictionaries import features as features_module
from nla_lens.adapters.dictionaries.latents import Latents
from nla_lens.adapters.sae import decompose, explain_features, load_dictionary

from . import dictionary_files as files

X = torch.randn(6, files.D, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


def change(path: Path, **tensors: torch.Tensor) -> None:
    """Puts tensors into a file of any kind, in the place of those of their name."""
    if path.suffix == ".safetensors":
        held = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(held | tensors, path)
    else:
        torch.save(torch.load(path) | tensors, path)


def say(path: Path, **values: Any) -> None:
    config = json.loads(path.read_text())
    config.get("trainer", config).update(values)
    path.write_text(json.dumps(config))


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["false", "true", "", [], 2, {}])
@pytest.mark.parametrize(
    ("make", "name", "key"),
    [
        (files.saelens, "cfg.json", "apply_b_dec_to_input"),
        (lambda r: files.saelens(r, "topk"), "cfg.json", "rescale_acts_by_decoder_norm"),
        (files.llama_scope, "hyperparams.json", "sparsity_include_decoder_norm"),
        (files.llama_scope, "hyperparams.json", "apply_decoder_bias_to_pre_encoder"),
    ],
)
def test_a_text_is_no_truth_value(
    make: Callable, name: str, key: str, value: Any, tmp_path: Path
) -> None:
    """ "false" counted as true: other latents, and no word of it."""
    case = make(tmp_path)
    say(case.source / name, **{key: value})
    with pytest.raises(NLAError, match=f"{key}=.*true or false") as raised:
        load_dictionary(case.source)
    assert str(case.source) in str(raised.value)


@pytest.mark.parametrize(("value", "applied"), [(None, True), (0, False), (1, True)])
def test_null_is_what_is_usual(value: Any, applied: bool, tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    say(case.source / "cfg.json", apply_b_dec_to_input=value)
    case = files.Case(**{**vars(case), "subtract": applied})
    np.testing.assert_allclose(load_dictionary(case.source).encode(X), case.encode(X), atol=1e-5)


KINDS = {
    "AutoEncoder": ("AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"),
    "BatchTopKSAE": ("AutoEncoder", "AutoEncoderNew", "MatryoshkaBatchTopKSAE"),
    "MatryoshkaBatchTopKSAE": ("AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"),
    "JumpReluAutoEncoder": ("AutoEncoder", "MatryoshkaBatchTopKSAE", "GatedAutoEncoder"),
    "GatedAutoEncoder": ("AutoEncoder", "JumpReluAutoEncoder"),
}


@pytest.mark.parametrize(("tensors", "said"), [(k, v) for k, vs in KINDS.items() for v in vs])
@pytest.mark.parametrize("by_caller", [False, True])
def test_the_config_of_another_class(
    tensors: str, said: str, by_caller: bool, tmp_path: Path
) -> None:
    """Eleven of these were read, each with the other class's latents."""
    case = files.dictionary_learning(tmp_path, tensors)
    if by_caller:
        (case.source / "config.json").unlink()
    else:
        say(case.source / "config.json", dict_class=said)
    with pytest.raises(NLAError, match=f"{said}|threshold"):
        load_dictionary(case.source, format=said if by_caller else None)


@pytest.mark.parametrize(
    ("config", "stored", "named"),
    [(7, 5, "k=5.*k=7"), (None, 5.5, r"k=5\.5"), (None, float("inf"), "k=inf"), (None, -3, "k=-3")],
)
def test_weights_that_hold_another_k(
    config: Any, stored: float, named: str, tmp_path: Path
) -> None:
    case = files.dictionary_learning(tmp_path, "AutoEncoderTopK")
    say(case.source / "config.json", k=config)
    change(case.source / "ae.pt", k=torch.tensor(stored))
    with pytest.raises(NLAError, match=named) as raised:
        load_dictionary(case.source)
    assert str(case.source) in str(raised.value)


# --- tensors --------------------------------------------------------------------------------------

WEIGHTS = {
    "saelens": (files.saelens, "sae_weights.safetensors"),
    "jumprelu": (lambda root: files.saelens(root, "jumprelu"), "sae_weights.safetensors"),
    "gemma-scope": (files.gemma_scope, "params.safetensors"),
    "sparsify": (files.sparsify, "sae.safetensors"),
    "topk": (lambda root: files.dictionary_learning(root, "AutoEncoderTopK"), "ae.pt"),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("more", "tensor"),
    [
        ("W_skip", torch.ones(files.D, files.D)),
        ("W_gate", torch.zeros(files.D, files.F)),
        ("input_scale", torch.full((files.D,), 3.0)),
        ("mean", torch.full((files.D,), 3.0)),
        ("norm_factor", torch.tensor(0.1)),
        ("b_dec_out", torch.ones(files.D)),
    ],
)
def test_a_tensor_that_nothing_is_computed_with(
    name: str, more: str, tensor: torch.Tensor, tmp_path: Path
) -> None:
    make, file = WEIGHTS[name]
    case = make(tmp_path)
    change(case.source / file, **{more: tensor})
    with pytest.raises(NLAError, match=f"{more}|skip connection") as raised:
        load_dictionary(case.source)
    assert str(case.source) in str(raised.value)


@pytest.mark.parametrize("name", WEIGHTS)
def test_counters_and_what_does_nothing_are_left_alone(name: str, tmp_path: Path) -> None:
    make, file = WEIGHTS[name]
    case = make(tmp_path)
    counters = {"stats_last_nonzero": torch.ones(files.F), "n_steps_bias": torch.tensor(3)}
    change(
        case.source / file,
        **counters,
        input_scale=torch.ones(1),
        mean=torch.zeros(files.D),
        log_feature_sparsity=torch.ones(files.F),
    )
    np.testing.assert_allclose(load_dictionary(case.source).encode(X), case.encode(X), atol=1e-5)


@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "b_enc", "threshold"])
def test_float64_beyond_float32_is_named(tensor: str, tmp_path: Path) -> None:
    """It became infinity without a word."""
    case = files.saelens(tmp_path, "jumprelu")
    large = getattr(case.weights, tensor).double()
    large.view(-1)[3] = -1e300
    change(case.source / "sae_weights.safetensors", **{tensor: large})
    with pytest.raises(NLAError, match=rf"{tensor} in .*-1e\+300"):
        load_dictionary(case.source)


def test_a_gate_whose_exponential_overflows_is_named(tmp_path: Path) -> None:
    case = files.saelens(tmp_path, "gated")
    change(case.source / "sae_weights.safetensors", r_mag=torch.full((files.F,), 200.0))
    with pytest.raises(NLAError, match=r"r_mag in .*200"):
        load_dictionary(case.source)


# --- the verbs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        np.ones((2, files.D)),
        None,
        torch.tensor(1.0),
        torch.ones(2, 3),
        torch.ones(2, files.D, dtype=torch.complex64),
        torch.ones(2, files.D, device="meta"),
        torch.full((2, files.D), float("nan")),
        torch.full((2, files.D), 1e300, dtype=torch.float64),
    ],
)
def test_what_is_no_vector_is_named(bad: Any, tmp_path: Path) -> None:
    sae = load_dictionary(files.saelens(tmp_path).source)
    for verb in (sae.encode, sae.decode, sae):
        with pytest.raises(NLAError, match=r"vectors|latents"):
            verb(bad)


def test_a_row_of_zeros_adds_nothing(tmp_path: Path) -> None:
    case = files.saelens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    rows = case.weights.W_dec.clone()
    rows[3] = 0
    change(case.source / "sae_weights.safetensors", W_dec=rows)
    found = load_dictionary(case.source).decode(torch.ones(1, files.F))
    others = [i for i in range(files.F) if i != 3]
    due = (rows[others].double() / rows[others].double().norm(dim=-1, keepdim=True)).sum(0)
    np.testing.assert_allclose(found[0], due + case.weights.b_dec.double(), rtol=1e-5)


@pytest.mark.parametrize("bad", [3.0, "7", b"7", slice(0, 2), object(), None])
def test_what_names_no_latent(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(NLAError, match="0 to 39"):
        load_dictionary(files.saelens(tmp_path).source).rows(bad)


# --- objects --------------------------------------------------------------------------------------


class Own:
    """An object with the three names: 20 latents of width 128."""

    W_dec = torch.randn(20, 128, generator=torch.Generator().manual_seed(3)) / 8

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)

    def encode(self, x: torch.Tensor) -> Any:
        return torch.relu(x.float() @ Own.W_dec.T)

    def decode(self, latents: torch.Tensor) -> Any:
        return latents @ Own.W_dec


RESIDUAL = 5 * torch.randn(128, generator=torch.Generator().manual_seed(9))
QUIET = {"explain_latents": False, "explain_errors": False, "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("sae", "named"),
    [
        (Own(W_dec=Own.W_dec.to(torch.int8)), "int8"),
        (Own(W_dec=Own.W_dec.to(torch.float8_e4m3fn)), "float8"),
        (Own(W_dec=Own.W_dec.to(torch.complex64)), "complex64"),
        (Own(W_dec=Own.W_dec.to("meta")), "meta"),
        (Own(W_dec=Own.W_dec.to_sparse()), "sparse"),
        (Own(cfg=SimpleNamespace(transcode=True)), "transcoder"),
        (Own(cfg={"transcode": True}), "transcoder"),
        (Own(encode=lambda x: (x @ Own.W_dec.T, {})), "encode of this Own gave tuple"),
        (Own(encode=lambda x: (x @ Own.W_dec.T).numpy()), "encode .*ndarray"),
        (Own(encode=lambda x: (x @ Own.W_dec.T)[:, :5], decode=lambda f: f), "encode .*5"),
        (Own(encode=lambda x: x @ Own.W_dec.T * float("nan")), "encode .*NaN"),
        (Own(decode=lambda f: None), "decode .*NoneType"),
        (Own(decode=lambda f: torch.zeros(1, 3)), r"decode .*\[1, 3\]"),
        (Own(decode=lambda f: f @ Own.W_dec / 0.0), "decode .*NaN or infinity"),
    ],
)
def test_objects_that_are_no_dictionaries(tiny: NLA, sae: Own, named: str) -> None:
    with pytest.raises(NLAError, match=named):
        decompose(tiny, sae, RESIDUAL, **QUIET)


def test_vectors_that_half_precision_does_not_hold(tiny: NLA) -> None:
    """They became infinity, and the latents NaN."""
    half = Own(W_dec=Own.W_dec.half(), encode=lambda x: torch.relu(x @ Own.W_dec.half().T))
    with pytest.raises(NLAError, match=r"more than torch\.float16"):
        decompose(tiny, half, 1e5 * RESIDUAL, **QUIET)


def test_the_coder_of_sparsify_as_it_is(tiny: NLA) -> None:
    """Its verbs speak of the k largest: `encode` gives three tensors, `decode` takes two."""

    class EncoderOutput(NamedTuple):
        top_acts: torch.Tensor
        top_indices: torch.Tensor
        pre_acts: torch.Tensor

    class SparseCoder(Own):
        def encode(self, x: torch.Tensor) -> EncoderOutput:
            pre = torch.relu(x @ self.W_dec.T)
            return EncoderOutput(*pre.topk(3, sorted=False), pre)

        def decode(self, top_acts: torch.Tensor, top_indices: torch.Tensor) -> torch.Tensor:
            return (top_acts[..., None] * self.W_dec[top_indices]).sum(-2)

    x_ND = torch.stack([RESIDUAL, -RESIDUAL])
    pre_NF = np.maximum(x_ND.double().numpy() @ Own.W_dec.double().numpy().T, 0)
    due_NF = np.where(pre_NF >= np.sort(pre_NF)[:, [-3]], pre_NF, 0)
    sae = Latents(SparseCoder())
    np.testing.assert_allclose(sae.encode(x_ND), due_NF, rtol=1e-5)
    np.testing.assert_allclose(
        sae.reconstruct(x_ND), due_NF @ Own.W_dec.double().numpy(), rtol=1e-4, atol=1e-5
    )
    assert decompose(tiny, SparseCoder(), RESIDUAL, **QUIET).l0 == 3


@pytest.mark.parametrize(
    ("hook_name", "flags"),
    [
        ("model.layers.2", ()),
        ("transformer.h.2", ()),
        ("gpt_neox.layers.2", ()),
        ("model.layers.2.output", ()),
        ("model.layers.3.input", ()),
        ("model.layers.3", ("other_layer",)),
        ("model.layers.2.mlp", None),
        ("model.layers.2.input_layernorm", None),
    ],
)
def test_places_as_other_frameworks_call_them(
    tiny: NLA, hook_name: str, flags: tuple[str, ...] | None
) -> None:
    """sae-lens names a transformers model's modules; they are in the stream where blocks end."""
    if flags is not None:
        assert Latents(Own(hook_name=hook_name)).place_flags(tiny) == flags
        return
    with pytest.raises(NLAError, match="not in the residual stream"):
        Latents(Own(hook_name=hook_name)).place_flags(tiny)


@pytest.mark.parametrize(
    "labels", [{"3": "x"}, {3: None}, {3: 5}, {99: "x"}, {True: "x"}, "abc", 5, [(3, "x")]]
)
def test_labels_by_anything_but_a_latent(tiny: NLA, labels: Any) -> None:
    """From JSON they come by text, and none of them was found."""
    with pytest.raises(NLAError, match="labels"):
        decompose(tiny, Own(), RESIDUAL, labels=labels, **QUIET)


def test_dead_latents_are_named_before_the_first_is_explained(
    tiny: NLA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thousands, those explained before a dead one were lost with it."""
    monkeypatch.setattr(features_module, "_ROWS_AT_ONCE", 2)
    monkeypatch.setattr(NLA, "explain_iter", lambda *args, **options: pytest.fail("it ran"))
    rows = Own.W_dec.clone()
    rows[[7, 12, 19]] = 0
    with pytest.raises(NLAError, match=r"latent 7 \(and 2 more: \[12, 19\]\).*leave it out"):
        explain_features(tiny, Own(W_dec=rows), None)
