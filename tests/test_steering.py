"""Steering: what a steered model computes, framework by framework, against arithmetic done here."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nla_lens
from nla_lens import NLA, NLAError, NLAWarning, ResidualTensor, steer
from nla_lens.models.cache_keyword import cache_keyword
from nla_lens.stream import steering
from nla_lens.stream.origin import Origin

K, N_NEW = 3, 5
TEXT = "The garlic sizzles in the pan."
STRENGTH = 1.5


# --- the same four things of each framework -------------------------------------------------------


@dataclass
class Framework:
    """A model, and how it is run there.

    Attributes:
        model: What is steered.
        run: ids `[B, T]` to the residual at K and the logits.
        generate: ids, number of tokens and whether by a cache, to the ids written, argmax.
    """

    model: Any
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    generate: Callable[[Tensor, int, bool], list[int]]


def by_transformers(model: Any) -> Framework:
    def run(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        held: list[Tensor] = []
        # Behind the steering, as somebody's own hook would be.
        inner = getattr(model, "base_model", model)
        blocks = next(m for n, m in inner.named_modules() if n.endswith("layers"))

        def look(module: Any, args: Any, output: Any) -> None:
            held.append(output[0] if isinstance(output, tuple) else output)

        handle = blocks[K].register_forward_hook(look)
        try:
            logits = model(input_ids=ids_BT).logits
            return held[0], logits
        finally:
            handle.remove()

    def generate(ids_BT: Tensor, n: int, cached: bool) -> list[int]:
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        mask_BT = torch.ones_like(ids_BT)
        out = model.generate(input_ids=ids_BT, attention_mask=mask_BT, use_cache=cached, **options)
        return out[0, ids_BT.shape[1] :].tolist()

    return Framework(model, run, generate)


def by_transformer_lens(model: Any) -> Framework:
    def run(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        logits, cache = model.run_with_cache(ids_BT)
        return cache["resid_post", K], logits

    def generate(ids_BT: Tensor, n: int, cached: bool) -> list[int]:
        out = model.generate(
            ids_BT, max_new_tokens=n, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached,
            verbose=False,
        )  # fmt: skip
        return out[0, ids_BT.shape[1] :].tolist()

    return Framework(model, run, generate)


def by_nnsight(model: Any) -> Framework:
    def run(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        with model.trace(ids_BT):
            output = model.model.layers[K].output
            resid = (output[0] if isinstance(output, tuple) else output).save()
            logits = model.lm_head.output.save()
        return resid, logits

    def generate(ids_BT: Tensor, n: int, cached: bool) -> list[int]:
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        with model.generate(ids_BT, use_cache=cached, **options):
            out = model.generator.output.save()
        return out[0, ids_BT.shape[1] :].tolist()

    return Framework(model, run, generate)


KINDS = ["transformers"]
KINDS += ["peft"] if find_spec("peft") else []
KINDS += ["TransformerBridge"] if find_spec("transformer_lens.model_bridge") else []
KINDS += ["HookedTransformer"] if find_spec("transformer_lens.HookedTransformer") else []
KINDS += ["nnsight"] if find_spec("nnsight") else []


def open_kind(kind: str, path: Path) -> Framework:
    if kind in ("TransformerBridge", "HookedTransformer"):
        from .test_transformer_lens import load_from

        return by_transformer_lens(load_from(kind, path))
    if kind == "nnsight":
        import nnsight

        tokenizer = AutoTokenizer.from_pretrained(path)
        model = nnsight.TransformersModel(
            str(path), task="text-generation", tokenizer=tokenizer, dispatch=True
        )
        return by_nnsight(model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if kind == "peft":
        import peft

        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=True)
        model = peft.get_peft_model(model, config).eval()
    return by_transformers(model)


@pytest.fixture(scope="module")
def opened(source_dir: Callable[[str], Path]) -> Callable[[str], Framework]:
    held: dict[str, Framework] = {}
    return lambda kind: held.setdefault(kind, open_kind(kind, source_dir("llama")))


@pytest.fixture(params=KINDS)
def framework(request: pytest.FixtureRequest, opened: Callable[[str], Framework]) -> Framework:
    return opened(request.param)


@pytest.fixture(scope="module")
def plain(source_dir: Callable[[str], Path]) -> Any:
    """A transformers model that nobody steers."""
    return AutoModelForCausalLM.from_pretrained(source_dir("llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids_BT(source_dir: Callable[[str], Path]) -> Tensor:
    return torch.tensor([AutoTokenizer.from_pretrained(source_dir("llama"))(TEXT)["input_ids"]])


@pytest.fixture(scope="module")
def vector() -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(1)) * 7


@torch.no_grad()
def by_hand(plain: Any, ids_BT: Tensor, mask_BT: Any, vector: Tensor, strength: float) -> Any:
    """Residual and logits where `strength * ||h|| * v / ||v||` is added; nothing of the library."""
    found: list[Tensor] = []

    def put(module: Any, args: Any, output: Any) -> Any:
        resid = output[0] if isinstance(output, tuple) else output
        exact = resid.double()
        length = exact.square().sum(-1, keepdim=True).sqrt()
        added = strength * length * (vector.double() / vector.double().norm())
        steered = (exact + added * torch.as_tensor(mask_BT)[..., None]).to(resid.dtype)
        found.append(steered)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    handle = plain.model.layers[K].register_forward_hook(put)
    logits = plain(input_ids=ids_BT, use_cache=False).logits
    handle.remove()
    return found[0], logits


def written_by_hand(plain: Any, ids_BT: Tensor, mask: Any, vector: Tensor, strength: float) -> Any:
    """Argmax continuation, the whole text again for each token; `mask(position)` is steered."""
    grown = ids_BT
    for _ in range(N_NEW):
        mask_BT = torch.tensor([[mask(p) for p in range(grown.shape[1])]])
        _, logits = by_hand(plain, grown, mask_BT, vector, strength)
        grown = torch.cat([grown, logits[:, -1:].argmax(-1)], dim=1)
    return grown[0, ids_BT.shape[1] :].tolist()


def nowhere(p: int, n: int) -> bool:
    return False


@pytest.fixture(scope="module")
def by_arithmetic(plain: Any, ids_BT: Tensor, vector: Tensor) -> Callable[..., Any]:
    """`by_arithmetic(mask, strength)`: what `written_by_hand` writes, once for all frameworks."""
    n = ids_BT.shape[1]

    @cache
    def written(mask: Any, strength: float) -> Any:
        return written_by_hand(plain, ids_BT, lambda p: mask(p, n), vector, strength)

    return written


def close(a: Tensor, b: Tensor, within: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=within, atol=within * float(b.abs().max()))


# --- one pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        (-1, lambda p, n: p == n - 1),
        (2, lambda p, n: p == 2),
        ([1, -2], lambda p, n: p in (1, n - 2)),
        (slice(1, 4), lambda p, n: 1 <= p < 4),
        (slice(-3, None), lambda p, n: p >= n - 3),
        (slice(None, None, 2), lambda p, n: p % 2 == 0),
        (None, lambda p, n: True),
    ],
)
@torch.no_grad()
def test_a_pass_is_the_arithmetic(
    framework: Framework, plain: Any, ids_BT: Tensor, vector: Tensor, positions: Any, mask: Any
) -> None:
    n = ids_BT.shape[1]
    mask_BT = torch.tensor([[mask(p, n) for p in range(n)]])
    resid, before = framework.run(ids_BT)
    exact = resid.as_subclass(Tensor).double()
    added = STRENGTH * exact.norm(dim=-1, keepdim=True) * vector.double() / vector.double().norm()
    with steer(framework.model, vector, layer=K, positions=positions, strength=STRENGTH):
        steered, logits = framework.run(ids_BT)
    assert torch.equal(steered[~mask_BT], resid[~mask_BT])
    close(steered.double(), torch.where(mask_BT[..., None], exact + added, exact))
    # Blocks of other frameworks round in other places.
    close(logits, by_hand(plain, ids_BT, mask_BT, vector, STRENGTH)[1], 1e-5)
    assert not torch.equal(logits, before)
    again, after = framework.run(ids_BT)
    assert torch.equal(again, resid) and torch.equal(after, before)


# --- generation -----------------------------------------------------------------------------------


def forgets_its_cache(model: Any) -> bool:
    """Whether TransformerLens hands blocks a cache by a name that they no longer take.

    Its own generation is then garbage, steered or not. See `test_self_check.py`.
    """
    inside = getattr(model, "original_model", None)
    return inside is not None and cache_keyword(inside) == "cache"


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("positions", "steps", "mask"),
    [
        # -1 is the prompt's last token, and each that is written.
        (-1, None, lambda p, n: p >= n - 1),
        (-1, 0, lambda p, n: p == n - 1),
        (-1, slice(1, 3), lambda p, n: n <= p < n + 2),
        (-3, None, lambda p, n: p == n - 3),
        ([2, 5], None, lambda p, n: p in (2, 5)),
        (None, None, lambda p, n: True),
    ],
)
@torch.no_grad()
def test_generation_is_the_arithmetic_with_a_cache_and_without(
    framework: Framework, by_arithmetic: Any, ids_BT: Tensor, vector: Tensor,
    cached: bool, positions: Any, steps: Any, mask: Any,
) -> None:  # fmt: skip
    if cached and forgets_its_cache(framework.model):
        pytest.skip("this TransformerLens decodes wrongly with this transformers: docs/upstream")
    with steer(
        framework.model, vector, layer=K, positions=positions, steps=steps, strength=STRENGTH
    ):
        found = framework.generate(ids_BT, N_NEW, cached)
    assert found == by_arithmetic(mask, STRENGTH)
    assert framework.generate(ids_BT, N_NEW, cached) == by_arithmetic(nowhere, 0.0)


@torch.no_grad()
def test_logits_of_a_generation(opened: Any, plain: Any, ids_BT: Tensor, vector: Tensor) -> None:
    """Tokens can hide a difference: the logits of each step, by a cache."""
    model, n = opened("transformers").model, ids_BT.shape[1]
    with steer(model, vector, layer=K, strength=STRENGTH):
        out = model.generate(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=N_NEW,
            min_new_tokens=N_NEW, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    for step, logits in enumerate(out.logits):
        whole = out.sequences[:, : n + step]
        mask_BT = torch.arange(n + step)[None] >= n - 1
        wanted = by_hand(plain, whole, mask_BT, vector, STRENGTH)[1][:, -1]
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_moves_no_position(opened: Any, ids_BT: Tensor, vector: Tensor) -> None:
    model = opened("transformers").model
    short = ids_BT[:, :4]
    for side in ("left", "right"):
        gap = torch.zeros(1, ids_BT.shape[1] - 4, dtype=torch.long)
        parts, masks = [gap, short], [torch.zeros_like(gap), torch.ones_like(short)]
        if side == "right":
            parts, masks = parts[::-1], masks[::-1]
        rows = torch.cat([ids_BT, torch.cat(parts, 1)])
        mask_BT = torch.cat([torch.ones_like(ids_BT), torch.cat(masks, 1)])
        for positions in (-1, 1, -2, None):
            with steer(model, vector, layer=K, positions=positions, strength=STRENGTH):
                both = model(input_ids=rows, attention_mask=mask_BT).logits
                alone = model(input_ids=short).logits
            here = both[1:, -4:] if side == "left" else both[1:, :4]
            torch.testing.assert_close(here, alone, rtol=1e-4, atol=1e-4)


def test_extract_reads_the_steered_residual(framework: Framework, vector: Tensor) -> None:
    (before,) = nla_lens.extract(framework.model, TEXT, K)
    with steer(framework.model, vector, layer=K, positions=[1, -1], strength=2.0):
        (after,) = nla_lens.extract(framework.model, TEXT, K)
    wanted = before.as_ordinary().clone()
    for p in (1, -1):
        wanted[p] += 2 * wanted[p].norm() * vector / vector.norm()
    close(after.as_ordinary(), wanted)


@torch.no_grad()
def test_hidden_states_are_those_that_go_on(opened: Any, ids_BT: Tensor, vector: Tensor) -> None:
    model = opened("transformers").model
    before = model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    with steer(model, vector, layer=K, positions=None):
        after = model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    assert torch.equal(after[K], before[K]) and not torch.equal(after[K + 2], before[K + 2])
    # transformers 4.57 takes note of a block's output before any hook on the block.
    if hasattr(__import__("transformers.utils", fromlist=["x"]), "output_capturing"):
        assert not torch.equal(after[K + 1], before[K + 1])


@torch.no_grad()
def test_half_precision_is_rounded_once(source_dir: Any, ids_BT: Tensor, vector: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(source_dir("llama"), dtype=torch.bfloat16).eval()
    framework = by_transformers(model)
    resid, _ = framework.run(ids_BT)
    with steer(model, vector, layer=K, positions=None, strength=0.25):
        steered, _ = framework.run(ids_BT)
    wide = resid.float()
    wanted = wide + 0.25 * wide.norm(dim=-1, keepdim=True) * vector / vector.norm()
    assert steered.dtype == torch.bfloat16
    assert float((steered == wanted.to(torch.bfloat16)).float().mean()) > 0.999


# --- several, threads, what is left behind --------------------------------------------------------


@torch.no_grad()
def test_several_at_once_add_up(framework: Framework, ids_BT: Tensor, vector: Tensor) -> None:
    other = torch.randn(64, generator=torch.Generator().manual_seed(2))
    resid, _ = framework.run(ids_BT)
    exact = resid.as_subclass(Tensor).double()
    length = exact.norm(dim=-1, keepdim=True)
    with (
        steer(framework.model, vector, layer=K, positions=None, strength=1.0),
        steer(framework.model, other, layer=K, positions=None, strength=-0.5),
    ):
        both, _ = framework.run(ids_BT)
    directions = vector.double() / vector.double().norm() - 0.5 * other.double() / other.norm()
    close(both.double(), exact + length * directions)
    first = steer(framework.model, vector, layer=K, positions=None)
    second = steer(framework.model, other, layer=K, positions=None, strength=-0.5)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    alone, _ = framework.run(ids_BT)
    second.__exit__(None, None, None)
    close(alone.double(), exact - 0.5 * length * other.double() / other.double().norm())
    assert torch.equal(framework.run(ids_BT)[0], resid)


@torch.no_grad()
def test_entered_again(framework: Framework, ids_BT: Tensor, vector: Tensor) -> None:
    resid, _ = framework.run(ids_BT)
    mine = steer(framework.model, vector, layer=K)
    found = []
    with mine:
        found.append(framework.run(ids_BT)[0])
        with mine:
            found.append(framework.run(ids_BT)[0])
        found.append(framework.run(ids_BT)[0])
    with mine:
        found.append(framework.run(ids_BT)[0])
    assert all(torch.equal(each, found[0]) for each in found)
    assert not torch.equal(found[0], resid) and torch.equal(framework.run(ids_BT)[0], resid)


@torch.no_grad()
def test_other_threads_are_not_steered(
    framework: Framework, ids_BT: Tensor, vector: Tensor
) -> None:
    framework.run(ids_BT)
    resid, logits = framework.run(ids_BT)
    seen: dict[str, Tensor] = {}

    def work(name: str, strength: float) -> None:
        with torch.no_grad(), steer(framework.model, vector, layer=K, strength=strength):
            seen[name] = framework.run(ids_BT)[0]

    def look() -> None:
        with torch.no_grad():
            seen["other"] = framework.run(ids_BT)[0]

    with steer(framework.model, vector, layer=K, strength=2.0):
        for thread in (
            threading.Thread(target=look),
            threading.Thread(target=work, args=("work", 1.0)),
        ):
            thread.start()
            thread.join()
        seen["own"] = framework.run(ids_BT)[0]
    assert torch.equal(seen["other"], resid)
    own, work_ = ((seen[name] - resid)[0, -1].double() for name in ("own", "work"))
    close(own, 2 * work_)
    assert torch.equal(framework.run(ids_BT)[1], logits)


def hooks_of(model: Any) -> list[Any]:
    module = getattr(model, "_module", model)
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [list(getattr(m, kind).values()) for m in module.modules() for kind in kinds]


def test_nothing_is_left_behind(framework: Framework, ids_BT: Tensor, vector: Tensor) -> None:
    framework.run(ids_BT)
    model = framework.model
    before, own = hooks_of(model), set(vars(model))
    with pytest.raises(RuntimeError, match="mine"), steer(model, vector, layer=K):
        framework.run(ids_BT)
        raise RuntimeError("mine")
    with pytest.raises(NLAError, match="position -99"), ExitStack() as stack:
        stack.enter_context(steer(model, vector, layer=K, positions=-99))
        framework.run(ids_BT)
    assert hooks_of(model) == before and set(vars(model)) == own
    assert not steering._active
    interleaver = getattr(model, "interleaver", None) if "nnsight" in str(type(model)) else None
    assert interleaver is None or not interleaver.nla_acts


@torch.no_grad()
def test_a_copy_made_meanwhile_is_not_steered(opened: Any, ids_BT: Tensor, vector: Tensor) -> None:
    framework = opened("transformers")
    resid, _ = framework.run(ids_BT)
    with steer(framework.model, vector, layer=K, positions=None):
        copied = by_transformers(copy.deepcopy(framework.model))
        steered, _ = framework.run(ids_BT)
        during, _ = copied.run(ids_BT)
        again, _ = framework.run(ids_BT)
    after, _ = copied.run(ids_BT)
    assert torch.equal(during, resid) and torch.equal(after, resid)
    assert torch.equal(steered, again) and not torch.equal(steered, resid)


@torch.no_grad()
def test_with_a_probe(framework: Framework, nla: NLA, ids_BT: Tensor, vector: Tensor) -> None:
    """Whichever comes first, what is recorded is steered and what was there is there again."""
    plain_resid = framework.run(ids_BT)[0]
    with steer(framework.model, vector, layer=K):
        steered = framework.run(ids_BT)[0].as_subclass(Tensor)
        probe = nla_lens.attach(framework.model, nla)
        inside = framework.run(ids_BT)[0].as_subclass(Tensor)
    probed = framework.run(ids_BT)[0].as_subclass(Tensor)
    with steer(framework.model, vector, layer=K):
        other = framework.run(ids_BT)[0].as_subclass(Tensor)
        probe.detach()
    assert torch.equal(inside, steered) and torch.equal(other, steered)
    assert torch.equal(probed, plain_resid)
    assert torch.equal(framework.run(ids_BT)[0], plain_resid)


# --- which layer, and what is refused -------------------------------------------------------------


@torch.no_grad()
def test_the_layer_is_the_vectors_or_the_nlas(opened: Any, nla: NLA, ids_BT: Tensor) -> None:
    framework = opened("transformers")
    direction = nla.steering_vector("about garlic", "about onions")
    assert isinstance(direction, ResidualTensor)
    assert direction.hook_name == nla.spec.hook_name
    with steer(framework.model, direction) as first:
        of_vector, _ = framework.run(ids_BT)
    assert first.place.layer == nla.spec.layer
    other = steer(framework.model, direction.as_ordinary() * 3, nla=nla)
    assert other.place == first.place
    close(other.vector_D, first.vector_D)
    assert steer(framework.model, direction, layer=1, nla=nla).place.layer == 1
    assert of_vector is not None


def test_bad_input_is_named_before_a_model_runs(framework: Framework, vector: Tensor) -> None:
    entering = ResidualTensor.wrap(
        vector[None], Origin("blocks.0.hook_resid_pre", torch.tensor([[0, 0, 1]]))
    )
    nan, zero = torch.full((64,), float("nan")), torch.zeros(64)
    for arguments, named in [
        ({"vector": torch.ones(63), "layer": K}, "63"),
        ({"vector": torch.ones(2, 64), "layer": K}, "one vector"),
        ({"vector": nan, "layer": K}, "nan"),
        ({"vector": zero, "layer": K}, "zero"),
        ({"vector": torch.ones(64, dtype=torch.long), "layer": K}, "int64"),
        ({"vector": vector}, "layer="),
        ({"vector": vector, "layer": 6}, "layer 6 does not exist"),
        ({"vector": vector, "layer": -1}, "layer=-1"),
        ({"vector": vector, "layer": True}, "layer=True"),
        ({"vector": entering}, "layer -1 does not exist"),
        ({"vector": vector, "nla": "tiny"}, "not an NLA"),
        ({"vector": vector, "layer": K, "strength": float("inf")}, "strength=inf"),
        ({"vector": vector, "layer": K, "strength": "2"}, "strength='2'"),
        ({"vector": vector, "layer": K, "positions": "last"}, "positions='last'"),
        ({"vector": vector, "layer": K, "positions": 1.0}, "positions=1.0"),
        ({"vector": vector, "layer": K, "positions": []}, "empty"),
        ({"vector": vector, "layer": K, "positions": slice(None, None, -1)}, "positions=slice"),
        ({"vector": vector, "layer": K, "steps": -1}, "steps=-1"),
    ]:
        with pytest.raises(NLAError, match=named):
            steer(framework.model, **arguments)
    with pytest.raises(NLAError):
        steer("gpt2", vector, layer=K)
    with pytest.raises(NLAError, match="pickled"):
        pickle.dumps(steer(framework.model, vector, layer=K))


def test_positions_that_never_came_up(opened: Any, ids_BT: Tensor, vector: Tensor) -> None:
    framework = opened("transformers")
    with (
        pytest.warns(NLAWarning, match="changed nothing"),
        steer(framework.model, vector, layer=K, positions=500),
    ):
        framework.run(ids_BT)


# --- nnsight --------------------------------------------------------------------------------------


@pytest.mark.skipif("nnsight" not in KINDS, reason="nnsight is not installed")
@torch.no_grad()
def test_what_a_trace_reads_and_writes(opened: Any, ids_BT: Tensor, vector: Tensor) -> None:
    framework = opened("nnsight")
    model = framework.model
    with steer(model, vector, layer=K, positions=None):
        resid, logits = framework.run(ids_BT)
        with model.trace() as tracer:
            with tracer.invoke(ids_BT):
                rows = model.model.layers[K].output.save()
                entering = model.model.layers[K + 1].input.save()
            with tracer.invoke(ids_BT[:, :4]):
                short = model.model.layers[K].output.save()
        with model.trace(ids_BT) as tracer:
            tracer.stop()
        one_shot = model.trace(ids_BT, trace=False).logits
        module = model._module(input_ids=ids_BT).logits
    first = [x[0] if isinstance(x, tuple) else x for x in (rows, short)]
    close(first[0], resid)
    close(entering, resid)
    close(first[1][:, -4:], resid[:, :4])
    assert torch.equal(one_shot, logits) and torch.equal(module, logits)


@pytest.mark.skipif("nnsight" not in KINDS, reason="nnsight is not installed")
def test_nothing_is_steered_on_a_server(source_dir: Any, opened: Any, vector: Tensor) -> None:
    import nnsight

    path = str(source_dir("llama"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    away = nnsight.TransformersModel(path, task="text-generation", tokenizer=tokenizer)
    with pytest.raises(NLAError, match=r"not loaded in this process.*NDIF"):
        steer(away, vector, layer=K)
    model = opened("nnsight").model
    with steer(model, vector, layer=K):
        for remote in (True, "local"):
            with pytest.raises(NLAError, match="only in this process"):
                model.trace(TEXT, remote=remote)
