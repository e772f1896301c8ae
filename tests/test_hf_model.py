"""The probe on transformers models: hidden states that know where they come from."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import nla_lens
from nla_lens import NLA, NLAError, ResidualTensor
from nla_lens.models.anatomy import blocks_of, text_model
from nla_lens.models.cache_keyword import cache_keyword
from nla_lens.models.passes import has_hooks
from nla_lens.models.weights import load_causal_lm, load_tokenizer
from nla_lens.stream.origin import PADDING, UNKNOWN

from .recording import PASSES_MIX, plain_model

TEXTS = ["The garlic sizzles in the pan.", "Garlic"]
FAMILIES = ["llama", "gemma3", "qwen2"]
K = 3
NAMES = ["blocks.0.hook_resid_pre", *(f"blocks.{k}.hook_resid_post" for k in range(5))]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(source_dir: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    def make(family: str = "llama") -> tuple[Any, Any]:
        path = source_dir(family)
        tokenizer = load_tokenizer(path)
        tokenizer.pad_token_id = 0
        return load_causal_lm(path), tokenizer

    return make


def batch(tokenizer: Any, side: str = "left") -> dict[str, Tensor]:
    tokenizer.padding_side = side
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def wanted_positions(mask_BT: Tensor) -> Tensor:
    return (mask_BT.cumsum(-1) - 1).masked_fill(mask_BT == 0, PADDING)


def assert_known(states: Any, plain: Any, inputs: dict[str, Tensor], nla: NLA) -> None:
    assert type(states) is tuple and len(states) == len(plain) == len(NAMES) + 1
    for name, state, same in zip([*NAMES, None], states, plain, strict=True):
        assert state.equal(same)
        if name is None:
            assert type(state) is Tensor
            continue
        assert isinstance(state, ResidualTensor)
        assert state.hook_name == name and state.origin.nla is nla
        where = state.origin.where_LX3
        assert where[..., 0].equal(torch.arange(len(state))[:, None].expand(state.shape[:2]))
        assert where[..., 1].equal(wanted_positions(inputs["attention_mask"]))
        assert where[..., 2].equal(inputs["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_know_their_block(
    family: str, side: str, make: Callable[..., Any], nla: NLA
) -> None:
    model, tokenizer = make(family)
    inputs = batch(tokenizer, side)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with nla_lens.attach(model, nla):
            out = model(**inputs, output_hidden_states=True)
            quiet = model(**inputs)
        after = model(**inputs, output_hidden_states=True)
    assert out.logits.equal(plain.logits) and type(out.logits) is Tensor
    assert out.keys() == plain.keys() and quiet.keys() == model(**inputs).keys()
    assert_known(out.hidden_states, plain.hidden_states, inputs, nla)
    assert all(type(state) is Tensor for state in after.hidden_states)


def test_they_are_what_leaves_the_blocks(family: str, make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make(family)
    left: list[Tensor] = []
    for block in blocks_of(model):
        block.register_forward_hook(
            lambda module, args, out: left.append(out[0] if isinstance(out, tuple) else out)
        )
    with nla_lens.attach(model, nla), torch.no_grad():
        out = model(**batch(tokenizer), output_hidden_states=True)
    assert all(type(t) is Tensor for t in left)  # hooks of the user's see ordinary ones
    for k, state in enumerate(out.hidden_states[1:-1]):
        assert state.equal(left[k]) and state.hook_name == f"blocks.{k}.hook_resid_post"


def test_they_are_explained(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    with nla_lens.attach(model, nla), torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert nla.spec.layer == K
    found = states[K + 1][1].explain(max_new_tokens=3)
    mask, ids = inputs["attention_mask"][1], inputs["input_ids"][1]
    for e, position, token in zip(
        found, wanted_positions(mask[None])[0].tolist(), ids.tolist(), strict=True
    ):
        assert (e.hook_name, e.position, e.token_id) == (
            f"blocks.{K}.hook_resid_post",
            position,
            token,
        )
        assert e.token == tokenizer.decode([token])
        assert "other_layer" not in e.flags
        assert ("padding" in e.flags) == (position == PADDING)
    for k in (0, 1, K, K + 2):
        assert "other_layer" in states[k][0, -1].explain(max_new_tokens=1).flags
    bare = states[K + 1].as_ordinary()[0, -1]
    unknown = nla.explain(bare, max_new_tokens=3)
    assert (unknown.hook_name, unknown.position) == (None, None)
    assert unknown.token_ids == states[K + 1][0, -1].explain(max_new_tokens=3).token_ids


def test_the_model_inside_called_by_itself(family: str, make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make(family)
    inputs = batch(tokenizer)
    inside = model.model
    with torch.no_grad():
        plain = inside(**inputs, output_hidden_states=True)
        with nla_lens.attach(model, nla):
            out = inside(**inputs, output_hidden_states=True)
    assert_known(out.hidden_states, plain.hidden_states, inputs, nla)
    assert type(out.last_hidden_state) is Tensor
    with nla_lens.attach(inside, nla), torch.no_grad():
        assert_known(
            inside(**inputs, output_hidden_states=True).hidden_states,
            plain.hidden_states,
            inputs,
            nla,
        )


@pytest.mark.parametrize("asked", ["argument", "config", "index"])
def test_however_they_are_asked_for(asked: str, make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    with nla_lens.attach(model, nla), torch.no_grad():
        if asked == "config":
            model.config.output_hidden_states = True
            states = model(**inputs).hidden_states
        else:
            states = model(
                **inputs, output_hidden_states=[K + 1] if asked == "index" else True
            ).hidden_states
    assert states[K + 1].hook_name == f"blocks.{K}.hook_resid_post"
    assert states[K + 1][0, -1].origin.where_LX3[2] == inputs["input_ids"][0, -1]


def test_tuples(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    asked = {"output_hidden_states": True, "return_dict": False, "use_cache": False}
    with torch.no_grad():
        plain = model(**inputs, **asked)
        with nla_lens.attach(model, nla):
            out = model(**inputs, **asked)
            base = model.model(**inputs, **asked)
    assert type(out) is tuple and len(out) == len(plain)
    for found in (out, base):
        (states,) = [part for part in found if isinstance(part, tuple)]
        assert_known(states, plain[1], inputs, nla)


def test_attentions_stay_what_they_are(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    model.set_attn_implementation("eager")
    with nla_lens.attach(model, nla), torch.no_grad():
        out = model(
            **batch(tokenizer), output_hidden_states=True, output_attentions=True, return_dict=False
        )
    parts = [part for part in out if isinstance(part, tuple) and len(part) == 6]
    assert parts and all(type(t) is Tensor for part in parts for t in part if t.ndim == 4)


def test_positions_go_on_behind_a_cache(family: str, make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make(family)
    inputs = batch(tokenizer)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with nla_lens.attach(model, nla), torch.no_grad():
        first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        second = model(
            input_ids=ids[:, 4:],
            attention_mask=mask,
            output_hidden_states=True,
            **kept(model, first),
        )
    where = second.hidden_states[2].origin.where_LX3
    assert where[..., 1].equal(wanted_positions(mask)[:, 4:])
    assert where[..., 2].equal(ids[:, 4:])
    with nla_lens.attach(model, nla), torch.no_grad():
        first = model(input_ids=ids[:1, :4], use_cache=True)
        second = model(input_ids=ids[:1, 4:], output_hidden_states=True, **kept(model, first))
    assert second.hidden_states[2].origin.where_LX3[0, :, 1].tolist() == list(
        range(4, ids.shape[1])
    )


def kept(model: Any, output: Any) -> dict[str, Any]:
    """The cache of a pass, as the next one takes it."""
    keyword = cache_keyword(model)
    return {keyword: output[keyword]}


def test_generation(family: str, make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make(family)
    inputs = batch(tokenizer)
    asked = {
        **{"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False},
        **{"output_hidden_states": True, "return_dict_in_generate": True},
    }
    plain = model.generate(**inputs, **asked)
    with nla_lens.attach(model, nla):
        out = model.generate(**inputs, **asked)
    assert out.sequences.equal(plain.sequences)
    n, lengths = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(-1).tolist()
    assert len(out.hidden_states) == 3
    for step, (states, same) in enumerate(zip(out.hidden_states, plain.hidden_states, strict=True)):
        assert all(a.equal(b) for a, b in zip(states, same, strict=True))
        state = states[K + 1]
        assert state.hook_name == f"blocks.{K}.hook_resid_post" and type(states[-1]) is Tensor
        last = state[:, -1].origin.where_LX3
        assert last[:, 1].tolist() == [length - 1 + step for length in lengths]
        assert last[:, 2].equal(out.sequences[:, n - 1 + step])


def test_embeddings_have_positions_and_no_tokens(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with nla_lens.attach(model, nla), torch.no_grad():
        out = model(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
        )
    assert type(embeds) is Tensor  # the caller's own
    where = out.hidden_states[K + 1].origin.where_LX3
    assert where[..., 1].equal(wanted_positions(inputs["attention_mask"]))
    assert where[..., 2].eq(-1).all()
    assert out.hidden_states[0].hook_name == NAMES[0]


def test_positions_that_cannot_be_read_from_a_mask(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    ids = batch(tokenizer)["input_ids"][:1]
    n = ids.shape[1]
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    positions = torch.arange(n)[None] + 7
    with nla_lens.attach(model, nla), torch.no_grad():
        unknown = model(ids, mask, output_hidden_states=True).hidden_states[K + 1]
        said = model(ids, mask, position_ids=positions, output_hidden_states=True).hidden_states
    assert unknown.hook_name == f"blocks.{K}.hook_resid_post"
    assert unknown.origin.where_LX3[..., 1].eq(UNKNOWN).all()
    explained = unknown[0, -1].explain(max_new_tokens=1)
    assert explained.position is None and explained.token_id == ids[0, -1]
    assert "early_position" not in explained.flags
    assert said[1].origin.where_LX3[..., 1].equal(positions)


def test_a_mask_as_long_as_the_cache_will_be(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    n, name = ids.shape[1], cache_keyword(model)
    wanted = wanted_positions(mask)
    cache = StaticCache(config=model.config, max_cache_len=n + 8)
    with nla_lens.attach(model, nla), torch.no_grad():
        for begin, end in ((0, 4), (4, n)):
            seen = mask.clone()
            seen[:, end:] = 0
            out = model(
                ids[:, begin:end],
                attention_mask=torch.nn.functional.pad(seen, (0, 8)),
                output_hidden_states=True,
                **{name: cache},
            )
            found = out.hidden_states[K + 1].origin.where_LX3[..., 1]
            assert found.equal(wanted[:, begin:end])
        out = model(ids, torch.nn.functional.pad(mask, (0, 8)), output_hidden_states=True)
    assert out.hidden_states[K + 1].origin.where_LX3[..., 1].equal(wanted)


def test_padding_of_a_generation_with_a_static_cache(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    with nla_lens.attach(model, nla):
        out = model.generate(
            **inputs,
            max_new_tokens=2,
            do_sample=False,
            cache_implementation="static",
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    found = [states[K + 1].origin.where_LX3[..., 1] for states in out.hidden_states]
    wanted = wanted_positions(inputs["attention_mask"])
    assert found[0].equal(wanted) and found[1].equal(wanted[:, -1:] + 1)


def test_texts_packed_in_one_row(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    ids = batch(tokenizer)["input_ids"][:1, :6]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with nla_lens.attach(model, nla), torch.no_grad():
        states = model(ids, position_ids=positions, output_hidden_states=True).hidden_states
    assert states[K + 1].origin.where_LX3[..., 1].equal(positions)


def test_states_split_by_assisted_generation(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"].repeat(1, 2)
    with nla_lens.attach(model, nla):
        out = model.generate(
            ids,
            max_new_tokens=3,
            do_sample=False,
            prompt_lookup_num_tokens=2,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    first = out.hidden_states[0][K + 1]
    assert first.origin.where_LX3[0, :, 1].tolist() == list(range(ids.shape[1]))


# Wrapped


def test_compiled_in_place(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        model.compile(backend="eager")
        with nla_lens.attach(model, nla):
            with pytest.raises(IndexError):
                model(inputs["input_ids"] + 10**6, output_hidden_states=True)
            states = model(**inputs, output_hidden_states=True).hidden_states
        after = model(**inputs, output_hidden_states=True).hidden_states
    assert_known(states, plain, inputs, nla)
    assert type(after[K]) is Tensor


class Own(nn.Module):
    """A user's own module around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.scale, self.lm = nn.Parameter(torch.ones(())), model

    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.lm(
            input_ids=tokens, attention_mask=mask, output_hidden_states=True
        ).hidden_states


def test_in_a_module_of_the_users_own(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with nla_lens.attach(Own(model), nla) as probe:
            states = probe.model(inputs["input_ids"], inputs["attention_mask"])
    assert_known(states, plain, inputs, nla)


def test_in_data_parallel(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with nla_lens.attach(nn.DataParallel(model), nla) as probe:
            states = probe.model(**inputs, output_hidden_states=True).hidden_states
    assert_known(states, plain, inputs, nla)
    assert not has_hooks(model)


def test_compiled(make: Callable[..., Any], nla: NLA) -> None:
    torch._dynamo.reset()
    model, tokenizer = make()
    inputs = batch(tokenizer)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(**inputs, output_hidden_states=True).hidden_states
        with nla_lens.attach(compiled, nla):
            states = compiled(**inputs, output_hidden_states=True).hidden_states
    assert_known(states, plain, inputs, nla)


def test_with_peft(make: Callable[..., Any], nla: NLA) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = make()
    inputs = batch(tokenizer)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        plain = adapted(**inputs, output_hidden_states=True).hidden_states
        with nla_lens.attach(adapted, nla):
            states = adapted(**inputs, output_hidden_states=True).hidden_states
            with adapted.disable_adapter():
                bare = adapted(**inputs, output_hidden_states=True).hidden_states
    assert_known(states, plain, inputs, nla)
    assert not bare[2].equal(states[2]) and bare[2].hook_name == NAMES[2]
    prompted = peft.get_peft_model(
        make()[0], peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(NLAError, match="virtual"):
        nla_lens.attach(prompted, nla)


# Gradients


def test_gradients_of_hidden_states(make: Callable[..., Any], nla: NLA) -> None:
    def grads(model: Any) -> list[Tensor]:
        out = model(**inputs, labels=inputs["input_ids"], output_hidden_states=True)
        (direct,) = torch.autograd.grad(out.loss, out.hidden_states[K + 1], retain_graph=True)
        out.hidden_states[2].retain_grad()
        out.hidden_states[0].retain_grad()
        out.loss.backward()
        return [direct, out.hidden_states[2].grad, out.hidden_states[0].grad]

    model, tokenizer = make()
    model.requires_grad_()
    inputs = batch(tokenizer)
    plain = grads(model)
    with nla_lens.attach(model, nla):
        found = grads(model)
        state = model(**inputs, output_hidden_states=True).hidden_states[K + 1]
    assert all(type(a) is Tensor and a.equal(b) for a, b in zip(found, plain, strict=True))
    assert state.requires_grad and state[0, -1].explain(max_new_tokens=1).position is not None


def test_embeddings_of_the_callers_stay_ordinary(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    embeds = model.get_input_embeddings()(batch(tokenizer)["input_ids"]).detach().requires_grad_()
    with nla_lens.attach(model, nla):
        out = model(inputs_embeds=embeds, output_hidden_states=True)
    assert type(embeds) is Tensor
    assert out.hidden_states[0].hook_name == NAMES[0]


def test_a_steered_pass(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)

    def steer(module: nn.Module, args: Any, output: Any) -> Any:
        return output + 1 if isinstance(output, Tensor) else (output[0] + 1, *output[1:])

    blocks_of(model)[1].register_forward_hook(steer)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with nla_lens.attach(model, nla):
            states = model(**inputs, output_hidden_states=True).hidden_states
    assert_known(states, plain, inputs, nla)


# Attaching and detaching


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks")}
        for module in model.modules()
    ]


def test_detaching_leaves_the_model_as_it_was(make: Callable[..., Any], nla: NLA) -> None:
    model, _ = make()
    before, own = hooks_of(model), set(vars(model))
    probe = nla_lens.attach(model, nla)
    assert hooks_of(model) != before and not has_hooks(model)
    probe.detach()
    probe.detach()
    assert hooks_of(model) == before and set(vars(model)) == own
    assert "transformers" in repr(probe) or type(model).__name__ in repr(probe)


def test_a_second_probe_is_refused(make: Callable[..., Any], nla: NLA) -> None:
    model, _ = make()
    with nla_lens.attach(model, nla):
        for again in (model, model.model, nn.DataParallel(model), Own(model)):
            with pytest.raises(NLAError, match="has a probe already; detach it first"):
                nla_lens.attach(again, nla)
    nla_lens.attach(model, nla).detach()


def test_another_models_are_refused(nla: NLA) -> None:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "intermediate_size": 8, "num_attention_heads": 2}
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=6, **sizes))
    with pytest.raises(NLAError, match="d_model=32, the NLA reads d_model=64"):
        nla_lens.attach(wide, nla)
    short = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=K, **sizes))
    with pytest.raises(NLAError, match=f"has {K} blocks"):
        nla_lens.attach(short, nla)
    bert = BertModel(BertConfig(hidden_size=64, num_hidden_layers=6, **sizes))
    with pytest.raises(NLAError):
        nla_lens.attach(bert, nla)
    with pytest.raises(NLAError, match=r"no adapter for .*transformers"):
        nla_lens.attach(nn.Linear(2, 2), nla)
    fitting = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=6, **sizes)).eval()
    with nla_lens.attach(fitting, nla), torch.no_grad():
        states = fitting(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
    explained = states[K + 1][0, -1].explain(max_new_tokens=1)
    # Loaded from nowhere: the id is known, its text is not.
    assert (explained.token_id, explained.token) == (3, None)


def test_gpt2(nla: NLA) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=6, n_head=2)).eval()
    inputs = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]])}
    inputs["attention_mask"] = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with nla_lens.attach(model, nla):
            states = model(**inputs, output_hidden_states=True).hidden_states
    assert_known(states, plain, inputs, nla)


def test_a_pass_that_fails_is_over(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with nla_lens.attach(model, nla):

            def fail(*_: Any) -> None:
                raise KeyError("a hook of the user's")

            handle = blocks_of(model)[1].register_forward_hook(fail)
            with pytest.raises(KeyError, match="a hook of the user's"):
                model(**inputs, output_hidden_states=True)
            handle.remove()
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.tensor([[10**6]]), output_hidden_states=True)
            states = model(**inputs, output_hidden_states=True).hidden_states
    assert_known(states, plain, inputs, nla)


@pytest.fixture(params=["gpt2"] if PASSES_MIX else ["llama", "gpt2"])
def keeps_apart(request: pytest.FixtureRequest, make: Callable[..., Any]) -> tuple[Any, Any]:
    """A model of which transformers itself keeps apart what several passes record, and a tokenizer.

    See `tests/recording.py`.
    """
    model, tokenizer = make()
    return (model if request.param == "llama" else plain_model(request.param)), tokenizer


def test_threads_do_not_see_one_anothers_passes(keeps_apart: tuple[Any, Any], nla: NLA) -> None:
    model, tokenizer = keeps_apart
    ids = batch(tokenizer)["input_ids"]
    both_inside, first_is_over = threading.Barrier(2), threading.Event()
    found: dict[int, Tensor] = {}

    def wait(*_: Any) -> None:
        both_inside.wait(30)
        if threading.current_thread().name == "1":
            first_is_over.wait(30)

    def work(row: int) -> None:
        with torch.no_grad():
            states = model(input_ids=ids[row : row + 1], output_hidden_states=True).hidden_states
        found[row] = states[K + 1].origin.where_LX3[0, :, 2]
        first_is_over.set()

    with nla_lens.attach(model, nla):
        blocks_of(model)[1].register_forward_hook(wait)
        threads = [threading.Thread(target=work, args=(row,), name=str(row)) for row in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found[0].equal(ids[0]) and found[1].equal(ids[1])


def test_a_pass_in_a_pass(keeps_apart: tuple[Any, Any], nla: NLA) -> None:
    model, tokenizer = keeps_apart
    inputs = batch(tokenizer)
    other = inputs["input_ids"].flip(0)
    inner: list[Any] = []

    def run(*_: Any) -> None:
        if not inner:
            inner.append(None)
            inner.append(model(input_ids=other, output_hidden_states=True).hidden_states)

    with nla_lens.attach(model, nla), torch.no_grad():
        blocks_of(model)[2].register_forward_hook(run)
        outer = model(**inputs, output_hidden_states=True).hidden_states
    assert inner[1][K + 1].origin.where_LX3[..., 2].equal(other)
    assert outer[K + 1].origin.where_LX3[..., 2].equal(inputs["input_ids"])


def test_copies_and_pickles_of_a_model(make: Callable[..., Any], nla: NLA, tmp_path: Path) -> None:
    model, tokenizer = make()
    inputs = batch(tokenizer)
    probe = nla_lens.attach(model, nla)
    copied, buffer = copy.deepcopy(model), io.BytesIO()
    torch.save(model, buffer)
    model.save_pretrained(tmp_path)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert b"nla_lens.halves" not in buffer.getvalue()
    with torch.no_grad():
        assert copied(**inputs, output_hidden_states=True).hidden_states[1].origin.nla is nla
        probe.detach()
        for other in (copied, loaded):
            states = other(**inputs, output_hidden_states=True).hidden_states
            assert all(type(state) is Tensor for state in states)
            nla_lens.attach(other, nla).detach()


def test_extract_from_a_probed_model(make: Callable[..., Any], nla: NLA) -> None:
    model, tokenizer = make()
    wanted = nla_lens.extract(model, TEXTS, K, tokenizer=tokenizer)
    with nla_lens.attach(model, nla):
        found = nla_lens.extract(model, TEXTS, K, tokenizer=tokenizer)
        text = nla.explain_text(TEXTS[1], model=model, max_new_tokens=2, generate=1)
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    assert len(text) == len(found[1]) + 1
    assert text_model(model) is model.model
