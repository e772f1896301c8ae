"""Texts to vectors: the prompt, `W @ resid_K[last]`, padding, layouts of AR checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nla_lens import NLA, NLAError
from nla_lens.halves.reconstructor import load_head

from .checkpoints import (
    EXPLANATIONS,
    FAMILIES,
    build_ar,
    build_av,
    build_source,
    reference,
    vectors,
)
from .checkpoints.builders import AR_SEED
from .scripted import ScriptedReconstructor, scripted

LAYER = 3
TEXTS = [
    *EXPLANATIONS,
    "",
    " ",
    "\n\nlines\r\n\t",
    "{explanation} {injection_char} {0} %s {{}}",
    "<|endoftext|><|im_start|>user<|eot_id|><bos><eos></text> <summary>",
    "㈎㈜㎡",
    "é 中文 🙂 \u2028 \x00 \x1b[31m",
    "long " * 60,
]
each_family = pytest.mark.parametrize("family", FAMILIES)


def relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.fixture(scope="module")
def expected_ar(pair_dirs):
    from functools import cache

    return cache(lambda family: reference.AR(pair_dirs(family, "replace")[1]))


# --- the prompt ---------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t)[:24])
def test_prompt_ids(load_pair, expected_ar, family: str, text: str) -> None:
    ids = load_pair(family, "replace").reconstructor.prompt_ids(text)
    assert ids == expected_ar(family).prompt_ids(text)


@each_family
def test_one_bos_and_none_too_many(load_pair, family: str) -> None:
    reconstructor = load_pair(family, "replace").reconstructor
    ids, bos = reconstructor.prompt_ids("a text"), reconstructor.tokenizer.bos_token_id
    if family in ("llama", "gemma3_text", "gemma3"):
        assert [ids[0], ids.count(bos)] == [bos, 1]
    else:
        assert bos is None


@each_family
def test_a_text_stands_in_the_prompt_as_it_is(load_pair, family: str) -> None:
    reconstructor = load_pair(family, "replace").reconstructor
    for text in ("  two blanks around  ", "{explanation}", "{injection_char} {0} {x.y}"):
        ids = reconstructor.prompt_ids(text)
        rendered = reconstructor.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert rendered.lstrip() == f"Summary of the following text: <text>{text}</text> <summary>"


def test_an_explanation_reaches_the_reconstructor_as_it_is(nla: NLA) -> None:
    """Braces, tags of other kinds and special tokens between the explanation tags."""
    said = "a {explanation} and {x}\n<|eot_id|> </text> <summary>  end"
    mine = scripted(nla, [f"<explanation>{said}</explanation>"], resid_ND=torch.ones(1, 64))
    e = mine.explain(torch.ones(64))
    assert e.text == said
    assert mine.reconstructor.engine.prompts == [nla.reconstructor.prompt_ids(said)]


# --- the vector ---------------------------------------------------------------------------------


@each_family
def test_raw_vectors(load_pair, expected_ar, family: str) -> None:
    got = load_pair(family, "replace").reconstruct(TEXTS)
    assert got.dtype == torch.float32 and got.shape == (len(TEXTS), 64)
    assert got.device.type == "cpu" and not got.requires_grad
    assert relative(got, expected_ar(family).vectors(TEXTS)) < 2e-5


@each_family
def test_ar_is_w_times_hidden_states_k_plus_1(load_pair, pair_dirs, tmp_path, family: str) -> None:
    """Against the whole source model of the same weights, with its norm, lm_head and all blocks."""
    source = build_source(tmp_path, family, seed=AR_SEED)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weight = load_file(pair_dirs(family, "replace")[1] / "value_head.safetensors")["weight"]
    nla = load_pair(family, "replace")
    for text in TEXTS[:4]:
        ids = torch.tensor([nla.reconstructor.prompt_ids(text)])
        with torch.no_grad():
            hidden = whole(ids, output_hidden_states=True).hidden_states
        last_D = hidden[LAYER + 1][0, -1]
        assert relative(nla.reconstruct([text]), (weight @ last_D)[None]) < 1e-6
        # One block off, either way, is far off.
        for other in (LAYER, LAYER + 2):
            assert relative(nla.reconstruct([text]), (weight @ hidden[other][0, -1])[None]) > 0.1


@each_family
def test_a_batch_is_padded_on_the_right(
    load_pair, expected_ar, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """All lengths in one batch."""
    monkeypatch.setattr("nla_lens.models.block_reader.WIDE", 0)
    monkeypatch.setattr(
        "nla_lens.models.block_reader.padded_batches",
        lambda lengths, *_: [list(range(len(lengths)))[::-1]],
    )
    got = load_pair(family, "replace").reconstruct(TEXTS)
    assert relative(got, expected_ar(family).vectors(TEXTS)) < 2e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_the_tokenizers_padding_side_does_not_matter(
    tmp_path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr("nla_lens.models.block_reader.WIDE", 0)
    monkeypatch.setattr(
        "nla_lens.models.block_reader.padded_batches",
        lambda lengths, *_: [list(range(len(lengths)))],
    )
    ar = build_ar(tmp_path / "ar", family, tokenizer={"padding_side": "left"})
    nla = NLA.from_pretrained(av=build_av(tmp_path / "av", family), ar=ar)
    assert nla.reconstructor.tokenizer.padding_side == "left"
    assert relative(nla.reconstruct(TEXTS), reference.AR(ar).vectors(TEXTS)) < 2e-5


@each_family
def test_scores(load_pair, expected_ar, family: str) -> None:
    texts, gold = TEXTS[:6], vectors()
    scores = load_pair(family, "replace").score(texts, gold)
    predicted = expected_ar(family).vectors(texts).double()
    torch.testing.assert_close(
        scores.cos.double(), reference.cos(predicted, gold.double()), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        scores.mse_nrm.double(), reference.mse_nrm(predicted, gold.double()), rtol=0, atol=4e-5
    )
    assert scores.fve_nrm is None


def test_fve_uses_the_sidecars_var_nrm(tmp_path) -> None:
    ar = build_ar(tmp_path / "ar", "qwen2", sidecar_overrides={"extraction": {"var_nrm": 0.25}})
    nla = NLA.from_pretrained(av=build_av(tmp_path / "av", "qwen2"), ar=ar)
    predicted = reference.AR(ar).vectors(TEXTS[:6]).double()
    scores = nla.score(TEXTS[:6], vectors())
    wanted = reference.fve_nrm(predicted, vectors().double(), 0.25)
    torch.testing.assert_close(scores.fve_nrm.double(), wanted, rtol=1e-4, atol=1e-4)
    e = nla.explain(vectors()[0], max_new_tokens=4)
    assert e.fve_nrm == pytest.approx(1 - e.mse_nrm / 0.25, rel=1e-5)


def test_no_texts_no_vectors(nla: NLA) -> None:
    assert nla.reconstruct([]).shape == (0, 64)
    assert nla.reconstruct(()).dtype == torch.float32


def test_any_iterable_of_texts(nla: NLA) -> None:
    wanted = nla.reconstruct(["a", "b"])
    assert torch.equal(nla.reconstruct(text for text in ("a", "b")), wanted)
    assert torch.equal(nla.reconstruct(("a", "b")), wanted)


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ("one text", "list of strings.*'one text'"),
        (5, "list of strings"),
        (None, "list of strings"),
        (["a", None], r"texts\[1\] is a NoneType"),
        ([b"a"], r"texts\[0\] is a bytes"),
        (["a \ud800 b"], "surrogate"),
    ],
)
def test_texts_that_are_refused(nla: NLA, texts, names: str) -> None:
    with pytest.raises(NLAError, match=names):
        nla.reconstruct(texts)


def test_without_a_reconstructor(pair_dirs) -> None:
    alone = NLA.from_pretrained(av=pair_dirs("qwen2", "replace")[0])
    for call in (
        lambda: alone.reconstruct(["a"]),
        lambda: alone.decode(["a"]),
        lambda: alone.score(["a"], torch.ones(1, 64)),
        lambda: alone.steering_vector("a", "b"),
        lambda: alone(torch.ones(64)),
    ):
        with pytest.raises(NLAError, match="no reconstructor; load one with ar="):
            call()


# --- layouts --------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize(
    "layout",
    [
        {"megatron_dummies": True},
        {"real_final_norm": True},
        {"head_bias": True},
        {"layout": "sharded"},
        {"layout": "stale_index"},
        {"style": "v5"},
        {"head_dtype": torch.bfloat16},
        {"sidecar_kind": "nla_dataset", "schema": 1, "spelling": "actor"},
    ],
    ids=lambda layout: "-".join(map(str, next(iter(layout.items())))),
)
def test_layouts(pair_dirs, tmp_path, family: str, layout: dict) -> None:
    ar = build_ar(tmp_path, family, **layout)
    nla = NLA.from_pretrained(av=pair_dirs(family, "replace")[0], ar=ar)
    texts = TEXTS[:4]
    assert relative(nla.reconstruct(texts), reference.AR(ar).vectors(texts)) < 2e-5


def test_a_final_norm_would_be_seen(pair_dirs, tmp_path) -> None:
    """With unit weights it leaves cos alone, so the raw vectors are what tells."""
    ar = build_ar(tmp_path, "qwen2", megatron_dummies=True)
    nla = NLA.from_pretrained(av=pair_dirs("qwen2", "replace")[0], ar=ar)
    wanted = reference.AR(ar).vectors(TEXTS[:3])
    normed = (
        torch.nn.functional.rms_norm(
            torch.stack([reference.AR(ar).hidden(t) for t in TEXTS[:3]]), (64,), eps=1e-6
        )
        @ load_file(ar / "value_head.safetensors")["weight"].T
    )
    assert float((reference.cos(normed, wanted) - 1).abs().max()) < 1e-5
    assert relative(normed, wanted) > 0.1
    assert relative(nla.reconstruct(TEXTS[:3]), wanted) < 2e-5


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(tmp_path, family: str, dtype: torch.dtype) -> None:
    av, ar = build_av(tmp_path / "av", family), build_ar(tmp_path / "ar", family)
    nla = NLA.from_pretrained(av=av, ar=ar, dtype=dtype)
    assert nla.reconstructor.engine.model.dtype == dtype
    assert nla.reconstructor.weight_DD.dtype == torch.float32
    wanted = reference.AR(ar).vectors(TEXTS[:6])
    assert float(reference.cos(nla.reconstruct(TEXTS[:6]), wanted).min()) > 0.95


# --- the value head -------------------------------------------------------------------------------


@pytest.fixture
def ar_dir(pair_dirs, tmp_path) -> Path:
    return Path(shutil.copytree(pair_dirs("qwen2", "replace")[1], tmp_path / "ar"))


def head(**tensors: Tensor):
    return lambda path: save_file(tensors, str(path))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


SQUARE = torch.eye(64)
BAD_HEADS = {
    "missing": (Path.unlink, "no value_head.safetensors in .*cannot be derived"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as safetensors"),
    "not safetensors": (lambda path: path.write_bytes(b"PK\3\4" * 40), "cannot be read as"),
    "truncated": (truncated, "cannot be read as safetensors"),
    "another name": (head(**{"value_head.weight": SQUARE}), "holds 'value_head.weight'; expected"),
    "one too many": (head(weight=SQUARE, scale=torch.ones(1)), "holds 'scale'; expected"),
    "no weight": (head(bias=torch.ones(64)), "no tensor named weight"),
    "nothing": (head(), "no tensor named weight"),
    "not square": (head(weight=torch.ones(64, 65)), r"weight is \[64, 65\], expected \[64, 64\]"),
    "another width": (head(weight=torch.eye(32)), r"weight is \[32, 32\]"),
    "flat": (head(weight=torch.ones(4096)), r"weight is \[4096\]"),
    "a matrix of biases": (
        head(weight=SQUARE, bias=torch.ones(64, 64)),
        r"bias is \[64, 64\], expected \[64\]",
    ),
    "NaN": (head(weight=SQUARE * torch.nan), "weight holds NaN or infinity"),
    "an infinite bias": (head(weight=SQUARE, bias=torch.full((64,), torch.inf)), "bias holds NaN"),
    "integers": (head(weight=SQUARE.long()), "weight is int64; expected floating point"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "no value_head.safetensors"),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_bad_value_heads(ar_dir: Path, pair_dirs, monkeypatch, name: str) -> None:
    damage, names = BAD_HEADS[name]
    damage(ar_dir / "value_head.safetensors")
    monkeypatch.setattr("nla_lens.halves.loading.load_reconstructor_engine", no_weights)
    monkeypatch.setattr("nla_lens.halves.loading.load_verbalizer_engine", no_weights)
    with pytest.raises(NLAError, match=names) as caught:
        NLA.from_pretrained(av=pair_dirs("qwen2", "replace")[0], ar=ar_dir)
    assert "value_head.safetensors" in str(caught.value).splitlines()[0]


def no_weights(*_: object) -> None:
    raise AssertionError("weights were read before the small files were checked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_head_of_any_float_dtype(ar_dir: Path, dtype: torch.dtype) -> None:
    from nla_lens.checkpoints.files import open_checkpoint

    save_file({"weight": (SQUARE * 0.5).to(dtype)}, str(ar_dir / "value_head.safetensors"))
    loaded = load_head(open_checkpoint(ar_dir), 64)
    assert loaded["weight"].dtype == torch.float32
    assert torch.equal(loaded["weight"], SQUARE * 0.5)


def test_the_suffix_of_the_prompt_is_checked(pair_dirs, tmp_path) -> None:
    ar = build_ar(tmp_path, "qwen2", sidecar_overrides={"tokens": {"critic_suffix_ids": [1, 2, 3]}})
    with pytest.raises(NLAError, match=r"prompt ends with \[.*sidecar says \[1, 2, 3\]"):
        NLA.from_pretrained(av=pair_dirs("qwen2", "replace")[0], ar=ar)


def test_texts_are_scored_in_the_order_they_come(nla: NLA) -> None:
    """Batches go by length; the answers do not."""
    texts = ["a " * n for n in (30, 1, 17, 3, 30, 8, 1)]
    together = nla.reconstruct(texts)
    for i, text in enumerate(texts):
        assert relative(together[i : i + 1], nla.reconstruct([text])) < 2e-5


def test_a_bias_is_added(tmp_path, pair_dirs) -> None:
    nla = NLA.from_pretrained(
        av=pair_dirs("qwen2", "replace")[0], ar=build_ar(tmp_path, "qwen2", head_bias=True)
    )
    plain = torch.nn.functional.linear(
        nla.reconstructor.engine.last_resid([nla.reconstructor.prompt_ids("x")]),
        nla.reconstructor.weight_DD,
    )
    bias = load_file(tmp_path / "value_head.safetensors")["bias"]
    assert float(bias.norm()) > 1
    torch.testing.assert_close(nla.reconstruct(["x"])[0], plain[0] + bias)


def test_scripted_backbones_go_through_the_head(nla: NLA) -> None:
    backbone = ScriptedReconstructor(torch.eye(64)[:2])
    from nla_lens.halves.reconstructor import Reconstructor

    tokenizer, weight = nla.reconstructor.tokenizer, nla.reconstructor.weight_DD
    mine = Reconstructor(nla.spec, tokenizer, backbone, {"weight": weight})
    torch.testing.assert_close(mine.reconstruct(["a", "b"]), weight.T[:2])
