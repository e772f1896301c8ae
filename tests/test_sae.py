"""Latents in words, residuals in two languages, and the NLA as a dictionary."""

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from nla_lens import NLA, NLAError, extract
from nla_lens.adapters.dictionaries import features as features_module
from nla_lens.adapters.dictionaries.latents import Latents
from nla_lens.adapters.sae import (
    FeatureExplanation,
    FeatureExplanations,
    NLADictionary,
    decompose,
    explain_features,
    label_score,
    load_dictionary,
    run_with_nla,
)
from nla_lens.checkpoints.releases import TINY_DIR
from nla_lens.cli.main import cli

from . import dictionary_files as files

TEXT = "Maria is in Lisbon. She chops the onion and heats the oil in the pan."
SHORT = {"max_new_tokens": 10}
has_sae_lens = importlib.util.find_spec("sae_lens") is not None


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


@pytest.fixture(scope="module")
def resid(tiny: NLA) -> torch.Tensor:
    return extract(TINY_DIR / "source", [TEXT], tiny.spec.layer)[0]


class Own:
    """An object with the three names: a ReLU dictionary of 30 latents."""

    def __init__(self, hook_name: str | None = "blocks.2.hook_resid_post", d: int = 128) -> None:
        self.W_dec = torch.randn(30, d, generator=torch.Generator().manual_seed(3))
        self.cfg = SimpleNamespace(hook_name=hook_name)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_dec.T - 6.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.W_dec / 100.0


# --- explain_features -------------------------------------------------------------------------


def test_rows_are_explained_as_the_vectors_they_are(tiny: NLA) -> None:
    sae = Own()
    found = explain_features(tiny, sae, [4, 1, 4], **SHORT)
    direct = tiny.explain(sae.W_dec[[4, 1, 4]], **SHORT)
    assert [e.index for e in found] == [4, 1, 4]
    assert [e.text for e in found] == [e.text for e in direct]
    for e, row in zip(found, sae.W_dec[[4, 1, 4]], strict=True):
        said = tiny.reconstruct([e.text])[0].double()
        cos = float(said @ row.double() / said.norm() / row.double().norm())
        assert e.cos == pytest.approx(cos, abs=1e-5)
        assert e.norm == pytest.approx(float(row.norm()), rel=1e-5)


def test_scale_is_nothing_and_sign_is_something(tiny: NLA) -> None:
    sae, long = Own(), Own()
    long.W_dec = sae.W_dec * 1000.0
    found = explain_features(tiny, sae, range(6), **SHORT)
    scaled = explain_features(tiny, long, range(6), **SHORT)
    opposite = explain_features(tiny, sae, range(6), sign=-1, **SHORT)
    assert [e.text for e in scaled] == [e.text for e in found]
    assert scaled[0].norm == pytest.approx(1000 * found[0].norm, rel=1e-5)
    assert "outlier_norm" not in {f for e in scaled for f in e.flags}
    direct = tiny.explain(-sae.W_dec[:6], **SHORT)
    assert [e.text for e in opposite] == [e.text for e in direct]
    assert {e.sign for e in opposite} == {-1}


def test_the_second_reading_adds_the_row_to_the_mean(tiny: NLA, resid: torch.Tensor) -> None:
    sae, mean = Own(), resid.as_ordinary().mean(0)
    found = explain_features(tiny, sae, [2], mean=mean, strength=5.0, **SHORT)[0]
    shifted = mean + 5.0 * sae.W_dec[2] / sae.W_dec[2].norm()
    assert found.shifted_text == tiny.explain(shifted, **SHORT).text
    u, m = sae.W_dec[2] / sae.W_dec[2].norm(), mean / mean.norm()
    var = tiny.spec.var_nrm
    distance = float((u - m * math.sqrt(1 - var)).square().sum()) / var
    assert found.distance == pytest.approx(distance, rel=1e-3)
    assert ("off_distribution" in found.flags) == (distance > 2)


def test_a_row_that_is_a_residual_is_not_flagged_as_far_from_residuals(
    tiny: NLA, resid: torch.Tensor
) -> None:
    sae = Own()
    sae.W_dec = resid.as_ordinary()[10:20]
    found = explain_features(tiny, sae, mean=resid.as_ordinary()[1:].mean(0), **SHORT)
    assert not [e for e in found if "off_distribution" in e.flags]


@pytest.mark.parametrize(
    ("hook_name", "flag"),
    [
        ("blocks.2.hook_resid_post", None),
        ("blocks.3.hook_resid_pre", None),
        ("blocks.2.hook_resid_pre", "other_layer"),
        ("blocks.3.hook_resid_post", "other_layer"),
        (None, "unknown_place"),
    ],
)
def test_another_place_is_flagged_by_name(tiny: NLA, hook_name: str | None, flag: str) -> None:
    found = explain_features(tiny, Own(hook_name), [0], **SHORT)[0]
    flags = {"other_layer", "unknown_place"} & set(found.flags)
    assert flags == ({flag} if flag else set())


@pytest.mark.parametrize(
    ("sae", "indices", "options", "named"),
    [
        (Own("blocks.2.hook_mlp_out"), [0], {}, "hook_mlp_out"),
        (Own(d=64), [0], {}, "width 64.*128"),
        (SimpleNamespace(W_dec=Own().W_dec.T, encode=len, decode=len), [0], {}, "width 30"),
        (Own(), [30], {}, "latent 30.*0 to 29"),
        (Own(), [-1], {}, "latent -1"),
        (Own(), ["a"], {}, "latent 'a'"),
        (Own(), [0], {"sign": 2}, "sign=2"),
        (Own(), [0], {"strength": 2.0}, "mean="),
        (Own(), [0], {"mean": torch.ones(64)}, "128"),
        (Own(), [0], {"mean": torch.ones(128), "strength": 0}, "strength=0"),
    ],
)
def test_what_cannot_be_explained_is_named(
    tiny: NLA, sae: object, indices: list, options: dict, named: str
) -> None:
    with pytest.raises(NLAError, match=named):
        explain_features(tiny, sae, indices, **options)


@pytest.mark.parametrize(
    "indices", [3, np.array([3]), torch.tensor([3]), (np.int64(3),), range(3, 4)]
)
def test_latents_can_be_named_in_any_way(tiny: NLA, indices: object) -> None:
    assert [e.index for e in explain_features(tiny, Own(), indices, **SHORT)] == [3]


def test_dead_and_damaged_rows_are_named(tiny: NLA) -> None:
    sae = Own()
    sae.W_dec[7], sae.W_dec[8, 3] = 0.0, float("nan")
    with pytest.raises(NLAError, match=r"latent 7.*all zero"):
        explain_features(tiny, sae, [6, 7])
    with pytest.raises(NLAError, match="latent 8"):
        explain_features(tiny, sae, [6, 8])


def test_a_store_goes_on_where_it_stopped(
    tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, store = Own(), tmp_path / "new" / "store.jsonl"
    whole = explain_features(tiny, sae, range(8), **SHORT)
    read: list[int] = []
    monkeypatch.setattr(features_module, "_ROWS_AT_ONCE", 2)
    original = features_module._Reader._read_some

    def stopping(self: object, indices: list[int]) -> Iterator:
        if len(read) == 4:
            raise KeyboardInterrupt
        read.extend(indices)
        yield from original(self, indices)

    monkeypatch.setattr(features_module._Reader, "_read_some", stopping)
    with pytest.raises(KeyboardInterrupt):
        explain_features(tiny, sae, range(8), store=store, **SHORT)
    with store.open("a", encoding="utf-8") as file:
        file.write('{"index": 4, "text": "cut sho')
    read.clear()
    monkeypatch.setattr(
        features_module._Reader,
        "_read_some",
        lambda self, indices: (read.extend(indices), original(self, indices))[1],
    )
    found = explain_features(tiny, sae, range(8), store=store, **SHORT)
    assert read == [4, 5, 6, 7]
    assert [e.text for e in found] == [e.text for e in whole]
    assert [e.index for e in FeatureExplanations.load(store)] == list(range(8))
    read.clear()
    assert [e.text for e in explain_features(tiny, sae, [3], store=store, **SHORT)] == [
        whole[3].text
    ]
    assert read == []


@pytest.mark.parametrize(
    ("change", "named"),
    [({"sign": -1}, "sign"), ({"max_new_tokens": 11}, "options"), ({"sae": Own(None)}, "hook")],
)
def test_a_store_of_something_else_is_not_gone_on_with(
    tiny: NLA, tmp_path: Path, change: dict, named: str
) -> None:
    store = tmp_path / "store.jsonl"
    explain_features(tiny, Own(), [0], store=store, **SHORT)
    wished = {**SHORT, **{k: v for k, v in change.items() if k != "sae"}}
    with pytest.raises(NLAError, match=named):
        explain_features(tiny, change.get("sae", Own()), [1], store=store, **wished)


def test_results_are_written_and_read(tiny: NLA, tmp_path: Path) -> None:
    found = explain_features(tiny, Own(), [3, 5], **SHORT)
    assert list(FeatureExplanations.load(found.save(tmp_path / "f.jsonl"))) == list(found)
    path = found.save(tmp_path / "f.parquet")
    assert FeatureExplanations.load(path) == found
    assert pq.read_table(path, columns=["index", "text"]).to_pylist() == [
        {"index": e.index, "text": e.text} for e in found
    ]
    assert found.to_pandas().loc[5, "text"] == found[1].text
    page = found.to_html(tmp_path / "f.html").read_text(encoding="utf-8")
    assert "latent 3" in page
    assert "<html" in page
    assert "latent 5" in found._repr_html_()
    path = found.to_neuronpedia(tmp_path / "np.jsonl", model_id="gpt2-small", source_id="6-res-jb")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert lines[0] == {
        "modelId": "gpt2-small",
        "layer": "6-res-jb",
        "index": "3",
        "description": found[0].text,
        "typeName": "nla_decoder-row",
        "explanationModelName": "nla",
    }
    for wrong in ("", "{}", '{"format": "x"}\n'):
        (tmp_path / "bad").write_text(wrong)
        with pytest.raises(NLAError, match="bad"):
            FeatureExplanations.load(tmp_path / "bad")


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
def test_an_sae_of_sae_lens_is_taken_as_it_is(tiny: NLA, resid: torch.Tensor) -> None:
    import sae_lens

    torch.manual_seed(0)
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=128, d_sae=40))
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_pre"
    found = explain_features(tiny, sae, [1, 2], **SHORT)
    assert [e.text for e in found] == [e.text for e in tiny.explain(sae.W_dec[[1, 2]], **SHORT)]
    assert not {"other_layer", "unknown_place"} & set(found[0].flags)
    apart = decompose(tiny, sae, resid[12], **SHORT)
    assert apart.l0 == int((sae.encode(resid.as_ordinary()[12]) != 0).sum())


# --- label_score --------------------------------------------------------------------------------


def test_labels_are_scored_by_their_own_row_among_the_others(tiny: NLA) -> None:
    texts = ["A story about cooking.", "Unfamiliar text.", "The last words are “the pan”."]
    rows = tiny.reconstruct(texts)
    right = label_score(tiny, texts, rows, others=Own().W_dec)
    assert right.n_rows == 33
    assert right.top1 == 1.0
    assert right.mean_reciprocal_rank == 1.0
    np.testing.assert_allclose(right.cos.numpy(), 1.0, atol=1e-5)
    turned = label_score(tiny, texts[1:] + texts[:1], rows, others=Own().W_dec)
    assert turned.top1 == 0.0
    assert len(turned) == 3
    said = torch.nn.functional.normalize(tiny.reconstruct(texts[1:] + texts[:1]), dim=-1)
    fits = said @ torch.nn.functional.normalize(torch.cat([rows, Own().W_dec]), dim=-1).T
    assert turned.rank.tolist() == [int((f > f[i]).sum()) for i, f in enumerate(fits)]
    with pytest.raises(NLAError, match=r"2 labels.*3 rows"):
        label_score(tiny, texts[:2], rows)


# --- decompose ----------------------------------------------------------------------------------


def test_a_residual_in_two_languages(tiny: NLA, resid: torch.Tensor) -> None:
    sae, x = Own(), resid.as_ordinary()[15]
    found = decompose(tiny, sae, resid[15], top=3, labels={9: "mine"}, **SHORT)
    acts = sae.encode(x)
    lengths = acts * sae.W_dec.norm(dim=-1)
    strongest = sorted(range(30), key=lambda i: -float(lengths[i]))[:3]
    assert [latent.index for latent in found.latents] == strongest
    assert found.latents[0].activation == pytest.approx(float(acts[strongest[0]]), rel=1e-5)
    assert found.latents[0].contribution == pytest.approx(float(lengths[strongest[0]]), rel=1e-5)
    assert found.l0 == int((acts > 0).sum())
    assert found.explanation.token_id == resid[15].origin.where_LX3[2]
    assert found.explanation.text == tiny.explain(x, **SHORT).text
    assert found.n_words == len(found.explanation.text.split())
    for fit, pred in (
        (found.sae, sae.decode(acts)),
        (found.nla, tiny.reconstruct([found.explanation.text])[0]),
    ):
        u, v = pred.double() / pred.double().norm(), x.double() / x.double().norm()
        cos = float(u @ v)
        assert fit.cos == pytest.approx(cos, abs=1e-5)
        assert fit.mse_nrm == pytest.approx(2 - 2 * cos, abs=1e-5)
        assert fit.fve_nrm == pytest.approx(1 - (2 - 2 * cos) / tiny.spec.var_nrm, abs=1e-4)
        error = x.double() - float(u @ x.double()) * u
        assert fit.missed_share == pytest.approx(float(error.norm() / x.norm()), abs=1e-5)
        assert fit.missed_text == tiny.explain(error.float(), **SHORT).text
    rows = explain_features(tiny, sae, strongest, **SHORT)
    for latent, e in zip(found.latents, rows, strict=True):
        assert latent.text == ("mine" if latent.index == 9 else e.text)
    assert json.dumps(found.to_dict())
    assert "NLA" in found._repr_mimebundle_([], [])["text/html"]


def test_many_residuals_and_silent_ones(tiny: NLA, resid: torch.Tensor) -> None:
    sae = Own()
    found = decompose(tiny, sae, resid[4:6], explain_latents=False, explain_errors=False, **SHORT)
    assert len(found) == 2
    assert found[0].sae.missed_text is None
    assert {latent.text for latent in found[0].latents} <= {None}
    sae.encode = lambda x: torch.zeros(*x.shape[:-1], 30)  # type: ignore[method-assign]
    silent = decompose(tiny, sae, resid[4], **SHORT)
    assert (silent.l0, silent.latents, silent.sae.cos) == (0, (), 0.0)
    assert silent.sae.missed_share == pytest.approx(1.0)
    with pytest.raises(NLAError, match="top=0"):
        decompose(tiny, sae, resid[4], top=0)
    alone = NLA(tiny.verbalizer)
    assert decompose(alone, Own(), resid[4], **SHORT).nla is None


def test_the_tutorials_dictionary_is_of_this_source_model(tiny: NLA) -> None:
    """It has to be trained again whenever the embedded source model is."""
    sae = load_dictionary(TINY_DIR.parents[1] / "tutorials" / "tiny_sae" / "dictionary")
    assert Latents(sae).place_flags(tiny) == ()
    texts = [
        TEXT,
        "The rain stopped in the afternoon. Peter opened the window.",
        "Nora lives in Naples. The fox chased the dog out of the kennel.",
        "Omar paid the cashier and left the bank.",
    ]
    x = torch.cat([r.as_ordinary()[1:] for r in extract(TINY_DIR / "source", texts, 2)])
    acts = sae.encode(x)
    error = (sae.decode(acts) - x).square().sum()
    assert 1 - error / (x - x.mean(0)).square().sum() > 0.7
    assert 4 < acts.ne(0).sum(-1).float().mean() < 16


def test_contributions_of_scaled_latents_are_lengths_once(tmp_path: Path) -> None:
    sae = load_dictionary(files.dictionary_learning(tmp_path, "JumpReluAutoEncoder").source)
    from nla_lens.adapters.dictionaries.decomposition import _strongest

    x = torch.randn(files.D, generator=torch.Generator().manual_seed(1)) * 3
    acts = sae.encode(x)
    for index, activation, contribution in _strongest(Latents(sae), acts, 3):
        alone = torch.zeros_like(acts)
        alone[index] = acts[index]
        length = float((sae.decode(alone) - sae.b_dec).norm())
        assert contribution == pytest.approx(length, rel=1e-5)
        assert activation == pytest.approx(float(acts[index]))


# --- the NLA as a dictionary --------------------------------------------------------------------


def source_model() -> object:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        from .hooked_transformer import hooked_transformer

        return hooked_transformer(TINY_DIR / "source")
    return TransformerBridge.boot_transformers(str(TINY_DIR / "source"), device="cpu")


@pytest.fixture(scope="module")
def model() -> object:
    return source_model()


IDS = torch.tensor([[1, 300, 17, 40, 99, 5]])


def test_the_verbs_of_a_dictionary(tiny: NLA, resid: torch.Tensor) -> None:
    sae = NLADictionary(tiny, **SHORT)
    assert (sae.cfg.d_in, sae.cfg.hook_name) == (128, "blocks.2.hook_resid_post")
    assert sae.cfg.metadata.hook_name == sae.cfg.hook_name
    x = resid.as_ordinary()[4:8].reshape(2, 2, 128).to(torch.bfloat16)
    texts = sae.encode(x)
    assert texts == tiny.encode(x, **SHORT)
    out = sae(x)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    said = torch.nn.functional.normalize(sae.decode(texts), dim=-1).reshape(2, 2, 128)
    torch.testing.assert_close(
        out.float(), said * x.float().norm(dim=-1, keepdim=True), rtol=1e-2, atol=1e-2
    )
    assert torch.equal(sae(x, keep_error=True), x)
    changed = sae.forward(x, edit=lambda text: "A story about cooking.", keep_error=True)
    assert not torch.equal(changed, x)
    with pytest.raises(NLAError, match="reconstructor"):
        NLADictionary(NLA(tiny.verbalizer))


def spliced_by_hand(tiny: NLA, positions: list[int]) -> torch.Tensor:
    """Logits by transformers, with a hook of the test's own on block 2."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(TINY_DIR / "source", dtype=torch.float32).eval()

    def hook(module: object, args: object, output: object) -> object:
        resid = output[0] if isinstance(output, tuple) else output
        new = resid.clone()
        for p in positions:
            said = tiny.reconstruct([tiny.explain(resid[0, p], **SHORT).text])[0]
            new[0, p] = said / said.norm() * resid[0, p].norm()
        return (new, *output[1:]) if isinstance(output, tuple) else new

    hf.model.layers[2].register_forward_hook(hook)
    with torch.no_grad():
        return hf(IDS).logits


@pytest.mark.parametrize(
    ("positions", "same_as"), [(None, range(6)), (slice(2, 4), [2, 3]), ([-1], [5]), (3, [3])]
)
def test_splicing_is_what_a_hook_by_hand_does(
    tiny: NLA, model: object, positions: object, same_as: object
) -> None:
    logits = run_with_nla(model, IDS, tiny, positions=positions, options=SHORT)
    torch.testing.assert_close(
        logits, spliced_by_hand(tiny, list(same_as)), rtol=1e-3, atol=2e-3, check_device=False
    )


def test_with_its_error_nothing_changes_but_what_is_edited(tiny: NLA, model: object) -> None:
    with torch.no_grad():
        base = model(IDS)
    sae = NLADictionary(tiny, **SHORT)
    torch.testing.assert_close(run_with_nla(model, IDS, sae, keep_error=True), base)
    edited = run_with_nla(
        model, IDS, sae, positions=[3], keep_error=True, edit=lambda text: "A story about cooking."
    )
    torch.testing.assert_close(edited[:, :3], base[:, :3])
    assert not torch.allclose(edited[:, 3:], base[:, 3:], atol=1e-3)
    # Nothing stays attached.
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), base)


@pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="needs nnsight")
def test_splicing_in_nnsight_is_the_same(tiny: NLA) -> None:
    import nnsight

    name = str(TINY_DIR / "source")
    model = nnsight.TransformersModel(name, task="text-generation", tokenizer=name)
    output = run_with_nla(model, IDS, tiny, positions=[2, 3], options=SHORT)
    torch.testing.assert_close(output.logits, spliced_by_hand(tiny, [2, 3]), rtol=1e-4, atol=1e-4)
    with model.trace(IDS):
        base = model.output.save()
    kept = run_with_nla(model, IDS, tiny, keep_error=True, options=SHORT)
    torch.testing.assert_close(kept.logits, base.logits)
    with pytest.raises(NLAError, match="remote"):
        run_with_nla(model, IDS, tiny, remote=True)


def test_what_cannot_be_spliced_is_named(tiny: NLA, model: object) -> None:
    with pytest.raises(NLAError, match="position 6"):
        run_with_nla(model, IDS, tiny, positions=[6])
    with pytest.raises(NLAError, match="dict"):
        run_with_nla({}, IDS, tiny)


# --- the command line ---------------------------------------------------------------------------


def dictionary_of_width_128(root: Path) -> Path:
    w = files.weights(128, 20)
    torch.save(files._linear(w, "encoder", "decoder"), root / "X-SAE-l3.pt")
    return root / "X-SAE-l3.pt"


def test_the_command(tmp_path: Path) -> None:
    path = dictionary_of_width_128(tmp_path)
    out = tmp_path / "store.jsonl"
    common = ["features", str(path), "--latents", "2:4", "--max-new-tokens", "10"]
    run = CliRunner().invoke(cli, [*common, "--json", "--out", str(out)])
    assert run.exit_code == 0, run.output
    lines = [json.loads(line) for line in run.output.split("\n") if line]
    assert [line["index"] for line in lines] == [2, 3]
    # The input of block 3 is where this NLA reads.
    assert not {"other_layer", "unknown_place"} & set(lines[0]["flags"])
    assert len(FeatureExplanations.load(out)) == 2
    shown = CliRunner().invoke(cli, [*common, "--html", str(tmp_path / "p.html")])
    assert shown.exit_code == 0, shown.output
    assert "the AV says" in shown.output
    assert (tmp_path / "p.html").is_file()
    for bad in (["--latents", "x"], ["--latents", "99"], ["--neuronpedia", "n.jsonl"]):
        failed = CliRunner().invoke(cli, ["features", str(path), *bad])
        assert isinstance(failed.exception, NLAError), bad


def test_the_command_with_a_name_that_is_markup_and_a_format(tmp_path: Path) -> None:
    """Brackets in a name are text: `[/b]` ends nothing. What proves no format --format tells."""
    root = tmp_path / "["
    root.mkdir()
    path = dictionary_of_width_128(root).rename(root / "b]own.pt")
    common = ["features", str(path), "--latents", "2", "--max-new-tokens", "4"]
    failed = CliRunner().invoke(cli, common)
    assert "format=" in str(failed.exception)
    run = CliRunner().invoke(cli, [*common, "--format", "qresearch"])
    assert run.exit_code == 0, run.output
    assert "[/b]own.pt" in "".join(line.strip() for line in run.output.split("\n"))
    assert "unknown_place" in run.output


GOOD = {"index": 3, "text": "a", "norm": 1.0, "token_ids": [1, 2], "flags": ["x"]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"index": True},
        {"index": "3"},
        {"index": 3.0},
        {"index": None},
        {"norm": "1"},
        {"norm": True},
        {"text": None},
        {"complete": 1},
        {"token_ids": [1, "2"]},
        {"token_ids": [True]},
        {"token_ids": [[1]]},
        {"flags": [1]},
        {"flags": "x"},
        {"samples": [7]},
        {"samples": [{"index": True}]},
        {"distance": "far"},
        {"shifted_text": ["a"]},
        {"sign": False},
    ],
)
def test_records_of_other_types_are_named(wrong: dict) -> None:
    assert FeatureExplanation.from_dict(GOOD).index == 3
    with pytest.raises(NLAError):
        FeatureExplanation.from_dict({**GOOD, **wrong})


@pytest.mark.parametrize("record", [None, 3, "x", [], [GOOD]])
def test_what_is_no_record_is_named(record: Any) -> None:
    with pytest.raises(NLAError, match="expected an object"):
        FeatureExplanation.from_dict(record)
