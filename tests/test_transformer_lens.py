"""The probe in TransformerLens, in each class of it that is installed, against transformers."""

import copy
import inspect
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache as once
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import nla_lens
from nla_lens import NLA, NLAError, ResidualTensor
from nla_lens.models.cache_keyword import cache_keyword
from nla_lens.stream.residual import PADDING

from .checkpoints import build_source
from .hooked_transformer import hooked_transformer

if find_spec("transformer_lens") is None:
    pytest.skip("transformer-lens is not installed", allow_module_level=True)

BRIDGE, HOOKED = "TransformerBridge", "HookedTransformer"
# Not by hasattr: asking transformer_lens 4 for HookedTransformer raises an ImportError.
_MODULES = {BRIDGE: "transformer_lens.model_bridge", HOOKED: "transformer_lens.HookedTransformer"}
KINDS = [kind for kind, module in _MODULES.items() if find_spec(module) is not None]
MAJOR = int(version("transformer-lens").split(".")[0])
FAMILIES = ("llama", "qwen2")

TEXT = "The garlic sizzles in the pan."
LONG, SHORT = "hello there my friend, how are you", "hello there"
K = 3
AT_K = f"blocks.{K}.hook_resid_post"


# Models


@pytest.fixture(scope="session")
def load(source_dir: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """`load(kind, family)` -> a model; a test leaves it as it was."""
    return once(lambda kind, family: load_from(kind, source_dir(family)))


def load_from(kind: str, directory: Path) -> Any:
    if kind == HOOKED:
        return hooked_transformer(directory)
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=torch.float32)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str, load: Callable[[str, str], Any]) -> Any:
    return load(kind, "llama")


@pytest.fixture
def probed(model: Any, nla: NLA) -> Iterator[Any]:
    with nla_lens.attach(model, nla):
        yield model


def plain_run(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """As without a probe."""
    return type(model).run_with_cache(model, *args, **kwargs)


def entries(cache: Any) -> Mapping[str, Tensor]:
    return getattr(cache, "cache_dict", cache)


def ids_of(model: Any, text: str) -> list[int]:
    return model.to_tokens(text)[0].tolist()


def test_every_class_of_the_installed_version_is_tested() -> None:
    assert set(KINDS) == {2: {HOOKED}, 3: {BRIDGE, HOOKED}}.get(MAJOR, {BRIDGE})


# The promise


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_residual_explains_itself_as_its_vector_does(
    kind: str,
    family: str,
    load: Callable[..., Any],
    load_pair: Callable[..., NLA],
    source_dir: Callable[[str], Path],
) -> None:
    from transformers import AutoModelForCausalLM

    model, nla = load(kind, family), load_pair(family, "replace")
    with nla_lens.attach(model, nla):
        _, cache = model.run_with_cache(TEXT)
    found = cache["resid_post", K][0, -1].explain(max_new_tokens=16)

    _, unprobed = plain_run(model, TEXT)
    vector = unprobed["resid_post", K][0, -1]
    assert type(vector) is Tensor
    assert found.token_ids == nla.explain(vector, max_new_tokens=16).token_ids
    assert len(found.token_ids) == 16

    ids = model.to_tokens(TEXT)
    reference = AutoModelForCausalLM.from_pretrained(source_dir(family), dtype=torch.float32)
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True).hidden_states[K + 1]
    torch.testing.assert_close(vector, hidden[0, -1], rtol=1e-4, atol=1e-3)
    assert found.token_ids == nla.explain(hidden[0, -1], max_new_tokens=16).token_ids

    assert (found.hook_name, found.position) == (AT_K, ids.shape[1] - 1)
    assert (found.token_id, found.token) == (int(ids[0, -1]), ".")
    assert "other_layer" not in found.flags


def test_all_positions_explain_themselves(probed: Any, nla: NLA) -> None:
    _, cache = probed.run_with_cache([LONG, SHORT])
    resid = cache["resid_post", K]
    found = resid.explain(max_new_tokens=4)
    assert found.shape == resid.shape[:2]
    for row in (0, 1):
        for position in (0, 1, -1):
            alone = nla.explain(resid[row, position].clone(), max_new_tokens=4)
            assert found[row, position].token_ids == alone.token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_bit_identical(
    kind: str, family: str, load: Callable[..., Any], load_pair: Callable[..., NLA]
) -> None:
    model = load(kind, family)
    logits, plain = plain_run(model, [LONG, SHORT])
    with nla_lens.attach(model, load_pair(family, "replace")):
        probed_logits, probed = model.run_with_cache([LONG, SHORT])
    assert torch.equal(logits, probed_logits)
    assert type(probed) is type(plain)
    assert list(entries(probed)) == list(entries(plain))
    assert [type(key) for key in entries(probed)] == [type(key) for key in entries(plain)]
    for key, value in entries(plain).items():
        assert torch.equal(value, entries(probed)[key]), key
        assert entries(probed)[key].shape == value.shape
    assert same_objects(probed) == same_objects(plain)
    explainable = {k for k, v in entries(probed).items() if isinstance(v, ResidualTensor)}
    assert {f"blocks.{n}.hook_resid_{s}" for n in range(6) for s in ("pre", "mid", "post")} <= (
        explainable
    )
    assert not {key for key in explainable if "attn" in key or "mlp" in key or "ln" in key}


def same_objects(cache: Any) -> list[list[str]]:
    """Names that stand for one and the same tensor."""
    names: dict[int, list[str]] = {}
    for key, value in entries(cache).items():
        names.setdefault(id(value), []).append(key)
    return sorted(names.values())


def test_other_tensors_stay_as_they_are(probed: Any) -> None:
    before = dict(vars(Tensor))
    _, cache = probed.run_with_cache(TEXT)
    cache["resid_post", K][0, -1].explain(max_new_tokens=1)
    assert dict(vars(Tensor)) == before
    assert not hasattr(Tensor, "explain")
    assert type(probed(TEXT)) is Tensor
    logits, cache = probed.run_with_cache(TEXT)
    assert type(logits) is Tensor
    assert type(cache[f"blocks.{K}.hook_mlp_out"]) is Tensor


# Attaching and detaching


def traces(model: Any) -> list[Any]:
    """All that attaching or running could leave behind."""
    return [
        sorted(vars(model)),
        {
            name: [list(getattr(m, kind)) for kind in vars(m) if kind.endswith("_hooks")]
            for name, m in model.named_modules()
        },
        {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()},
        model.tokenizer.padding_side,
    ]


def test_nothing_is_left_after_detach(model: Any, nla: NLA) -> None:
    mine = model.blocks[1].register_forward_hook(lambda *_: None)
    try:
        plain_run(model, [LONG, SHORT], padding_side="left")
        before = traces(model)
        probe = nla_lens.attach(model, nla)
        assert traces(model) != before
        model.run_with_cache([LONG, SHORT], padding_side="left")
        probe.detach()
        assert traces(model) == before
    finally:
        mine.remove()
    assert model.run_with_cache.__func__ is type(model).run_with_cache


def test_a_run_leaves_no_hook_even_when_it_fails(probed: Any) -> None:
    plain_run(probed, TEXT)
    before = traces(probed)
    with pytest.raises(IndexError):
        probed.run_with_cache(torch.tensor([[3, 10**6]]))
    assert traces(probed) == before

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = probed.blocks[2].register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            probed.run_with_cache(TEXT, padding_side="left")
    finally:
        handle.remove()
    assert traces(probed)[1:2] + traces(probed)[3:] == before[1:2] + before[3:]
    probed.reset_hooks()  # TransformerLens' own, which an interrupt leaves in some versions
    _, cache = probed.run_with_cache(TEXT)
    assert isinstance(cache["resid_post", K], ResidualTensor)


def test_probe_as_a_context_manager(model: Any, nla: NLA) -> None:
    with pytest.raises(ZeroDivisionError), nla_lens.attach(model, nla) as probe:
        assert probe.attached
        assert probe.model is model
        assert probe.nla is nla
        _, cache = model.run_with_cache(TEXT)
        raise ZeroDivisionError
    assert not probe.attached
    assert type(model.run_with_cache(TEXT)[1]["resid_post", K]) is Tensor
    assert cache["resid_post", K][0, 0].explain(max_new_tokens=1).position == 0


def test_one_probe_at_a_time(model: Any, nla: NLA) -> None:
    first = nla_lens.attach(model, nla)
    with pytest.raises(NLAError, match=rf"{type(model).__name__} has a probe already.*detach"):
        nla_lens.attach(model, nla)
    first.detach()
    first.detach()
    second = nla_lens.attach(model, nla)
    first.detach()
    assert isinstance(model.run_with_cache(TEXT)[1]["resid_post", K], ResidualTensor)
    second.detach()


def test_detaching_leaves_what_another_tool_has_put_there(model: Any, nla: NLA) -> None:
    probe = nla_lens.attach(model, nla)
    inner = model.run_with_cache
    model.__dict__["run_with_cache"] = outer = lambda *args, **kwargs: inner(*args, **kwargs)
    probe.detach()
    assert vars(model).pop("run_with_cache") is outer


def test_detaching_takes_its_hooks_along(model: Any, nla: NLA) -> None:
    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    with nla_lens.attach(model, nla):
        pass
    assert hooks() == before


def test_a_deep_copy_runs_itself(model: Any, nla: NLA) -> None:
    with nla_lens.attach(model, nla):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.blocks[1].register_forward_hook(lambda module, args, out: first(out, 2.0))
        own = copied.run_with_cache(TEXT)[1]["resid_post", K]
        assert isinstance(own, ResidualTensor)
        assert torch.equal(own, plain_run(copied, TEXT)[1]["resid_post", K])
        assert not torch.equal(own, model.run_with_cache(TEXT)[1]["resid_post", K])


def first(out: Any, factor: float) -> Any:
    """A block's output times a factor."""
    return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


def test_the_signature_is_the_same(model: Any, nla: NLA) -> None:
    plain = inspect.signature(model.run_with_cache)
    with nla_lens.attach(model, nla):
        assert inspect.signature(model.run_with_cache) == plain
        assert model.run_with_cache.__doc__ == type(model).run_with_cache.__doc__


# Where a vector comes from


def known(resid: Tensor) -> list[Any]:
    """(row, position, token id) of each vector."""
    assert isinstance(resid, ResidualTensor)
    assert resid.origin.where_LX3.shape[:-1] == resid.shape[:-1]
    return [tuple(where) for where in resid.origin.where_LX3.reshape(-1, 3).tolist()]


def counted(ids: Sequence[int], row: int = 0, start: int = 0) -> list[tuple[int, int, int]]:
    return [(row, start + i, token) for i, token in enumerate(ids)]


def assert_stands_where_it_says(model: Any, resid: Tensor, texts: Sequence[Any]) -> None:
    """Each vector is the one that its row alone has at its position."""
    assert isinstance(resid, ResidualTensor)
    alone = [plain_run(model, text)[1][resid.hook_name] for text in texts]
    for (row, position, _), vector in zip(known(resid), resid.reshape(-1, 64), strict=True):
        if position != PADDING:
            torch.testing.assert_close(vector, alone[row][0, position], rtol=1e-4, atol=1e-3)


def test_a_string(probed: Any) -> None:
    _, cache = probed.run_with_cache(TEXT)
    ids = ids_of(probed, TEXT)
    assert known(cache["resid_post", K]) == counted(ids)
    assert probed.tokenizer.decode([ids[0]]) == "<|begin_of_text|>"
    found = cache["resid_post", K][0, 0].explain(max_new_tokens=1)
    assert (found.token, found.position) == ("<|begin_of_text|>", 0)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_batch_of_strings(probed: Any, side: str | None) -> None:
    given = {} if side is None else {"padding_side": side}
    _, cache = probed.run_with_cache([LONG, SHORT], **given)
    resid = cache["resid_post", K]
    long, short = ids_of(probed, LONG), ids_of(probed, SHORT)
    padding = [(1, PADDING, probed.tokenizer.pad_token_id)] * (len(long) - len(short))
    expected = counted(short, row=1)
    expected = padding + expected if side == "left" else expected + padding
    assert known(resid) == counted(long) + expected
    assert_stands_where_it_says(probed, resid, [LONG, SHORT])
    found = resid[1].explain(max_new_tokens=1)
    assert ["padding" in e.flags for e in found.flat] == [w[1] == PADDING for w in expected]
    assert probed.tokenizer.padding_side == "right"


def test_the_tokenizers_own_padding_side_counts(probed: Any) -> None:
    probed.tokenizer.padding_side = "left"
    try:
        _, cache = probed.run_with_cache([SHORT, LONG])
    finally:
        probed.tokenizer.padding_side = "right"
    assert known(cache["resid_post", K][0])[0] == (0, PADDING, probed.tokenizer.pad_token_id)
    assert known(cache["resid_post", K][0])[-1] == counted(ids_of(probed, SHORT))[-1]
    assert_stands_where_it_says(probed, cache["resid_post", K], [SHORT, LONG])


def test_left_padding_where_bos_is_the_pad_token(kind: str, load: Any, load_pair: Any) -> None:
    """As in every GPT-2; here Qwen2, whose missing BOS TransformerLens fills in."""
    model = load(kind, "qwen2")
    kept = model.tokenizer.pad_token
    model.tokenizer.pad_token = model.tokenizer.bos_token
    try:
        with nla_lens.attach(model, load_pair("qwen2", "replace")):
            runs = {
                bos: model.run_with_cache([LONG, SHORT], prepend_bos=bos, padding_side="left")[1]
                for bos in (True, False)
            }
    finally:
        model.tokenizer.pad_token = kept
    short = model.to_tokens(SHORT, prepend_bos=False)[0].tolist()
    for bos, cache in runs.items():
        row = [model.tokenizer.bos_token_id] * bos + short
        assert known(cache["resid_post", K][1])[-len(row) :] == counted(row, row=1)
        assert {w[1] for w in known(cache["resid_post", K][1])[: -len(row)]} == {PADDING}


def test_tokens(probed: Any) -> None:
    ids_T = probed.to_tokens(TEXT)[0]
    for ids in (ids_T, ids_T[None], ids_T[None].int()):
        _, cache = probed.run_with_cache(ids)
        assert known(cache["resid_post", K]) == counted(ids_T.tolist())
    ids_BT = torch.stack([ids_T, ids_T.flip(0)])
    _, cache = probed.run_with_cache(ids_BT)
    assert known(cache["resid_post", K]) == [
        *counted(ids_BT[0].tolist()),
        *counted(ids_BT[1].tolist(), row=1),
    ]


def test_tokens_remembered_are_those_of_the_run(probed: Any) -> None:
    ids_BT = probed.to_tokens(TEXT)
    expected = counted(ids_BT[0].tolist())
    _, cache = probed.run_with_cache(ids_BT)
    ids_BT.zero_()
    assert known(cache["resid_post", K]) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_tokens(kind: str, family: str, load: Any, load_pair: Any) -> None:
    model = load(kind, family)
    pad = model.tokenizer.pad_token_id
    ids_BT = torch.tensor([[3, 4, 5, 6], [7, 8, pad, pad]])
    with nla_lens.attach(model, load_pair(family, "replace")):
        both = model.run_with_cache(ids_BT)[1]["resid_post", K]
        alone = model.run_with_cache(ids_BT[1:])[1]["resid_post", K]
    assert [w[1] for w in known(both)] == [0, 1, 2, 3, 0, 1, PADDING, PADDING]
    # Llama has no pad token of its own: by itself, a row may as well end with its end-of-turn.
    own = model.tokenizer.pad_token_id != model.tokenizer.eos_token_id
    assert own == (family == "qwen2")
    assert [w[1] for w in known(alone)] == [0, 1, *((PADDING, PADDING) if own else (2, 3))]


def test_an_attention_mask(probed: Any) -> None:
    ids_BT = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    mask_BT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    _, cache = probed.run_with_cache(ids_BT, attention_mask=mask_BT)
    assert [w[1] for w in known(cache["resid_post", K])] == [PADDING, PADDING, 0, 1, 0, 1, 2, 3]
    assert_stands_where_it_says(probed, cache["resid_post", K], [ids_BT[:1, 2:], ids_BT[1:]])


@pytest.mark.parametrize("bos", [True, False])
def test_prepend_bos(probed: Any, bos: bool) -> None:
    _, cache = probed.run_with_cache(TEXT, prepend_bos=bos)
    ids = probed.to_tokens(TEXT, prepend_bos=bos)[0].tolist()
    assert (ids[0] == probed.tokenizer.bos_token_id) == bos
    assert known(cache["resid_post", K]) == counted(ids)


@pytest.mark.parametrize("pos_slice", [-1, 2, (1, 4), (None, None, 2), [0, 3], slice(2, None)])
@pytest.mark.parametrize("texts", [LONG, [LONG, SHORT]], ids=["one", "two"])
def test_pos_slice(probed: Any, pos_slice: Any, texts: Any) -> None:
    # With indices, older versions slice the heads of grouped keys instead: cache this one alone.
    options = {"names_filter": AT_K, "pos_slice": pos_slice}
    _, cache = probed.run_with_cache(texts, **options)
    _, plain = plain_run(probed, texts, **options)
    _, whole = probed.run_with_cache(texts)
    assert torch.equal(cache["resid_post", K], plain["resid_post", K])
    index = [pos_slice] if isinstance(pos_slice, int) else pos_slice
    index = slice(*index) if isinstance(index, tuple) else index
    assert known(cache["resid_post", K]) == known(whole["resid_post", K][:, index])


def test_pos_slice_as_a_slice_of_transformer_lens(probed: Any) -> None:
    # utils up to 3.x, utilities from 3.x on
    try:
        from transformer_lens.utilities import Slice
    except ImportError:
        from transformer_lens.utils import Slice
    whole = probed.run_with_cache([LONG, SHORT])[1]["resid_post", K]
    for pos_slice, index in ((Slice(2), 2), (Slice((0, 2)), slice(0, 2)), (Slice([0, 3]), [0, 3])):
        options = {"names_filter": AT_K, "pos_slice": pos_slice}
        resid = probed.run_with_cache([LONG, SHORT], **options)[1]["resid_post", K]
        assert resid.shape == whole[:, index].shape
        assert known(resid) == known(whole[:, index])
    options = {"names_filter": AT_K, "pos_slice": Slice(2), "remove_batch_dim": True}
    resid = probed.run_with_cache(LONG, **options)[1]["resid_post", K]
    assert resid.shape == (64,)
    assert known(resid) == known(whole[0, 2])


@pytest.mark.parametrize(
    "names_filter",
    [AT_K, [AT_K, "blocks.0.hook_resid_pre"], lambda name: name == AT_K],
    ids=["str", "list", "callable"],
)
def test_names_filter(probed: Any, names_filter: Any) -> None:
    _, cache = probed.run_with_cache(TEXT, names_filter=names_filter)
    assert list(entries(cache)) == list(
        entries(plain_run(probed, TEXT, names_filter=names_filter)[1])
    )
    assert known(cache["resid_post", K]) == counted(ids_of(probed, TEXT))
    assert len(entries(cache)) <= 4


@pytest.mark.parametrize("stop", [K + 1, -2])
def test_stop_at_layer(probed: Any, stop: int) -> None:
    out, cache = probed.run_with_cache(TEXT, stop_at_layer=stop)
    plain_out, _ = plain_run(probed, TEXT, stop_at_layer=stop)
    assert torch.equal(out, plain_out)
    assert type(out) is Tensor
    assert known(cache["resid_post", K]) == counted(ids_of(probed, TEXT))
    assert "blocks.5.hook_resid_post" not in entries(cache)


def test_start_at_layer(kind: str, probed: Any) -> None:
    resid = plain_run(probed, TEXT)[1]["resid_post", 1]
    if kind == BRIDGE and MAJOR == 3:
        before = traces(probed)
        with pytest.raises(NotImplementedError, match="start_at_layer"):
            probed.run_with_cache(resid, start_at_layer=2)
        assert traces(probed) == before
        return
    for start in (2, -4):
        _, cache = probed.run_with_cache(resid, start_at_layer=start)
        n_tokens = resid.shape[1]
        assert known(cache["resid_post", K]) == [(0, i, -1) for i in range(n_tokens)]
        found = cache["resid_post", K][0, -1].explain(max_new_tokens=1)
        assert (found.position, found.token, found.token_id) == (n_tokens - 1, None, None)
    recorded = probed.run_with_cache(TEXT)[1]["resid_post", 1]
    assert isinstance(recorded, ResidualTensor)
    plain = resid.as_subclass(torch.Tensor)
    logits = type(probed).forward(probed, plain, start_at_layer=2)
    assert torch.equal(probed.run_with_cache(recorded, start_at_layer=2)[0], logits)
    assert torch.equal(probed(recorded, start_at_layer=2), logits)
    assert torch.equal(probed.run_with_hooks(input=recorded, start_at_layer=2), logits)


def test_start_at_layer_with_tokens(kind: str, probed: Any) -> None:
    if kind == BRIDGE:
        pytest.skip("takes no tokens beside a residual")
    ids_BT = probed.to_tokens(TEXT)
    resid = plain_run(probed, TEXT)[1]["resid_post", 1]
    _, cache = probed.run_with_cache(resid, start_at_layer=2, tokens=ids_BT)
    assert known(cache["resid_post", K]) == counted(ids_BT[0].tolist())


def test_embeddings_instead_of_tokens(kind: str, probed: Any) -> None:
    if kind == HOOKED:
        pytest.skip("takes no embeddings but by start_at_layer")
    embeds = plain_run(probed, TEXT)[1]["hook_embed"]
    _, cache = probed.run_with_cache(embeds)
    assert known(cache["resid_post", K]) == [(0, i, -1) for i in range(embeds.shape[1])]


def test_remove_batch_dim(probed: Any) -> None:
    _, cache = probed.run_with_cache(TEXT, remove_batch_dim=True)
    resid = cache["resid_post", K]
    assert resid.ndim == 2
    assert known(resid) == counted(ids_of(probed, TEXT))
    _, cache = probed.run_with_cache(TEXT)
    cache.remove_batch_dim()
    assert known(cache["resid_post", K]) == counted(ids_of(probed, TEXT))


def test_a_batch_of_one_token(probed: Any) -> None:
    _, cache = probed.run_with_cache(torch.tensor([[3], [4], [5]]))
    assert known(cache["resid_post", K]) == [(0, 0, 3), (1, 0, 4), (2, 0, 5)]


def test_without_a_cache_object(probed: Any) -> None:
    _, cache = probed.run_with_cache(TEXT, return_cache_object=False)
    assert type(cache) is dict
    assert known(cache[AT_K]) == counted(ids_of(probed, TEXT))


def test_arguments_by_position_and_by_name(kind: str, probed: Any) -> None:
    expected = counted(ids_of(probed, TEXT))
    _, cache = probed.run_with_cache(input=TEXT)
    assert known(cache["resid_post", K]) == expected
    if kind == BRIDGE:  # return_cache_object, remove_batch_dim, names_filter
        _, cache = probed.run_with_cache(TEXT, False, True, AT_K)
        assert known(cache[AT_K]) == expected
        assert cache[AT_K].ndim == 2
    else:  # return_type, loss_per_token, prepend_bos, padding_side
        _, cache = probed.run_with_cache([LONG, SHORT], "logits", False, True, "left")
        assert known(cache["resid_post", K][1, 0])[0][1] == PADDING


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_gradients(probed: Any) -> None:
    for parameter in probed.parameters():
        parameter.requires_grad_()
    options = {"incl_bwd": True, "return_type": "loss"}
    try:
        plain_loss, plain = plain_run(probed, TEXT, **options)
        probed.zero_grad()
        loss, cache = probed.run_with_cache(TEXT, **options)
    finally:
        probed.zero_grad()
        probed.requires_grad_(False)
    assert torch.equal(loss, plain_loss)
    assert list(entries(cache)) == list(entries(plain))
    gradients = [key for key in entries(plain) if key.endswith("_grad")]
    assert f"{AT_K}_grad" in gradients
    for key in gradients:
        assert torch.equal(entries(cache)[key], entries(plain)[key]), key
        assert type(entries(cache)[key]) is Tensor
    assert isinstance(entries(cache)[AT_K], ResidualTensor)


# With a key-value cache


# transformers takes the new name from 5.24 on, and the old one still.
KEYWORDS = dict.fromkeys(["past_key_values", cache_keyword(LlamaForCausalLM.forward)])


@pytest.mark.parametrize("keyword", KEYWORDS)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_positions_go_on_behind_a_cache(kind: str, probed: Any, keyword: str) -> None:
    ids_BT = probed.to_tokens(TEXT)
    ids = ids_BT[0].tolist()
    given = new_cache(kind, probed, 1, keyword)
    _, before = probed.run_with_cache(ids_BT[:, :4], **given)
    _, after = probed.run_with_cache(ids_BT[:, 4:], **given)
    assert known(before["resid_post", K]) == counted(ids[:4])
    assert known(after["resid_post", K]) == counted(ids[4:], start=4)
    assert_stands_where_it_says(probed, after["resid_post", K], [TEXT])


def test_positions_go_on_behind_a_padded_cache(kind: str, probed: Any) -> None:
    pad = probed.tokenizer.pad_token_id
    ids_BT = torch.tensor([[pad, pad, 3, 4], [5, 6, 7, 8]])
    given = new_cache(kind, probed, 2)
    if kind == BRIDGE:
        given["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    else:
        given["padding_side"] = "left"
    probed.run_with_cache(ids_BT, **given)
    if kind == BRIDGE:
        given["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    _, cache = probed.run_with_cache(torch.tensor([[9, 10], [11, 12]]), **given)
    assert known(cache["resid_post", K]) == [(0, 2, 9), (0, 3, 10), (1, 4, 11), (1, 5, 12)]
    rows = [torch.tensor([[3, 4, 9, 10]]), torch.tensor([[5, 6, 7, 8, 11, 12]])]
    assert_stands_where_it_says(probed, cache["resid_post", K], rows)


def new_cache(kind: str, model: Any, n_rows: int, keyword: str = "") -> dict[str, Any]:
    if kind == BRIDGE:
        from transformers import DynamicCache

        return {keyword or cache_keyword(model.original_model): DynamicCache(), "use_cache": True}
    if MAJOR < 3:
        from transformer_lens import HookedTransformerKeyValueCache as KeyValueCache
    else:
        from transformer_lens.cache.key_value_cache import (
            TransformerLensKeyValueCache as KeyValueCache,
        )
    return {"past_kv_cache": KeyValueCache.init_cache(model.cfg, "cpu", n_rows)}


# Places in the residual stream


def test_the_input_of_a_block_is_the_output_of_the_one_before(probed: Any) -> None:
    _, cache = probed.run_with_cache(TEXT)
    assert torch.equal(cache["resid_pre", K + 1], cache["resid_post", K])
    pres, mids, posts = (K, K + 1, 0), (K, K + 1), (K, K + 1, 5)
    places = [("resid_pre", n) for n in pres] + [("resid_mid", n) for n in mids]
    flagged = {
        place: "other_layer" in cache[place][0, -1].explain(max_new_tokens=1).flags
        for place in [*places, *(("resid_post", n) for n in posts)]
    }
    assert [place for place, other in flagged.items() if not other] == [
        ("resid_pre", K + 1),
        ("resid_post", K),
    ]
    for side, layer in flagged:
        assert cache[side, layer].hook_name == f"blocks.{layer}.hook_{side}"
    assert known(cache["resid_mid", K]) == counted(ids_of(probed, TEXT))


def test_names_of_the_bridge_are_spelled_as_everywhere(kind: str, probed: Any) -> None:
    if kind == HOOKED:
        pytest.skip("has no hook_in and hook_out")
    _, cache = probed.run_with_cache(TEXT)
    assert entries(cache)[f"blocks.{K}.hook_out"].hook_name == AT_K
    assert entries(cache)[f"blocks.{K}.hook_in"].hook_name == f"blocks.{K}.hook_resid_pre"


# What people do with a cache


def test_the_tools_of_the_cache_work_on(probed: Any) -> None:
    _, cache = probed.run_with_cache(TEXT)
    _, plain = plain_run(probed, TEXT)
    assert torch.equal(cache.accumulated_resid(), plain.accumulated_resid())
    assert torch.equal(cache.decompose_resid(), plain.decompose_resid())
    assert torch.equal(cache.stack_activation("resid_post"), plain.stack_activation("resid_post"))
    assert torch.equal(cache.to("cpu")["resid_post", K], plain["resid_post", K])


def test_a_cached_residual_patches_another_run(probed: Any) -> None:
    def patched(value: Tensor) -> Tensor:
        def hook(resid: Tensor, hook: Any) -> Tensor:
            resid = resid.clone()
            resid[:, 2] = value[:, 2]
            return resid

        return probed.run_with_hooks(LONG, fwd_hooks=[(AT_K, hook)])

    _, cache = probed.run_with_cache(TEXT)
    _, plain = plain_run(probed, TEXT)
    logits = patched(cache["resid_post", K])
    assert type(logits) is Tensor
    assert torch.equal(logits, patched(plain["resid_post", K]))
    assert not torch.equal(logits, probed(LONG))
    whole = probed.run_with_hooks(TEXT, fwd_hooks=[(AT_K, lambda *_, **__: cache["resid_post", K])])
    assert type(whole) is Tensor


# Refusals


def test_another_width_is_refused(kind: str, nla: NLA, tmp_path: Path) -> None:
    model = load_from(kind, build_source(tmp_path, "llama", d_model=32, n_blocks=4))
    before = sorted(vars(model))
    with pytest.raises(NLAError, match=rf"this {kind} has d_model=32, the NLA reads d_model=64"):
        nla_lens.attach(model, nla)
    assert sorted(vars(model)) == before


def test_too_few_blocks_are_refused(kind: str, nla: NLA, tmp_path: Path) -> None:
    model = load_from(kind, build_source(tmp_path, "llama", n_blocks=K))
    with pytest.raises(NLAError, match=rf"has {K} blocks, the NLA reads {AT_K}"):
        nla_lens.attach(model, nla)
    with pytest.raises(NLAError, match=rf"layer {K} does not exist: the model has {K} blocks"):
        nla_lens.extract(model, [TEXT], K)


@pytest.mark.parametrize(
    "make",
    [object, lambda: "gpt2", lambda: nn.Linear(2, 2), lambda: NLA],
    ids=["object", "name", "module", "class"],
)
def test_what_is_no_model_is_refused(make: Callable[[], Any], nla: NLA) -> None:
    with pytest.raises(NLAError, match=r"no adapter for .*transformer_lens.*nla\.explain"):
        nla_lens.attach(make(), nla)


def test_what_is_no_model_of_transformer_lens_is_refused(model: Any, nla: NLA) -> None:
    _, cache = plain_run(model, TEXT)
    for other in (cache, model.cfg, model.hook_dict[AT_K]):
        with pytest.raises(NLAError, match=rf"a {type(other).__name__}: .*{BRIDGE} or {HOOKED}"):
            nla_lens.attach(other, nla)


def layer_norm_model(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random GPT-2 of the pairs' width, as its weights are."""
    if kind == HOOKED:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        cfg = HookedTransformerConfig(
            n_layers=4, d_model=64, d_head=16, n_heads=4, d_vocab=640, n_ctx=64, act_fn="gelu",
            normalization_type="LN", seed=0, dtype=dtype, device="cpu",
        )  # fmt: skip
        model = HookedTransformer(cfg)
        # Biases are initialised as zero.
        for name, parameter in model.named_parameters():
            if name.endswith(("b_O", "b_out", "b_V", ".b")):
                torch.nn.init.normal_(parameter)
        return model.requires_grad_(False)
    from transformers import GPT2Config, GPT2LMHeadModel

    from .checkpoints.vocabulary import write_tokenizer

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=640, n_positions=64, n_embd=64, n_layer=4, n_head=4, bos_token_id=0
    )
    config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(directory)
    write_tokenizer(directory, "llama")
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=dtype)


def process(model: Any, **switches: bool) -> None:
    """Process weights as each class does it once loaded."""
    if type(model).__name__ == BRIDGE:
        model.enable_compatibility_mode(disable_warnings=True, **switches)
    else:
        model.process_weights_(**switches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_centred_weights_are_refused(
    kind: str, dtype: torch.dtype, nla: NLA, tmp_path: Path
) -> None:
    model = layer_norm_model(kind, tmp_path, dtype)
    ids = torch.tensor([[3, 4, 5]])
    with nla_lens.attach(model, nla):
        raw = model.run_with_cache(ids)[1]["resid_post", K].clone()
        process(model)
        message = rf"weights of this {kind} were centred.*center_writing_weights=False"
        with pytest.raises(NLAError, match=message):
            model.run_with_cache(ids)
    with pytest.raises(NLAError, match=message):
        nla_lens.attach(model, nla)
    with pytest.raises(NLAError, match=message):
        nla_lens.extract(model, [TEXT], K)
    centred = plain_run(model, ids)[1]["resid_post", K]
    assert (centred - raw).norm() > 0.02 * raw.norm()  # which is why


def test_weights_folded_but_not_centred_are_accepted(kind: str, nla: NLA, tmp_path: Path) -> None:
    model = layer_norm_model(kind, tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    raw = plain_run(model, ids)[1]["resid_post", K]
    process(model, center_writing_weights=False)
    with nla_lens.attach(model, nla):
        folded = model.run_with_cache(ids)[1]["resid_post", K]
    torch.testing.assert_close(folded.as_ordinary(), raw, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_processing_leaves_rms_norm_models_as_they_are(
    kind: str, family: str, load_pair: Any, source_dir: Callable[[str], Path], load: Any
) -> None:
    raw = plain_run(load(kind, family), TEXT)[1]["resid_post", K]
    if kind == BRIDGE:
        model = load_from(kind, source_dir(family))
        process(model)
    else:
        processing = ("center_writing_weights", "center_unembed", "fold_value_biases")
        model = hooked_transformer(
            source_dir(family), fold_ln=True, **dict.fromkeys(processing, True)
        )
        assert model.cfg.normalization_type == "RMSPre"
    with nla_lens.attach(model, load_pair(family, "replace")):
        resid = model.run_with_cache(TEXT)[1]["resid_post", K]
    assert known(resid) == counted(ids_of(model, TEXT))
    torch.testing.assert_close(resid.as_ordinary(), raw, rtol=1e-4, atol=1e-3)


# Extraction and explaining texts

CHAT = [{"role": "user", "content": "How is the garlic?"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_extract_is_that_of_transformers(
    kind: str, family: str, load: Any, source_dir: Callable[[str], Path]
) -> None:
    texts = [LONG, SHORT, TEXT, CHAT, SHORT]
    for layer in (0, K, 5):
        found = nla_lens.extract(load(kind, family), texts, layer)
        expected = nla_lens.extract(source_dir(family), texts, layer)
        assert len(found) == len(texts)
        for ours, theirs in zip(found, expected, strict=True):
            assert known(ours) == known(theirs)
            assert ours.hook_name == theirs.hook_name == f"blocks.{layer}.hook_resid_post"
            torch.testing.assert_close(
                ours.as_ordinary(), theirs.as_ordinary(), rtol=1e-4, atol=1e-3
            )


def test_extract_positions_and_batches(model: Any) -> None:
    whole = nla_lens.extract(model, [LONG, SHORT], K)
    some = nla_lens.extract(model, [LONG, SHORT], K, positions=[0, -1], batch_size=1)
    for ours, all_of_it in zip(some, whole, strict=True):
        assert known(ours) == known(all_of_it[[0, -1]])
        assert torch.equal(ours, all_of_it[[0, -1]])


def test_extract_runs_no_later_block(probed: Any) -> None:
    ran: list[int] = []
    handles = [
        # Before it: the pass is over when the last one's output is there.
        block.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
        for n, block in enumerate(probed.blocks)
    ]
    try:
        (resid,) = nla_lens.extract(probed, [TEXT], K)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(K + 1))
    assert resid.origin.nla is None  # though a probe is there


def test_extract_without_a_tokenizer_says_so(probed: Any, source_dir: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer, probed.tokenizer = probed.tokenizer, None
    try:
        with pytest.raises(NLAError, match=r"has no tokenizer; pass tokenizer="):
            nla_lens.extract(probed, [TEXT], K)
        own = AutoTokenizer.from_pretrained(source_dir("llama"))
        (resid,) = nla_lens.extract(probed, [TEXT], K, tokenizer=own)
        _, cache = probed.run_with_cache(torch.tensor([own(TEXT)["input_ids"]]))
    finally:
        probed.tokenizer = tokenizer
    assert known(resid) == known(cache["resid_post", K])
    assert cache["resid_post", K][0, -1].explain(max_new_tokens=1).token is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [TEXT, CHAT], ids=["text", "chat"])
def test_explain_text_is_that_of_transformers(
    kind: str, family: str, text: Any, load: Any, load_pair: Any, source_dir: Any
) -> None:
    nla = load_pair(family, "replace")
    options = {"positions": [-2, -1], "generate": 3, "max_new_tokens": 8}
    found = nla.explain_text(text, model=load(kind, family), **options)
    expected = nla.explain_text(text, model=source_dir(family), **options)
    assert [e.token_ids for e in found.flat] == [e.token_ids for e in expected.flat]
    assert [(e.token, e.position) for e in found.flat] == [
        (e.token, e.position) for e in expected.flat
    ]
    assert len(found) == 5


def test_a_text_goes_on_until_transformers_would_stop(
    kind: str, load_pair: Any, tmp_path: Path
) -> None:
    if kind == HOOKED:
        pytest.skip("keeps nothing of the generation_config")
    # What this model writes ends with other tokens of its generation_config.
    eos = {"eos_token": "<|eom_id|>"}
    directory = build_source(tmp_path, "llama", quiet_eos=False, tokenizer=eos)
    model, nla = load_from(kind, directory), load_pair("llama", "replace")
    options = {"positions": [-1], "max_new_tokens": 1, "score": False, "generate": 40}
    lengths = set()
    for text in (TEXT, LONG, SHORT):
        found = nla.explain_text(text, model=model, **options)
        expected = nla.explain_text(text, model=directory, **options)
        assert [e.token for e in found.flat] == [e.token for e in expected.flat]
        lengths.add(len(found))
    assert min(lengths) < 41


# TransformerLens installs torchvision when it boots a multimodal model


def test_nothing_of_ours_starts_a_process(
    kind: str, load_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == HOOKED:
        pytest.skip("loads no multimodal model from a directory")
    nla = load_pair("gemma3", "replace")
    directory = build_source(tmp_path, "gemma3")
    started: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        started.append(args)
        raise OSError("no process may be started here")

    monkeypatch.setattr(subprocess, "check_call", refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    model = load_from(kind, directory)
    started.clear()
    with nla_lens.attach(model, nla):
        resid = model.run_with_cache(TEXT)[1]["resid_post", K]
    found = resid[0, -1].explain(max_new_tokens=2)
    ours = nla_lens.extract(model, [TEXT], K)[0]
    theirs = nla_lens.extract(directory, [TEXT], K)[0]
    assert started == []
    assert known(resid) == known(ours) == known(theirs)
    torch.testing.assert_close(resid[0].as_ordinary(), theirs.as_ordinary(), rtol=1e-4, atol=1e-3)
    assert found.token == "."
