"""Rows that leave early and rows that join late write what they would have written alone."""

from collections.abc import Sequence

import pytest
import torch

from nla_lens import NLA, NLAError

from .checkpoints import FAMILIES, reference, vectors
from .scripted import scripted

N_TOKENS = 24


def stops(ids: Sequence[int]) -> bool:
    """A rule that ends rows at many lengths, as the closing tag would."""
    return len(ids) > 7 and sum(ids) % 7 == 0


def cut(ids: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """The part of a full continuation that is generated under `stops`."""
    for n in range(1, len(ids) + 1):
        if stops(ids[:n]) or ids[n - 1] in eos_ids:
            return list(ids[:n])
    return list(ids)


def many_vectors() -> torch.Tensor:
    return torch.cat([vectors(seed=seed) for seed in range(4)])


@pytest.fixture(
    scope="module", params=[(f, r) for f in FAMILIES for r in ("replace", "norm_matched_add")]
)
def case(request: pytest.FixtureRequest, load_pair, pair_dirs) -> tuple[NLA, list[list[int]]]:
    family, rule = request.param
    av = reference.AV(pair_dirs(family, rule)[0], rule)
    full = av.greedy(many_vectors(), N_TOKENS).ids.tolist()
    nla = load_pair(family, rule)
    return nla, [cut(ids, nla.verbalizer.engine.eos_ids) for ids in full]


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_every_row_is_as_if_alone(
    case: tuple[NLA, list[list[int]]], batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nla, wanted = case
    # One at a time, where nothing leaves or joins, a few show what all would.
    given = many_vectors()[: 4 if batch_size == 1 else None]
    monkeypatch.setattr(nla.verbalizer, "is_closed", stops)
    found = nla.explain(given, max_new_tokens=N_TOKENS, score=False, batch_size=batch_size)
    assert [list(e.token_ids) for e in found] == wanted[: len(given)]
    assert len({len(ids) for ids in wanted}) > 3, "lengths must differ for rows to come and go"


def test_the_batch_stays_full(load_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are over make room: fewer passes than batches that wait for their longest row."""
    nla = load_pair("qwen2", "replace")
    run, passes = nla.verbalizer.engine.run, []

    def counted(ids, cache, **options):
        passes.append(len(ids))
        return run(ids, cache, **options)

    monkeypatch.setattr(nla.verbalizer, "is_closed", stops)
    monkeypatch.setattr(nla.verbalizer.engine, "run", counted)
    found = nla.explain(many_vectors(), max_new_tokens=N_TOKENS, score=False, batch_size=4)
    lengths = [len(e.token_ids) for e in found]
    waiting_for_the_longest = sum(max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    assert len([n for n in passes if n]) < waiting_for_the_longest
    assert max(passes) <= 4


def test_the_prefix_is_never_written_to(load_pair) -> None:
    nla = load_pair("gemma3_text", "replace")
    first = nla.explain(vectors(), max_new_tokens=8, score=False)
    prefix = nla.verbalizer.engine._decoder._prefix[1]
    kept = [layer.keys.clone() for layer in prefix.layers]
    again = nla.explain(vectors(), max_new_tokens=8, score=False)
    assert again == first
    assert all(torch.equal(layer.keys, k) for layer, k in zip(prefix.layers, kept, strict=True))


def test_another_prompt_has_another_prefix(load_pair) -> None:
    nla = load_pair("llama", "replace")
    plain = nla.explain(vectors(), max_new_tokens=8, score=False)
    other = nla.explain(
        vectors(), max_new_tokens=8, score=False, prompt="Say: <concept><INJECT></concept>"
    )
    assert [e.token_ids for e in other] != [e.token_ids for e in plain]
    assert nla.explain(vectors(), max_new_tokens=8, score=False) == plain


def test_what_ended_out_of_turn_before_a_failure_is_kept(nla: NLA) -> None:
    """Row 0 is still being written when the model fails; rows 1 and 3 are done."""
    answers = ["zero", "one", "two", "three"]
    wanted = scripted(nla, answers).explain(vectors(n=4), max_new_tokens=8)
    failing = scripted(nla, answers, order=[3, 1, 0, 2], fail_after=2)
    with pytest.raises(NLAError, match="after 0 of 4") as caught:
        failing.explain(vectors(n=4), max_new_tokens=8)
    assert len(caught.value.explanations) == 0
    assert caught.value.later == {1: wanted[1], 3: wanted[3]}
    failing = scripted(nla, answers, order=[3, 0, 1, 2], fail_after=2)
    with pytest.raises(NLAError, match="after 1 of 4") as caught:
        failing.explain(vectors(n=4), max_new_tokens=8)
    assert caught.value.explanations.flat == [wanted[0]]
    assert caught.value.later == {3: wanted[3]}
