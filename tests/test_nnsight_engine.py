"""Engine "nnsight" says what engine "transformers" says, token by token in float32."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_lens import NLA, NLAError

from .checkpoints import EXPLANATIONS, FAMILIES, build_av, build_lora_ar, build_source, vectors

pytest.importorskip("nnsight")

RULES = ("replace", "norm_matched_add")


@pytest.fixture(scope="module")
def load_nnsight(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[[str, str], NLA]:
    def load(family: str, rule: str) -> NLA:
        av, ar = pair_dirs(family, rule)
        rule_by_caller = None if rule == "replace" else rule
        return NLA.from_pretrained(av=av, ar=ar, injection=rule_by_caller, engine="nnsight")

    return cache(load)


def ids(explanations: object) -> list[tuple[int, ...]]:
    return [e.token_ids for e in explanations]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_and_sampled_ids(
    family: str, rule: str, load_nnsight: Callable[..., NLA], load_pair: Callable[..., NLA]
) -> None:
    ours, theirs = load_nnsight(family, rule), load_pair(family, rule)
    # Batches and samples are made in one place for all families.
    several: tuple[dict[str, Any], ...] = (
        {"max_new_tokens": 8, "batch_size": 2},
        {"max_new_tokens": 12, "temperature": 1.0, "seed": 5},
    )
    for options in (
        {"max_new_tokens": 48},
        *(several if family in ("llama", "gemma3") else ()),
    ):
        here = ours.explain(vectors(), score=False, **options)
        assert ids(here) == ids(theirs.explain(vectors(), score=False, **options))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_reconstructions_are_equal(
    family: str, rule: str, load_nnsight: Callable[..., NLA], load_pair: Callable[..., NLA]
) -> None:
    ours, theirs = load_nnsight(family, rule), load_pair(family, rule)
    texts = [*EXPLANATIONS, "", EXPLANATIONS[0]]
    assert torch.equal(ours.reconstruct(texts), theirs.reconstruct(texts))
    if rule == "replace":
        assert torch.equal(
            ours.verbalizer.prompt_embeds(vectors()), theirs.verbalizer.prompt_embeds(vectors())
        )


@pytest.mark.parametrize("ending", [{"closing": True}, {"quiet_eos": False}])
def test_rows_end_where_they_are_over(ending: dict[str, bool], tmp_path: Path) -> None:
    leaky = {"repetition_penalty": 1.5, "do_sample": True, "temperature": 0.1, "min_length": 200}
    leaky |= {"use_cache": False, "max_time": 1e-6, "penalty_alpha": 0.6, "top_k": 4}
    av = build_av(tmp_path, "llama", generation=leaky, **ending)
    ours, theirs = (NLA.from_pretrained(av=av, engine=e) for e in ("nnsight", "transformers"))
    many = torch.cat([vectors(seed=seed) for seed in range(4)])
    here, there = (nla.explain(many, max_new_tokens=64) for nla in (ours, theirs))
    assert ids(here) == ids(there)
    assert any(len(e.token_ids) < 64 for e in there)


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    av = build_av(tmp_path, "llama", n_blocks=1, layer=0, injection="norm_matched_add")
    with pytest.raises(NLAError, match="the model has fewer"):
        NLA.from_pretrained(av=av, injection="norm_matched_add", engine="nnsight")


def test_an_adapter_can_be_a_reconstructor(tmp_path: Path, nla: NLA) -> None:
    pytest.importorskip("peft")
    source = build_source(tmp_path / "source", "llama")
    ar = build_lora_ar(tmp_path / "ar", "llama", source)
    av = nla.verbalizer.tokenizer.name_or_path
    ours, theirs = (
        NLA.from_pretrained(av=av, ar=ar, engine=e) for e in ("nnsight", "transformers")
    )
    assert torch.equal(ours.reconstruct(["a b"]), theirs.reconstruct(["a b"]))
