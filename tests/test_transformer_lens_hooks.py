"""`.explain()` on what a TransformerLens hook is handed, in each class of it that is installed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nla_lens
from nla_lens import NLA, ResidualTensor
from nla_lens.stream.origin import PADDING

from .test_transformer_lens import AT_K, KINDS, K, load_from

TEXT = "The garlic sizzles in the pan."
LONG, SHORT = "hello there my friend, how are you", "hello there"


@pytest.fixture(scope="module", params=KINDS)
def fresh(request: pytest.FixtureRequest, source_dir: Callable[[str], Path]) -> Any:
    return load_from(request.param, source_dir("llama"))


@pytest.fixture
def model(fresh: Any) -> Iterator[Any]:
    yield fresh
    fresh.reset_hooks(including_permanent=True)


class Seen(list[Any]):
    """A hook that keeps what it is handed."""

    def __call__(self, resid: Tensor, hook: Any) -> None:
        self.append(resid)


def classes(model: Any) -> list[type]:
    return [type(module) for module in model.modules()]


def test_a_hook_explains_what_it_is_handed(model: Any, nla: NLA) -> None:
    seen, before, found = Seen(), Seen(), []

    def explain(resid: Tensor, hook: Any) -> None:
        found.append(resid[0, -1].explain(max_new_tokens=4))

    names = [(AT_K, seen), (f"blocks.{K}.hook_resid_pre", before), (AT_K, explain)]
    plain = model.run_with_hooks(TEXT, fwd_hooks=[(AT_K, plainly := Seen())])
    with nla_lens.attach(model, nla):
        logits = model.run_with_hooks(TEXT, fwd_hooks=names)
    ids = model.to_tokens(TEXT)[0].tolist()
    assert logits.equal(plain) and type(logits) is Tensor
    (resid,) = seen
    assert isinstance(resid, ResidualTensor) and resid.equal(plainly[0])
    assert resid.hook_name == AT_K and before[0].hook_name == f"blocks.{K}.hook_resid_pre"
    assert resid.origin.where_LX3.tolist() == [[[0, i, t] for i, t in enumerate(ids)]]
    (explained,) = found
    assert (explained.position, explained.token_id) == (len(ids) - 1, ids[-1])
    assert explained.hook_name == AT_K and "other_layer" not in explained.flags
    assert explained.token_ids == nla.explain(plainly[0][0, -1], max_new_tokens=4).token_ids
    wrong = before[0][0, -1].explain(max_new_tokens=1)
    assert "other_layer" in wrong.flags


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_stay(model: Any, nla: NLA, when: str, permanent: bool) -> None:
    seen = Seen()
    add = model.add_perma_hook if permanent else model.add_hook
    if when == "before":
        add(AT_K, seen)
    with nla_lens.attach(model, nla):
        if when == "after":
            add(AT_K, seen)
        model(TEXT)
        with model.hooks(fwd_hooks=[(AT_K, inner := Seen())]):
            model(SHORT)
        _, cache = model.run_with_cache(LONG)
    model(TEXT)
    for resid, text in zip(seen, (TEXT, SHORT, LONG), strict=False):
        assert resid.origin.where_LX3[0, :, 2].tolist() == model.to_tokens(text)[0].tolist()
    assert len(seen) == 4 and type(seen[3]) is Tensor  # after it was detached
    assert inner[0].hook_name == AT_K
    assert cache["resid_post", K].equal(seen[2]) and cache["resid_post", K].hook_name == AT_K


def edited(resid: Tensor, hook: Any) -> Tensor:
    return resid + 1


def edited_in_place(resid: Tensor, hook: Any) -> None:
    resid[:, -1] = 0
    resid *= 2


def moved(resid: Tensor, hook: Any) -> Tensor:
    return resid.flip(1)


@pytest.mark.parametrize("edit", [edited, edited_in_place, moved])
def test_edits_act_as_without_a_probe(model: Any, nla: NLA, edit: Callable[..., Any]) -> None:
    with torch.no_grad():
        plain = model.run_with_hooks(TEXT, fwd_hooks=[(AT_K, edit)])
        went_on: list[type] = []
        handle = model.blocks[K + 1].register_forward_pre_hook(
            lambda module, args, kwargs: went_on.extend(
                type(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim == 3
            ),
            with_kwargs=True,
        )
        try:
            with nla_lens.attach(model, nla):
                logits = model.run_with_hooks(
                    TEXT, fwd_hooks=[(AT_K, edit), (AT_K, seen := Seen())]
                )
        finally:
            handle.remove()
    assert logits.equal(plain) and type(logits) is Tensor
    assert went_on and ResidualTensor not in went_on[:1]
    if edit is moved:
        ids = model.to_tokens(TEXT)[0].tolist()
        # What a hook returned is what the next one is handed; the vectors know where they were.
        assert seen[0].origin.where_LX3[0, :, 2].tolist() == ids[::-1]
    if edit is edited:
        assert type(seen[0]) is Tensor


def test_rows_are_counted_from_their_own_first_token(model: Any, nla: NLA) -> None:
    with nla_lens.attach(model, nla), torch.no_grad():
        model.run_with_hooks([LONG, SHORT], padding_side="left", fwd_hooks=[(AT_K, seen := Seen())])
    positions = seen[0].origin.where_LX3[..., 1].tolist()
    n = len(positions[0])
    n_short = model.to_tokens(SHORT).shape[1]
    assert positions == [list(range(n)), [PADDING] * (n - n_short) + list(range(n_short))]


def test_steps_of_a_generation(model: Any, nla: NLA) -> None:
    model.add_hook(AT_K, seen := Seen())
    with nla_lens.attach(model, nla), torch.no_grad():
        model.generate(SHORT, max_new_tokens=3, do_sample=False, verbose=False)
    assert seen and all(isinstance(resid, ResidualTensor) for resid in seen)
    n = model.to_tokens(SHORT).shape[1]
    last = [resid.origin.where_LX3[0, -1, 1].item() for resid in seen]
    assert last == list(range(n - 1, n - 1 + len(seen)))


def test_the_batch_axis_may_be_taken_away(model: Any, nla: NLA) -> None:
    seen = Seen()

    def look(resid: Tensor, hook: Any) -> Tensor:
        seen.append(resid)
        return resid  # in TransformerLens 3 it must

    with nla_lens.attach(model, nla), torch.no_grad():
        try:
            model.run_with_hooks(TEXT, remove_batch_dim=True, fwd_hooks=[(AT_K, look)])
        except TypeError:
            return  # HookedTransformer has none
    assert seen[0].ndim == 2 and seen[0][-1].explain(max_new_tokens=1).position is not None


def test_a_run_from_the_middle(model: Any, nla: NLA) -> None:
    with nla_lens.attach(model, nla), torch.no_grad():
        _, cache = model.run_with_cache(TEXT)
        logits = model(TEXT)
        with model.hooks(fwd_hooks=[(AT_K, seen := Seen())]):
            try:
                again = model(cache["resid_pre", K], start_at_layer=K)
            except NotImplementedError:
                return  # TransformerBridge 3 cannot
    torch.testing.assert_close(again, logits)
    where = seen[0].origin.where_LX3
    assert where[0, :, 1].tolist() == list(range(logits.shape[1])) and where[..., 2].eq(-1).all()


def test_what_a_hook_saw_is_in_the_graph(model: Any, nla: NLA) -> None:
    def grads() -> list[Tensor]:
        seen = Seen()
        with torch.enable_grad():
            loss = model.run_with_hooks(TEXT, return_type="loss", fwd_hooks=[(AT_K, seen)])
            return [loss.detach(), *torch.autograd.grad(loss, seen[0])]

    model.requires_grad_(True)
    try:
        plain = grads()
        with nla_lens.attach(model, nla):
            found = grads()
    finally:
        model.requires_grad_(False)
    assert all(type(a) is Tensor and a.equal(b) for a, b in zip(found, plain, strict=True))


def test_detaching_gives_the_hook_points_back(model: Any, nla: NLA) -> None:
    before = classes(model)
    probe = nla_lens.attach(model, nla)
    assert classes(model) != before
    copied = copy.deepcopy(model)
    probe.detach()
    assert classes(model) == before and "forward" not in vars(model)
    with torch.no_grad():
        copied.run_with_hooks(TEXT, fwd_hooks=[(AT_K, seen := Seen())])
    assert type(seen[0]) is Tensor


def test_hooks_of_a_copy_see_ordinary_tensors(model: Any, nla: NLA) -> None:
    with nla_lens.attach(model, nla), torch.no_grad():
        copied = copy.deepcopy(model)
        copied.run_with_hooks(SHORT, fwd_hooks=[(AT_K, seen := Seen())])
        plain = model(TEXT)
    assert type(seen[0]) is Tensor and seen[0].shape[1] == model.to_tokens(SHORT).shape[1]
    assert plain.equal(model(TEXT))


def test_a_run_inside_a_hook(model: Any, nla: NLA) -> None:
    inner = Seen()

    def run(resid: Tensor, hook: Any) -> None:
        if not inner:
            inner.append(None)
            model(SHORT)

    with nla_lens.attach(model, nla), torch.no_grad():
        model.run_with_hooks(
            TEXT, fwd_hooks=[(f"blocks.{K - 1}.hook_resid_post", run), (AT_K, seen := Seen())]
        )
    ids = [resid.origin.where_LX3[0, :, 2].tolist() for resid in seen]
    assert ids == [model.to_tokens(text)[0].tolist() for text in (SHORT, TEXT)]


def test_threads_see_their_own_runs(model: Any, nla: NLA) -> None:
    inside, over = threading.Barrier(2), threading.Event()
    texts = [TEXT, "Onions and oil in a pan"]
    found: dict[int, list[int]] = {}

    def wait(resid: Tensor, hook: Any) -> None:
        inside.wait(60)
        if threading.current_thread().name == "1":
            over.wait(60)

    def look(resid: Tensor, hook: Any) -> None:
        found[int(threading.current_thread().name)] = resid.origin.where_LX3[0, :, 2].tolist()

    def work(row: int) -> None:
        with torch.no_grad():
            model(texts[row])
        over.set()

    with nla_lens.attach(model, nla):
        model.add_hook(f"blocks.{K - 1}.hook_resid_post", wait)
        model.add_hook(AT_K, look)
        threads = [threading.Thread(target=work, args=(row,), name=str(row)) for row in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert found == {row: model.to_tokens(text)[0].tolist() for row, text in enumerate(texts)}


# A dictionary of SAELens, spliced in


def spliced(kind: str, directory: Path) -> tuple[Any, Any]:
    sae_lens = pytest.importorskip("sae_lens")
    if kind == "HookedTransformer":
        from sae_lens import HookedSAETransformer

        model: Any = load_from(kind, directory)
        model.__class__ = HookedSAETransformer
        model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    else:
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

        model = SAETransformerBridge.boot_transformers(str(directory), device="cpu")
    config = sae_lens.StandardSAEConfig(d_in=64, d_sae=128)
    config.metadata.hook_name = AT_K
    sae = sae_lens.StandardSAE(config)
    torch.manual_seed(0)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_input_of_a_spliced_dictionary(
    kind: str, when: str, source_dir: Callable[[str], Path], nla: NLA
) -> None:
    model, sae = spliced(kind, source_dir("llama"))
    # SAELens' bridge knows no other name of it.
    place = AT_K if kind == "HookedTransformer" else f"blocks.{K}.hook_out"
    with torch.no_grad():
        plain = model.run_with_hooks(TEXT, fwd_hooks=[(place, wanted := Seen())])
        if when == "before":
            model.add_sae(sae)
        with nla_lens.attach(model, nla):
            if when == "after":
                model.add_sae(sae)
            name = next(n for n in model.hook_dict if n.endswith("hook_sae_input"))
            out = model.run_with_hooks(TEXT, fwd_hooks=[(name, seen := Seen())])
            _, cache = model.run_with_cache(TEXT)
            model.reset_saes()
            again = model.run_with_hooks(TEXT, fwd_hooks=[(place, after := Seen())])
    assert not out.equal(plain) and again.equal(plain)
    entries = getattr(cache, "cache_dict", cache)
    # After that SAELens' bridge calls no hook there any more, probe or not.
    assert len(after) == (kind == "HookedTransformer")
    for resid in (seen[0], entries[name], *after):
        assert isinstance(resid, ResidualTensor) and resid.equal(wanted[0])
        assert resid.hook_name == AT_K
        found = resid[0, -1].explain(max_new_tokens=1)
        assert found.token_id == model.to_tokens(TEXT)[0, -1] and "other_layer" not in found.flags
    assert type(entries[name.replace("sae_input", "sae_acts_post")]) is Tensor
