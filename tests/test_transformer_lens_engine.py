"""Engine "transformer_lens": what the reference computes, through TransformerLens' own hooks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_lens import NLA, NLAError

from .checkpoints import EXPLANATIONS, FAMILIES, build_av, build_lora_ar, build_source, reference

if find_spec("transformer_lens") is None:
    pytest.skip("needs TransformerLens", allow_module_level=True)
NO_BRIDGE = find_spec("transformer_lens.model_bridge") is None

RULES = ("replace", "norm_matched_add")
needs_bridge = pytest.mark.skipif(NO_BRIDGE, reason="this TransformerLens has no TransformerBridge")


@pytest.fixture(scope="module")
def load_tl(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[[str, str], NLA]:
    def load(family: str, rule: str) -> NLA:
        av, ar = pair_dirs(family, rule)
        by_caller = None if rule == "replace" else rule
        return NLA.from_pretrained(av=av, ar=ar, injection=by_caller, engine="transformer_lens")

    return cache(load)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@needs_bridge
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(load_tl, load_pair, expected, family: str, rule: str) -> None:
    nla, wanted = load_tl(family, rule), expected(family, rule)
    explained = nla.explain(wanted.vectors, max_new_tokens=wanted.N_TOKENS, score=False)
    assert [list(e.token_ids) for e in explained] == wanted.greedy.ids.tolist()
    # Batches and samples are made in one place for all families.
    several: tuple[dict[str, Any], ...] = ({"batch_size": 2}, {"temperature": 1.0, "seed": 5})
    for options in several if family in ("llama", "gemma3") else ():
        options |= {"max_new_tokens": 10, "score": False}
        ours = nla.explain(wanted.vectors, **options)
        theirs = load_pair(family, rule).explain(wanted.vectors, **options)
        assert [e.token_ids for e in ours] == [e.token_ids for e in theirs]


@needs_bridge
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_vectors(load_tl, expected, pair_dirs, family: str) -> None:
    nla, wanted = load_tl(family, "replace"), expected(family, "replace")
    embeds_NTD = nla.verbalizer.prompt_embeds(wanted.vectors)
    assert relative(embeds_NTD, wanted.av.prompt_embeds(wanted.vectors)) < 2e-6
    texts = [*EXPLANATIONS, ""]
    by_hand = reference.AR(pair_dirs(family, "replace")[1]).vectors(texts)
    assert relative(nla.reconstruct(texts), by_hand) < 2e-5


@needs_bridge
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ones_own_hooks_see_the_injection(load_tl, expected, family: str, rule: str) -> None:
    """The vector goes in at TransformerLens' hook point, so what hooks see is what is read."""
    nla, wanted = load_tl(family, rule), expected(family, rule)
    v_D, seen = wanted.vectors[4], []
    place = "blocks.0.hook_in" if rule == "replace" else "blocks.2.hook_in"

    def look(resid_BTD: torch.Tensor, hook: Any) -> None:
        if len(resid_BTD) == 2 and resid_BTD.shape[1] > 1:
            seen.append(resid_BTD[:, 0].double())  # the marker is the first behind the prefix

    with nla.verbalizer.engine.bridge.hooks(fwd_hooks=[(place, look)]):
        nla.explain(torch.stack([v_D, -v_D]), max_new_tokens=2, score=False)
    ((forth_D, back_D),) = seen
    own_D, added_D = (forth_D + back_D) / 2, (forth_D - back_D) / 2
    norm = own_D.norm() if rule == "norm_matched_add" else wanted.av.injection_scale()
    by_hand = v_D.double() / v_D.double().norm() * norm
    assert relative(added_D[None], by_hand[None]) < 2e-6
    assert own_D.norm() < 1e-3 if rule == "replace" else own_D.norm() > 1


@needs_bridge
def test_rows_end_where_they_are_over(tmp_path: Path) -> None:
    av = build_av(tmp_path, "gemma3_text", quiet_eos=False)
    many = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    ours = NLA.from_pretrained(av=av, engine="transformer_lens").explain(many, max_new_tokens=16)
    theirs = NLA.from_pretrained(av=av).explain(many, max_new_tokens=16)
    assert [e.token_ids for e in ours] == [e.token_ids for e in theirs]
    assert len({len(e.token_ids) for e in ours}) > 2


@needs_bridge
def test_a_multimodal_checkpoint_starts_no_process(pair_dirs, monkeypatch) -> None:
    """TransformerLens 4.3 would install torchvision, and with it another torch."""
    started: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        started.append(args)
        raise OSError("no process may be started here")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    av, ar = pair_dirs("gemma3", "replace")
    nla = NLA.from_pretrained(av=av, ar=ar, engine="transformer_lens")
    nla.explain(torch.ones(64), max_new_tokens=2)
    assert started == []


@needs_bridge
def test_an_adapter_can_be_a_reconstructor(pair_dirs, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ar = build_lora_ar(tmp_path / "ar", "qwen2", build_source(tmp_path / "base", "qwen2"))
    nla = NLA.from_pretrained(av=pair_dirs("qwen2", "replace")[0], ar=ar, engine="transformer_lens")
    texts = list(EXPLANATIONS[:3])
    assert relative(nla.reconstruct(texts), reference.AR(ar).vectors(texts)) < 2e-5


@needs_bridge
def test_what_the_rule_needs_and_the_model_has_not(tmp_path: Path) -> None:
    av = build_av(tmp_path, "qwen2", n_blocks=1, injection="norm_matched_add")
    with pytest.raises(NLAError, match=r"norm_matched_add acts at blocks.1.hook_resid_post"):
        NLA.from_pretrained(av=av, injection="norm_matched_add", engine="transformer_lens")


@pytest.mark.skipif(not NO_BRIDGE, reason="this TransformerLens has TransformerBridge")
def test_an_old_transformer_lens_is_named(pair_dirs) -> None:
    with pytest.raises(NLAError, match=r"needs TransformerLens 3.9 or later"):
        NLA.from_pretrained(av=pair_dirs("qwen2", "replace")[0], engine="transformer_lens")
