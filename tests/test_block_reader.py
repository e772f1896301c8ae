"""Reading a block without the work that is not needed: the same numbers, and less of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import nla_lens
from nla_lens import NLA
from nla_lens.models import block_reader, onednn
from nla_lens.models.anatomy import text_model
from nla_lens.models.batching import padded_batches, right_padded
from nla_lens.models.block_reader import BlockReader, common_prefix
from nla_lens.models.passes import has_hooks

from .checkpoints import EXPLANATIONS, FAMILIES, build_source
from .checkpoints.configs import SLIDING_WINDOW

N_BLOCKS = 6
CPU = torch.device("cpu")
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable:
    def load(family: str):
        path = build_source(tmp_path_factory.mktemp(family), family)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    return cache(load)


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that wide models get, for the small ones of the tests."""
    monkeypatch.setattr(block_reader, "WIDE", 0)
    monkeypatch.setattr(onednn, "_WORTH_A_CALL", 0)


@torch.no_grad()
def plain(model, ids: list[int], layer: int) -> Tensor:
    """A block's output in a plain pass over one row, `[T, d]`."""
    seen: list[Tensor] = []

    def hook(module, args, output) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = text_model(model).layers[layer].register_forward_hook(hook)
    model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0][0]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def prompts_of(lengths: list[int], n_shared: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(20, 500, (sum(lengths) + n_shared,), generator=generator).tolist()
    shared, rest = ids[:n_shared], iter(ids[n_shared:])
    return [shared + list(itertools.islice(rest, n)) for n in lengths]


@contextmanager
def token_counts(model, path: str) -> Iterator[list[int]]:
    """How many tokens each pass of a module sees; forward is wrapped: hooks would be noticed."""
    module, seen = model.get_submodule(path), []
    forward = module.forward

    def counting(x: Tensor, *args, **kwargs):
        seen.append(x.shape[0] * x.shape[1])
        return forward(x, *args, **kwargs)

    module.forward = counting
    try:
        yield seen
    finally:
        del module.forward


LENGTHS = [5, 40, 1, 17, 18, 17, 90, 3, 19]


# --- the same numbers -----------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("layer", [0, 3, N_BLOCKS - 1])
@pytest.mark.parametrize("n_shared", [0, 12, SLIDING_WINDOW + 30])
def test_as_a_plain_pass(whole, family: str, layer: int, n_shared: int) -> None:
    model = whole(family)
    prompts = prompts_of(LENGTHS, n_shared)
    everything = [plain(model, ids, layer) for ids in prompts]
    some = [[0, 2, -1, -2], [-1, 0], [0], [-1, -3], [], [3, 3], [-2], [-1], [5, 1]]
    for positions in (
        [[len(ids) - 1] for ids in prompts],
        [[p % len(ids) for p in at] for ids, at in zip(prompts, some, strict=True)],
        [list(range(len(ids))) for ids in prompts],
    ):
        for batch_size in (None, 2):
            found = BlockReader(model, layer).read(prompts, positions, batch_size)
            assert [tuple(x.shape) for x in found] == [(len(at), 64) for at in positions]
            for x, wanted, at in zip(found, everything, positions, strict=True):
                assert not at or relative(x, wanted[at]) < 5e-6
                assert x.untyped_storage().nbytes() == x.numel() * 4


@each_family
def test_a_kept_prefix_stays_as_it_was(whole, family: str) -> None:
    """Called again and again, with other texts, fewer, one, and another prefix in between."""
    model = whole(family)
    reader = BlockReader(model, 3)
    first, other = prompts_of([9, 30, 14], 25), prompts_of([4, 8, 60, 2], 40)
    calls = [first, first[:2], first[1:2], other, first, [first[0][:26]], [first[0][:5]]]
    for prompts in calls:
        found = reader.read(prompts, [[len(ids) - 1] for ids in prompts])
        for x, ids in zip(found, prompts, strict=True):
            assert relative(x, plain(model, ids, 3)[-1:]) < 5e-6
        if reader._prefix is not None:
            ids, kept = reader._prefix
            assert all(layer.keys.shape[-2] == len(ids) for layer in kept.layers)
            assert all(layer.keys.shape[0] == 1 for layer in kept.layers)
    reader.forget_prefix()
    assert reader._prefix is None


@each_family
def test_reconstructions(load_pair, family: str) -> None:
    """With the template's tokens shared; one by one, nothing of a batch is in the numbers."""
    nla: NLA = load_pair(family, "replace")
    texts = [*EXPLANATIONS, "", " ", "<text>", "long " * 60, "x"]
    nla.reconstructor.engine.forget_prefix()
    together = nla.reconstruct(texts)
    assert nla.reconstructor.engine.reader._prefix is not None
    stack, weight = text_model(nla.reconstructor.engine.model), nla.reconstructor.weight_DD
    for i, text in enumerate(texts):
        resid_TD = plain(stack, nla.reconstructor.prompt_ids(text), len(stack.layers) - 1)
        assert relative(together[i], weight @ resid_TD[-1]) < 2e-5


def test_tokens_that_merge_over_the_templates_end(load_pair) -> None:
    """Ids are compared: what a text's first letters merge with is not taken for shared."""
    nla: NLA = load_pair("qwen2", "replace")
    texts = [">>>", ">>> b", "> a", ">>"]
    prompts = [nla.reconstructor.prompt_ids(text) for text in texts]
    shared = common_prefix(prompts)
    assert all(ids[: len(shared)] == shared for ids in prompts)
    together = nla.reconstruct(texts)
    nla.reconstructor.engine.forget_prefix()
    for i, text in enumerate(texts):
        assert relative(together[i], nla.reconstruct([text])[0]) < 2e-5


def test_half_precision(tmp_path) -> None:
    path = build_source(tmp_path, "qwen2")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    prompts = prompts_of([9, 30, 14], 25)
    found = BlockReader(model, 3).read(prompts, [[len(ids) - 1] for ids in prompts])
    for x, ids in zip(found, prompts, strict=True):
        assert x.dtype == torch.bfloat16
        assert relative(x.float(), plain(model, ids, 3)[-1:].float()) < 0.05


# --- less work ------------------------------------------------------------------------------------


def test_tokens_after_the_last_one_asked_for_do_not_run(whole) -> None:
    model = whole("llama")
    prompts = prompts_of([50, 50])
    with token_counts(model, "model.layers.0.mlp") as seen:
        BlockReader(model, 3).read(prompts, [[4], [2, 7]])
    assert sum(seen) <= 16


def test_the_last_block_runs_for_the_tokens_asked_for(whole) -> None:
    model = whole("llama")
    prompts = prompts_of([50, 50, 47])
    with (
        token_counts(model, "model.layers.2.mlp") as before,
        token_counts(model, "model.layers.3.mlp") as last,
        token_counts(model, "model.layers.4.mlp") as after,
    ):
        BlockReader(model, 3).read(prompts, [[49], [1, 49], [46]])
    assert (sum(before), sum(last), after) == (150, 4, [])


def test_a_shared_prefix_runs_once(whole) -> None:
    model = whole("llama")
    prompts = prompts_of([10] * 8, 100)
    with token_counts(model, "model.layers.0.mlp") as seen:
        BlockReader(model, 3).read(prompts, [[len(ids) - 1] for ids in prompts])
    assert sum(seen) == 100 + 8 * 10


def test_a_family_with_another_state_shares_nothing(whole, monkeypatch) -> None:
    model = whole("llama")
    monkeypatch.setattr(block_reader, "_CACHED", set())
    prompts = prompts_of([10] * 8, 100)
    with token_counts(model, "model.layers.0.mlp") as seen:
        BlockReader(model, 3).read(prompts, [[len(ids) - 1] for ids in prompts])
    assert sum(seen) == 8 * 110


def test_a_models_own_hooks_see_whole_texts(whole) -> None:
    model, seen = whole("llama"), []
    ids = prompts_of([30])[0]
    handle = model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape)) or 2 * output
    )
    try:
        (found,) = BlockReader(model, 3).read([ids], [[4]])
        wanted = plain(model, ids, 3)
    finally:
        handle.remove()
    assert seen == [(1, 30, 64)] * 2
    assert torch.equal(found, wanted[[4]])
    assert relative(found, plain(model, ids, 3)[[4]]) > 0.01


def test_transformers_own_hooks_do_not_count(whole) -> None:
    model = whole("qwen3")
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert not has_hooks(model)


def test_no_hook_is_left(whole) -> None:
    model = whole("llama")
    BlockReader(model, 3).read(prompts_of([30, 30]), [[4], [29]])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_extract_cuts_and_pads_wide_models(whole, source_dir, nla: NLA) -> None:
    model, tokenizer = whole("llama"), nla.verbalizer.tokenizer
    texts = ["A letter from a teacher.", "x", "The same length of it.", "Two friends speak."] * 3
    found = nla_lens.extract(model, texts, 3, [0, -1], tokenizer=tokenizer)
    for text, resid in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert relative(resid.as_ordinary(), plain(model, ids, 3)[[0, -1]]) < 5e-6
        assert resid.origin.where_LX3[:, 1].tolist() == [0, len(ids) - 1]


# --- batches --------------------------------------------------------------------------------------


def cost(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(40 + len(rows) * max(lengths[row] for row in rows) for rows in batches)


@pytest.mark.parametrize(
    "lengths",
    [[], [7], [30] * 50, list(range(20, 150)), [5] * 40 + [3000], [1, 9999, 1, 9999], [1] * 600],
    ids=["none", "one", "equal", "spread", "one-very-long", "two-very-long", "tiny"],
)  # fmt: skip
def test_batches_hold_each_row_once_and_cost_no_more_than_one_by_one(lengths) -> None:
    batches = list(padded_batches(lengths, CPU))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    alone = [[row] for row in range(len(lengths))]
    assert cost(lengths, batches) <= cost(lengths, alone)
    for rows in batches:
        longest = max(lengths[row] for row in rows)
        assert len(rows) == 1 or longest * len(rows) <= 2048


def test_batches_are_the_cheapest_there_are() -> None:
    lengths = [3, 41, 40, 90, 12, 77, 75, 150]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    every = []
    for cuts in itertools.product([0, 1], repeat=len(lengths) - 1):
        batches = [[order[0]]]
        for cut, row in zip(cuts, order[1:], strict=True):
            batches = [*batches, [row]] if cut else [*batches[:-1], [*batches[-1], row]]
        every.append(cost(lengths, batches))
    assert cost(lengths, list(padded_batches(lengths, CPU))) == min(every)


def test_batches_as_asked_for() -> None:
    lengths = [4, 9, 4, 4, 9, 2]
    assert all(len(rows) <= 2 for rows in padded_batches(lengths, CPU, 2))
    for rows in padded_batches(lengths, CPU, equal=True):
        assert len({lengths[row] for row in rows}) == 1


def test_right_padded() -> None:
    assert right_padded([[1], [2, 3, 4]]).tolist() == [[1, 0, 0], [2, 3, 4]]
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 9]]) == [1, 2]
    assert common_prefix([[5, 6]]) == [5, 6]
    assert common_prefix([[5], [6]]) == []
