"""AVs and ARs of many families: tokens of a loop without a cache, vectors of a plain pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import cache_utils

from nla_lens import NLA, NLAError
from nla_lens.engines import Job
from nla_lens.engines.local import self_check
from nla_lens.engines.local.decoding import Decoder
from nla_lens.models.anatomy import blocks_of
from nla_lens.models.caching import KEYS_AND_VALUES, NOTHING, ways_of_caching

from .checkpoints import EXPLANATIONS, families, vectors

RULES = ("replace", "norm_matched_add")
N_TOKENS = 8
CLEAR = 1e-3
"""By how much a logit must lead, in units of their spread: many times what rounding does."""
# What transformers 5.23 keeps for these is its own, or drifts: each token runs anew.
ANEW = {"bamba", "falcon_mamba", "mamba", "minimax", "recurrent_gemma", "zamba2"}
STATES = {
    *("falcon_h1", "jamba", "lfm2", "mamba2", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_next"),
}
# Before, each of these families had a cache of its own: each token runs anew.
HAS_LAYERS_OF_STATES = hasattr(cache_utils, "LinearAttentionLayer")
HERE = [name for name in families.OPTIONS if families.is_known(name)]
_SOME = ("gpt2", "opt", "mpt", "falcon", "gpt_neox", "gemma4", "gemma4-dense", "mixtral", "bloom")
SOME = [name for name in (*_SOME, *sorted(STATES), "zamba2", "minimax") if name in HERE]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], NLA]:
    """`load(family, rule)`; not to be changed by a test."""

    def loaded(name: str, rule: str) -> NLA:
        path = families.save_av(name, tmp_path_factory.mktemp(f"{name}-{rule}"), rule)
        return NLA.from_pretrained(av=path, injection=rule)

    return cache(loaded)


@cache
def given() -> Tensor:
    return vectors(d_model=families.D, n=3)


@torch.no_grad()
def greedy(
    model: Any, nla: NLA, rule: str, vectors_ND: Tensor, n: int
) -> list[tuple[list[int], int]]:
    """Tokens of a loop without a cache, injected anew each time, and how many are clear."""
    marker = nla.verbalizer.marker_position
    ids_NT = torch.tensor([list(nla.verbalizer.prompt_ids)] * len(vectors_ND))
    unit_ND, margins = vectors_ND / vectors_ND.norm(dim=-1, keepdim=True), []

    def hook(module: Any, args: Any, output: Any) -> Any:
        resid = (output[0] if isinstance(output, tuple) else output).clone()
        there = resid[:, marker]
        resid[:, marker] = (
            families.SCALE * unit_ND
            if rule == "replace"
            else there + there.norm(dim=-1, keepdim=True) * unit_ND
        )
        return (resid, *output[1:]) if isinstance(output, tuple) else resid

    place = model.get_input_embeddings() if rule == "replace" else blocks_of(model)[1]
    handle = place.register_forward_hook(hook)
    for _ in range(n):
        logits_NV = model(input_ids=ids_NT, use_cache=False).logits[:, -1]
        best = (logits_NV / logits_NV.std(dim=-1, keepdim=True)).topk(2)
        ids_NT = torch.cat([ids_NT, best.indices[:, :1]], dim=1)
        margins.append(best.values[:, 0] - best.values[:, 1])
    handle.remove()
    clear_N = [
        next((i for i, margin in enumerate(row) if margin < CLEAR), n)
        for row in torch.stack(margins, dim=1).tolist()
    ]
    return list(zip(ids_NT[:, -n:].tolist(), clear_N, strict=True))


def check_tokens(nla: NLA, model: Any, rule: str, n: int = N_TOKENS) -> None:
    wanted = greedy(model, nla, rule, given(), n)
    assert sum(clear for _, clear in wanted) >= n
    for batch_size in (None, 2):
        got = nla.explain(given(), max_new_tokens=n, score=False, batch_size=batch_size)
        for e, (ids, clear) in zip(got, wanted, strict=True):
            assert list(e.token_ids)[:clear] == ids[:clear]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SOME)
def test_tokens(load: Any, name: str, rule: str) -> None:
    nla = load(name, rule)
    check_tokens(nla, families.model(name), rule)


@pytest.mark.parametrize("name", [name for name in HERE if name not in SOME])
def test_tokens_of_the_others(load: Any, name: str) -> None:
    nla = load(name, "norm_matched_add")
    check_tokens(nla, families.model(name), "norm_matched_add", 4)


@pytest.mark.parametrize("name", ["gemma4", "gemma4-dense", "qwen3_5", "qwen3_5_moe"])
def test_wrappers(name: str, tmp_path: Path) -> None:
    """As they are released: the text model inside a multimodal one."""
    if name not in HERE:
        pytest.skip("this transformers does not know it")
    for rule in RULES:
        path = families.save_av(name, tmp_path / rule, rule, make=families.wrapper)
        check_tokens(NLA.from_pretrained(av=path, injection=rule), families.wrapper(name), rule, 4)


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HERE)
def test_what_is_kept(load: Any, name: str) -> None:
    """The fast way where it is right: nobody should wait for what a cache can give."""
    caching = load(name, "norm_matched_add").verbalizer.engine.caching
    if name in STATES and HAS_LAYERS_OF_STATES:
        assert caching.layers and caching.kept and caching.resumes is (name != "jamba")
    else:
        assert caching == (NOTHING if name in ANEW | STATES else KEYS_AND_VALUES)


def test_a_slow_way_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if "mamba" not in HERE:
        pytest.skip("this transformers does not know it")
    NLA.from_pretrained(av=families.save_av("mamba", tmp_path, "replace"))
    assert "MambaForCausalLM" in caplog.text and "runs its row from the beginning" in caplog.text


def rows_that_end(engine: Any, nla: NLA, rows: list[list[int]]) -> Iterator[tuple[int, list[int]]]:
    """Rows of unequal lengths, so that some leave and others join."""
    job = Job(
        nla.verbalizer.prompt_ids,
        nla.verbalizer.marker_position,
        given()[:, :].repeat(2, 1),
        max(map(len, rows)),
        lambda ids: list(ids) in rows,
    )
    yield from Decoder(engine, torch.device("cpu")).decode(job, 2)


@pytest.mark.parametrize("name", [*sorted(STATES), "gemma4", "minimax", "mpt", "gpt2"])
def test_rows_leave_and_join(load: Any, name: str) -> None:
    if name not in HERE:
        pytest.skip("this transformers does not know it")
    nla = load(name, "norm_matched_add")
    engine, model = nla.verbalizer.engine, families.model(name)
    lengths = (2, 5, 3, 6, 1, 4)
    whole = greedy(model, nla, "norm_matched_add", given(), max(lengths))
    rows = [whole[i % 3][0][:n] for i, n in enumerate(lengths)]
    for row, ids in rows_that_end(engine, nla, rows):
        clear = min(whole[row % 3][1], len(ids))
        assert ids[:clear] == rows[row][:clear]


def test_a_state_that_stays_behind_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load-time check is what lets a family with states decode by them."""
    from nla_lens.models.caching import StateLayer

    if "qwen3_5" not in HERE:
        pytest.skip("this transformers does not know it")
    monkeypatch.setattr(StateLayer, "select", lambda self, rows, skip: None)
    path = families.save_av("qwen3_5", tmp_path, "replace")
    engine = NLA.from_pretrained(av=path).verbalizer.engine
    assert engine.caching == NOTHING


@pytest.mark.parametrize(("name", "way"), [("zamba2", 1), ("mamba2", 3), ("gpt2", 1)])
def test_in_half_precision_rounding_would_hide_a_drift(name: str, way: int) -> None:
    if name not in HERE:
        pytest.skip("this transformers does not know it")
    ways = ways_of_caching(families.model(name).to(torch.bfloat16))
    if name == "mamba2" and not HAS_LAYERS_OF_STATES:
        assert ways == [NOTHING]
        return
    assert len(ways) == way and (ways == [NOTHING]) is (name == "zamba2")


def test_plain_families_are_refused_and_not_slowed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(self_check, "_ROUNDING", {torch.float32: -1.0})
    with pytest.raises(NLAError, match="cannot run this 'gpt2' model"):
        NLA.from_pretrained(av=families.save_av("gpt2", tmp_path, "replace"))


def test_an_embedding_of_another_width(load: Any) -> None:
    with pytest.raises(NLAError, match=r"those of this 'opt' model have 16 entries"):
        load("opt-350m", "replace")


# --- reconstructors -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SOME if name not in ANEW])
def test_reconstructions(tmp_path: Path, name: str) -> None:
    path, model, found = families.save_ar(name, tmp_path / "ar"), families.model(name, 1), []
    layer = len(blocks_of(model)) - 1
    beside = families.save_av("gpt2", tmp_path / "av", "replace", layer=layer)
    nla = NLA.from_pretrained(av=beside, ar=path)
    blocks_of(model)[-1].register_forward_hook(
        lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    head_DD = load_file(path / "value_head.safetensors")["weight"]
    texts = list(EXPLANATIONS[:3])
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([nla.reconstructor.prompt_ids(text)])
            model(input_ids=ids, use_cache=False)
    by_hand_ND = torch.stack([head_DD @ resid_1TD[0, -1] for resid_1TD in found])
    got_ND = nla.reconstruct(texts)
    assert ((got_ND - by_hand_ND).norm(dim=-1) / by_hand_ND.norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "gemma4", "qwen3_5"])
def test_other_engines(tmp_path: Path, name: str, engine: str) -> None:
    pytest.importorskip("transformer_lens.model_bridge" if engine == "transformer_lens" else engine)
    if name not in HERE:
        pytest.skip("this transformers does not know it")
    layer = families.config(name).num_hidden_layers - 1
    path = families.save_av(name, tmp_path / "av", "replace", layer=layer)
    ar = families.save_ar(name, tmp_path / "ar")
    if (name, engine) == ("qwen3_5", "transformer_lens") and version("transformer-lens").startswith(
        "3."
    ):
        # It came after that release, and is refused there: at load, or by the first pass.
        with pytest.raises(NLAError):
            NLA.from_pretrained(av=path, ar=ar, engine=engine).explain(given(), max_new_tokens=4)
        return
    ours, theirs = (NLA.from_pretrained(av=path, ar=ar, engine=e) for e in (engine, "transformers"))
    got, wanted = (nla.explain(given(), max_new_tokens=4, score=False) for nla in (ours, theirs))
    assert [e.token_ids for e in got] == [e.token_ids for e in wanted]
    got_ND, wanted_ND = (nla.reconstruct(list(EXPLANATIONS[:2])) for nla in (ours, theirs))
    assert (got_ND - wanted_ND).norm() < 1e-5 * wanted_ND.norm()
