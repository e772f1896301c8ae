"""`nla_lens.extract` and `explain_text`: the right block, position and tokens, and no more work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nla_lens
from nla_lens import NLA, NLAError, ResidualTensor
from nla_lens.models.anatomy import text_model
from nla_lens.stream import hf_source

from .checkpoints import FAMILIES, build_pair, build_source
from .checkpoints.configs import SLIDING_WINDOW

LAYER, N_BLOCKS = 3, 6
TEXTS = [
    "A letter from a teacher.",
    "x",
    "The text is a recipe. The words before the vector name a pan, some garlic and an onion, and "
    "then the salt that goes in next, and what comes after that.",
    "Two friends speak.",
    "{a} <|eot_id|> ㎡",
    "The same length of it.",
]
CHAT = [
    {"role": "user", "content": "What is in the pan?"},
    {"role": "assistant", "content": "Some garlic."},
]
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Callable[[str], Path]:
    return cache(lambda family: build_source(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def whole(source) -> Callable:
    """The whole model and its tokenizer, as transformers loads them."""

    def load(family: str):
        model = AutoModelForCausalLM.from_pretrained(source(family), dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(source(family))

    return cache(load)


def n_hooks(model) -> int:
    """transformers 5 has some of its own."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def hidden_states(model, ids: list[int]) -> tuple[Tensor, ...]:
    """All of one row, without padding, cache or hooks; `[T, d]` each."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return tuple(state[0] for state in out.hidden_states)


def relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


# --- the right numbers ----------------------------------------------------------------------------


@each_family
def test_it_is_hidden_states_k_plus_1(source, whole, family: str) -> None:
    model, tokenizer = whole(family)
    resids = nla_lens.extract(str(source(family)), TEXTS, LAYER)
    assert len(resids) == len(TEXTS)
    for row, (text, resid) in enumerate(zip(TEXTS, resids, strict=True)):
        ids = tokenizer(text)["input_ids"]
        states = hidden_states(model, ids)
        assert isinstance(resid, ResidualTensor) and resid.shape == (len(ids), 64)
        assert relative(resid, states[LAYER + 1]) < 1e-6
        assert relative(resid, states[LAYER]) > 0.01  # the input of block K is something else
        assert resid.hook_name == "blocks.3.hook_resid_post"
        assert resid.origin.where_LX3.tolist() == [[row, i, t] for i, t in enumerate(ids)]
    assert max(map(len, resids)) > SLIDING_WINDOW


@each_family
def test_directory_and_model_say_the_same(source, whole, family: str) -> None:
    model, tokenizer = whole(family)
    by_path = nla_lens.extract(source(family), TEXTS, LAYER)
    hooks = n_hooks(model)
    for resids in (
        nla_lens.extract(model, TEXTS, LAYER),
        nla_lens.extract(model, TEXTS, LAYER, tokenizer=tokenizer),
        nla_lens.extract(text_model(model), TEXTS, LAYER, tokenizer=tokenizer),
    ):
        assert all(map(torch.equal, resids, by_path))
    assert n_hooks(model) == hooks


@each_family
@pytest.mark.parametrize("layer", [0, LAYER, N_BLOCKS - 1])
def test_every_layer(source, whole, family: str, layer: int) -> None:
    """Also the last one, whose entry in `hidden_states` has been through the final norm."""
    model, tokenizer = whole(family)
    (resid,) = nla_lens.extract(model, TEXTS[2], layer)
    captured: list[Tensor] = []
    handle = (
        text_model(model)
        .layers[layer]
        .register_forward_hook(
            lambda module, args, output: captured.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    )
    states = hidden_states(model, tokenizer(TEXTS[2])["input_ids"])
    handle.remove()
    assert relative(resid, captured[0].reshape(resid.shape)) < 1e-6
    assert (relative(resid, states[layer + 1]) < 1e-6) is (layer < N_BLOCKS - 1)
    (by_path,) = nla_lens.extract(source(family), TEXTS[2], layer)
    assert relative(by_path, captured[0].reshape(resid.shape)) < 1e-6


@each_family
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_of_unequal_lengths_equal_single_runs(
    source, whole, family: str, batch_size: int
) -> None:
    model, _ = whole(family)
    single = [nla_lens.extract(model, [text], LAYER)[0] for text in TEXTS]
    together = nla_lens.extract(model, TEXTS, LAYER, batch_size=batch_size)
    assert [t.shape for t in together] == [s.shape for s in single]
    assert max(map(relative, together, single)) < 2e-6
    doubled = nla_lens.extract(model, TEXTS * 2, LAYER, batch_size=batch_size)
    assert max(map(relative, doubled, single * 2)) < 2e-6
    backwards = nla_lens.extract(model, TEXTS[::-1], LAYER, batch_size=batch_size)
    assert max(map(relative, backwards[::-1], single)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_the_models_dtype(source, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(source("qwen2"), dtype=dtype).eval()
    (resid,) = nla_lens.extract(model, "A letter.", LAYER)
    assert resid.dtype == dtype


# --- tokens ---------------------------------------------------------------------------------------


@each_family
def test_chat_messages_are_rendered_once(source, whole, family: str) -> None:
    model, tokenizer = whole(family)
    (resid,) = nla_lens.extract(model, [CHAT], LAYER)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert resid.origin.where_LX3[:, 2].tolist() == ids
    assert relative(resid, hidden_states(model, ids)[LAYER + 1]) < 1e-6
    bos = tokenizer.bos_token_id
    if bos is not None:
        assert [ids[0], ids.count(bos)] == [bos, 1]


@each_family
def test_plain_text_gets_the_special_tokens_once(whole, family: str) -> None:
    model, tokenizer = whole(family)
    (resid,) = nla_lens.extract(model, "A letter.", LAYER)
    ids = resid.origin.where_LX3[:, 2].tolist()
    assert ids == tokenizer("A letter.")["input_ids"]
    bos = tokenizer.bos_token_id
    assert ids.count(bos) == (0 if bos is None else 1)


def test_texts_and_chats_mixed(whole) -> None:
    model, _ = whole("llama")
    resids = nla_lens.extract(model, ["A letter.", CHAT, "x"], LAYER)
    alone = [nla_lens.extract(model, [text], LAYER)[0] for text in ("A letter.", CHAT, "x")]
    assert max(map(relative, resids, alone)) < 1e-6


def test_one_text_alone(whole) -> None:
    model, _ = whole("llama")
    assert torch.equal(
        nla_lens.extract(model, "A letter.", 2)[0], nla_lens.extract(model, ["A letter."], 2)[0]
    )
    assert nla_lens.extract(model, [], 2) == []


def test_the_explained_token_is_known(whole, nla: NLA) -> None:
    model, tokenizer = whole("llama")
    (resid,) = nla_lens.extract(model, "A letter from a teacher.", LAYER)
    ids = tokenizer("A letter from a teacher.")["input_ids"]
    e = resid[-1].explain(nla, max_new_tokens=3)
    assert (e.position, e.token_id) == (len(ids) - 1, ids[-1])
    assert e.token == tokenizer.decode([ids[-1]])
    assert e.hook_name == "blocks.3.hook_resid_post" and "other_layer" not in e.flags


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions",
    [
        [0], [-1], [3, 1, -2], [0, 0], [], slice(2, 5), slice(None, None, 2), slice(-3, None),
        slice(100, 200), np.array([1, 2]), (1,), range(3), [np.int64(2)], 2, -1,
    ],
    ids=repr,
)  # fmt: skip
def test_positions(whole, positions) -> None:
    model, _ = whole("llama")
    text = "A letter from a teacher."
    (everything,) = nla_lens.extract(model, text, LAYER)
    (some,) = nla_lens.extract(model, text, LAYER, positions=positions)
    index = positions if isinstance(positions, slice) else np.atleast_1d(positions).astype(int)
    kept = np.arange(len(everything))[index].tolist()
    assert torch.equal(some, everything.as_ordinary()[kept])
    assert some.origin.where_LX3[:, 1].tolist() == kept


def test_positions_count_in_each_text_by_itself(whole) -> None:
    model, _ = whole("llama")
    everything = nla_lens.extract(model, TEXTS, LAYER)
    last = nla_lens.extract(model, TEXTS, LAYER, positions=[-1, 0])
    for some, all_of_it in zip(last, everything, strict=True):
        assert torch.equal(some, all_of_it.as_ordinary()[[-1, 0]])


def test_positions_as_arrays_tensors_and_masks(whole) -> None:
    model, _ = whole("llama")
    (everything,) = nla_lens.extract(model, TEXTS[0], LAYER)
    n = len(everything)
    wanted = np.zeros(n, dtype=bool)
    wanted[[1, n - 1]] = True
    same = [np.array([1, -1]), torch.tensor([1, -1]), wanted, torch.tensor(wanted), wanted.tolist()]
    for given in same:
        (some,) = nla_lens.extract(model, np.array(TEXTS[:1]), LAYER, positions=given)
        assert torch.equal(some, everything.as_ordinary()[[1, -1]])
    (one,) = nla_lens.extract(model, TEXTS[0], LAYER, positions=torch.tensor(-1))
    assert torch.equal(one, everything.as_ordinary()[[-1]])


def test_positions_that_are_none(whole) -> None:
    model, _ = whole("llama")
    # An iterator would give the first text its positions, and the second none.
    for given, said in [
        (iter([0]), "are no positions: an iterator"),
        ("last", "position 'last' is not in"),
        (np.ones(3, dtype=bool), "position True is not in a text of .* a mask of as many values"),
        ([1.5], "position 1.5 is not in"),
        ([True, 1], "position True is not in"),
    ]:
        with pytest.raises(NLAError, match=said):
            nla_lens.extract(model, TEXTS[:2], LAYER, positions=given)


def test_what_is_kept_does_not_keep_the_rest_in_memory(whole) -> None:
    (some,) = nla_lens.extract(whole("llama")[0], TEXTS[2], LAYER, positions=[-1])
    assert some.untyped_storage().nbytes() == 64 * 4


# --- no more work than needed ---------------------------------------------------------------------


@contextmanager
def blocks_that_run(model) -> Iterator[list[int]]:
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(text_model(model).layers)
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@each_family
@pytest.mark.parametrize("layer", [0, LAYER, N_BLOCKS - 1])
def test_only_blocks_up_to_k_run(whole, family: str, layer: int) -> None:
    model, _ = whole(family)
    with blocks_that_run(model) as ran:
        nla_lens.extract(model, TEXTS[2], layer)
    assert ran == list(range(layer + 1))


@each_family
def test_only_blocks_up_to_k_are_loaded(source, monkeypatch, family: str) -> None:
    loaded = []
    load = hf_source.load_backbone

    def spy(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(hf_source, "load_backbone", spy)
    nla_lens.extract(source(family), "A letter.", 1)
    (model,) = loaded
    stack = text_model(model)
    assert len(stack.layers) == stack.config.num_hidden_layers == 2
    assert len(getattr(stack.config, "layer_types", None) or [0, 1]) == 2
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_a_model_that_fails_keeps_no_hooks(whole, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = whole("llama")
    block, hooks = model.model.layers[2], n_hooks(model)

    def fail(*_, **__):
        raise RuntimeError("fell over")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="fell over"):
        patch.setattr(block, "forward", fail)
        nla_lens.extract(model, "A letter.", LAYER)
    assert n_hooks(model) == hooks


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"layer": 6}, r"layer 6 does not exist: .* has 6 blocks \(0 to 5\)"),
        ({"layer": 99}, "layer 99 does not exist"),
        ({"layer": -1}, "layer=-1 must be the index of a block, from 0"),
        ({"layer": "3"}, "layer='3' must be"),
        ({"layer": 1.0}, "layer=1.0 must be"),
        ({"layer": True}, "layer=True must be"),
        ({"layer": None}, "layer=None must be"),
        ({"positions": [11]}, "position 11 is not in a text of 11 tokens"),
        ({"positions": [-12]}, "position -12 is not in a text of 11 tokens"),
        ({"positions": [0, 1.5]}, "position 1.5 is not"),
        ({"positions": "3"}, "position '3' is not"),
        ({"positions": [True]}, "position True is not"),
        ({"positions": 11}, "position 11 is not"),
        ({"positions": 2.5}, "positions=2.5"),
        ({"positions": slice(0, 5, 0)}, r"positions=slice\(0, 5, 0\)"),
        ({"positions": slice("a", None)}, r"positions=slice\('a'"),
        ({"batch_size": 0}, "batch_size=0 must be a positive integer"),
        ({"batch_size": -1}, "batch_size=-1 must be"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be"),
        ({"texts": [""]}, "has no tokens"),
        ({"texts": [5]}, "a text is a string or a list of chat messages, found 5"),
        ({"texts": [["a", "b"]]}, "found"),
        ({"texts": CHAT}, "a text is a string or a list of chat messages, found"),
        ({"texts": 5}, "texts"),
        ({"texts": None}, "texts"),
        ({"texts": ["a \ud800"]}, "surrogate"),
        ({"texts": [[]]}, "chat template"),
        ({"texts": [[{"content": "no role"}]]}, "chat template"),
    ],
)
def test_refused(whole, arguments: dict, names: str) -> None:
    model, tokenizer = whole("qwen2")
    text = "A letter from a teacher."
    arguments = {"texts": text, "layer": LAYER} | arguments
    assert len(tokenizer(text)["input_ids"]) == 11
    with blocks_that_run(model) as ran, pytest.raises(NLAError, match=names):
        nla_lens.extract(model, **arguments)
    assert ran == []


def test_a_layer_the_directory_does_not_have(source) -> None:
    with pytest.raises(NLAError, match=r"has 6 blocks; layer 6 does not exist"):
        nla_lens.extract(source("llama"), "a", 6)


@pytest.mark.parametrize(
    "thing", [object(), None, 5, torch.nn.Linear(2, 2), {"a": 1}], ids=lambda t: type(t).__name__
)
def test_what_is_no_model(thing) -> None:
    with pytest.raises(
        NLAError, match=f"cannot read the residual stream of a {type(thing).__name__}"
    ):
        nla_lens.extract(thing, "a", 0)


def test_a_model_without_a_tokenizer(whole) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, vocab_size=640,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NLAError, match="tokenizer="):
        nla_lens.extract(model, "a", 0)
    assert nla_lens.extract(model, "a", 0, tokenizer=whole("llama")[1])[0].shape == (2, 16)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    for name in (tmp_path / "none", tmp_path):
        with pytest.raises(NLAError, match="cannot be loaded"):
            nla_lens.extract(name, "a", 0)


# --- explain_text ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_source(tmp_path_factory) -> Callable[[str], NLA]:
    """A pair whose sidecar names its source by path."""

    def load(family: str) -> NLA:
        root = tmp_path_factory.mktemp(f"{family}-and-source")
        base = build_source(root / "source", family)
        av, ar = build_pair(root, family, base=base)
        return NLA.from_pretrained(av=av, ar=ar)

    return cache(load)


@each_family
def test_explain_text_is_extract_and_explain(with_source, family: str) -> None:
    nla = with_source(family)
    explained = nla.explain_text(TEXTS[2], [0, 5, -1], max_new_tokens=8)
    (resid,) = nla_lens.extract(nla.spec.source_model, TEXTS[2], LAYER, positions=[0, 5, -1])
    assert explained.shape == (3,)
    assert explained == resid.explain(nla, max_new_tokens=8)
    assert [e.position for e in explained][:2] == [0, 5]
    assert "early_position" in explained[0].flags and "early_position" not in explained[2].flags


def test_explain_text_of_all_positions_and_of_a_chat(with_source) -> None:
    nla = with_source("llama")
    n = len(nla.open_source().tokenizer("A letter.")["input_ids"])
    assert nla.explain_text("A letter.", max_new_tokens=2).shape == (n,)
    assert nla.explain_text("A letter.", [], max_new_tokens=2).shape == (0,)
    chat = nla.explain_text(CHAT, slice(-2, None), max_new_tokens=2)
    assert chat.shape == (2,)


@each_family
def test_explain_text_of_what_the_model_goes_on_to_write(with_source, whole, family: str) -> None:
    nla, (model, tokenizer) = with_source(family), whole(family)
    ids = list(tokenizer(TEXTS[0])["input_ids"])
    ends = set(np.atleast_1d(model.generation_config.eos_token_id).tolist())
    written: list[int] = []
    while len(written) < 4:
        with torch.no_grad():
            logits = model(torch.tensor([ids + written]), use_cache=False).logits[0, -1]
        if int(logits.argmax()) in ends:
            break
        written.append(int(logits.argmax()))
    explained = nla.explain_text(TEXTS[0], [-1], generate=4, max_new_tokens=2)
    assert [e.token_id for e in explained] == [ids[-1], *written]
    assert [e.position for e in explained] == list(range(len(ids) - 1, len(ids) + len(written)))
    states = hidden_states(model, ids + written)[LAYER + 1]
    assert [e.norm for e in explained] == pytest.approx(
        states[len(ids) - 1 :].norm(dim=-1).tolist(), rel=1e-5
    )


def test_explain_text_with_another_model(with_source, whole, source) -> None:
    nla, (model, _) = with_source("qwen2"), whole("qwen2")
    wanted = nla.explain_text("A letter.", max_new_tokens=3)
    assert nla.explain_text("A letter.", model=model, max_new_tokens=3) == wanted
    assert nla.explain_text("A letter.", model=str(source("qwen2")), max_new_tokens=3) == wanted


def test_explain_text_refuses(with_source, nla: NLA, whole) -> None:
    mine = with_source("llama")
    with pytest.raises(NLAError, match="position 99 is not"):
        mine.explain_text("A letter.", [99])
    with pytest.raises(NLAError, match="a text is a string"):
        mine.explain_text(5)
    with pytest.raises(NLAError, match="test/llama-source"):
        nla.explain_text("A letter.")  # a source that nobody has


def test_a_source_of_another_width_is_refused(with_source, tmp_path) -> None:
    wide = build_source(tmp_path, "llama", d_model=80, n_blocks=4)
    with pytest.raises(NLAError, match="d_model=64"):
        with_source("llama").explain_text("A letter.", model=wide)
