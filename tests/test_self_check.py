"""A local engine whose cached decoding is not what it seems is refused when it is loaded.

Each fault is made in the framework's own code, as a new release would bring it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama as llama

from nla_lens import NLA, NLAError
from nla_lens.engines.local import self_check, shared_prefix
from nla_lens.models import block_reader
from nla_lens.models.cache_keyword import NAMES, cache_among, cache_keyword
from nla_lens.models.kv_cache import RoomyLayer
from nla_lens.stream.origin import where_of_pass

from .checkpoints import FAMILIES

LOCAL = ["transformers"]
if find_spec("transformer_lens") and find_spec("transformer_lens.model_bridge"):
    LOCAL.append("transformer_lens")
if find_spec("nnsight"):
    LOCAL.append("nnsight")
BY_STEPS = [name for name in LOCAL if name != "nnsight"]
PACKAGES = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}

Patch = pytest.MonkeyPatch


def attention_drops_its_cache(patch: Patch) -> None:
    """What transformers 5.24 makes of TransformerLens 4.3."""
    forward = llama.LlamaAttention.forward

    def without(module: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **{k: v for k, v in kwargs.items() if k not in NAMES})

    patch.setattr(llama.LlamaAttention, "forward", without)
    if "transformer_lens" in LOCAL:
        from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

        patch.setattr(AttentionBridge, "_update_kv_cache", lambda module, k, v, **kwargs: (k, v))


def steps_stand_one_late(patch: Patch) -> None:
    forward = llama.LlamaRotaryEmbedding.forward

    def late(module: Any, x: Tensor, position_ids: Tensor) -> Any:
        return forward(module, x, position_ids + (x.shape[1] == 1))

    patch.setattr(llama.LlamaRotaryEmbedding, "forward", late)


def steps_see_only_themselves(patch: Patch) -> None:
    """A mask that hides the cache."""
    create = llama.create_causal_mask

    def hiding(*args: Any, **kwargs: Any) -> Any:
        mask = create(*args, **kwargs)
        cache = next((kwargs[name] for name in NAMES if name in kwargs), None)
        n_past = cache.get_seq_length() if cache is not None else 0
        embeds_BTD = kwargs.get("inputs_embeds", kwargs.get("input_embeds"))
        if embeds_BTD.shape[1] > 1 or not n_past:
            return mask
        mask = torch.zeros(len(embeds_BTD), 1, 1, n_past + 1, dtype=torch.bool)
        mask[..., -1] = True
        return mask

    patch.setattr(llama, "create_causal_mask", hiding)


def padding_is_seen(patch: Patch) -> None:
    """Empty columns of a row that joined later, attended to."""
    create = llama.create_causal_mask

    def seeing(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **{**kwargs, "attention_mask": None})

    patch.setattr(llama, "create_causal_mask", seeing)


def positions_are_the_longest_rows(patch: Patch) -> None:
    forward = llama.LlamaRotaryEmbedding.forward

    def shared(module: Any, x: Tensor, position_ids: Tensor) -> Any:
        return forward(module, x, position_ids.amax(0, keepdim=True).expand_as(position_ids))

    patch.setattr(llama.LlamaRotaryEmbedding, "forward", shared)


def cache_keeps_the_first_columns(patch: Patch) -> None:
    """As a cache that does not grow."""
    update = RoomyLayer.update

    def stuck(layer: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> Any:
        keys, values = update(layer, key_states, value_states, *args, **kw)
        if key_states.shape[-2] == 1:
            keys[..., -1, :], values[..., -1, :] = keys[..., -2, :], values[..., -2, :]
        return keys, values

    patch.setattr(RoomyLayer, "update", stuck)


def load(av: Path, engine: str, **options: Any) -> NLA:
    return NLA.from_pretrained(av=av, engine=engine, **options)


@pytest.fixture
def av(pair_dirs: Callable[..., tuple[Path, Path]]) -> Path:
    return pair_dirs("llama", "replace")[0]


IN_ANY_ROW = [attention_drops_its_cache, steps_stand_one_late, steps_see_only_themselves]
IN_ROWS_THAT_JOIN = [padding_is_seen, positions_are_the_longest_rows, cache_keeps_the_first_columns]


@pytest.mark.parametrize("fault", IN_ANY_ROW)
@pytest.mark.parametrize("engine", LOCAL)
def test_a_fault_of_the_framework_is_refused(
    av: Path, engine: str, fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(NLAError) as refused:
        load(av, engine)
    said = str(refused.value)
    assert f"engine={engine!r}" in said and f"transformers {version('transformers')}" in said
    assert "'llama'" in said and "another release of" in said
    if engine in PACKAGES:
        assert f"{PACKAGES[engine]} {version(PACKAGES[engine])}" in said
        assert "Use engine='transformers'" in said


@pytest.mark.parametrize("fault", IN_ROWS_THAT_JOIN)
@pytest.mark.parametrize("engine", BY_STEPS)
def test_a_fault_that_only_some_rows_have(
    av: Path, engine: str, fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(NLAError, match=f"engine='{engine}'.* of the spread away"):
        load(av, engine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fault", IN_ANY_ROW + IN_ROWS_THAT_JOIN)
def test_rounding_hides_no_fault(
    av: Path, fault: Callable[[Patch], None], dtype: torch.dtype, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(NLAError, match=r"engine='transformers'"):
        load(av, "transformers", dtype=dtype)


@pytest.mark.parametrize("engine", BY_STEPS)
def test_a_keyword_that_nobody_reads(av: Path, engine: str, monkeypatch: Patch) -> None:
    """The next renaming: layers take any keyword, and say nothing."""
    module = importlib.import_module(f"nla_lens.engines.local.{engine}")
    monkeypatch.setattr(module, "cache_keyword", lambda model: "key_values")
    with pytest.raises(NLAError, match=f"engine='{engine}'"):
        load(av, engine)


@pytest.mark.skipif("transformer_lens" not in LOCAL, reason="needs a TransformerBridge")
def test_transformers_5_24_with_transformer_lens_4_3(av: Path, monkeypatch: Patch) -> None:
    """Without what makes TransformerLens' attention find its cache the pair is refused."""
    from nla_lens.engines.local import transformer_lens as engine

    monkeypatch.setattr(engine, "let_attention_find_its_cache", lambda bridge: [])
    old_name = cache_keyword(llama.LlamaAttention.forward) == "past_key_values"
    if old_name or reads_the_new_name():
        assert load(av, "transformer_lens")
        return
    with pytest.raises(NLAError, match=r"transformer-lens 4\..*transformers 5\."):
        load(av, "transformer_lens")


def reads_the_new_name() -> bool:
    """Whether this TransformerLens knows `cache`."""
    import inspect

    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    return '"cache"' in inspect.getsource(AttentionBridge._update_kv_cache)


def test_attention_over_a_shared_prefix_is_looked_at(av: Path, monkeypatch: Patch) -> None:
    one_query = shared_prefix._one_query

    def flipped(query: Tensor, key: Tensor, value: Tensor, prefix: Any, *rest: Any) -> Tensor:
        keys, values = prefix
        return one_query(query, key, value, (keys.flip(2), values), *rest)

    monkeypatch.setattr(shared_prefix, "_one_query", flipped)
    with pytest.raises(NLAError, match=r"engine='transformers'.* of the spread away"):
        load(av, "transformers")


def test_a_model_that_fails_with_a_cache_is_refused_at_load(av: Path, monkeypatch: Patch) -> None:
    def layers(cache: Any, *args: Any, **kwargs: Any) -> Any:
        raise IndexError("list index out of range")

    monkeypatch.setattr(RoomyLayer, "update", layers)
    with pytest.raises(NLAError, match=r"'llama' model: .* fails \(IndexError: list index out"):
        load(av, "transformers")


def test_running_out_of_memory_is_not_the_models_fault(av: Path, monkeypatch: Patch) -> None:
    def full(cache: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RoomyLayer, "update", full)
    with pytest.raises(NLAError, match="out of memory for a single vector"):
        load(av, "transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_no_fault(
    pair_dirs: Callable[..., tuple[Path, Path]], family: str, dtype: torch.dtype, monkeypatch: Patch
) -> None:
    found: list[float] = []
    apart = self_check._apart
    monkeypatch.setattr(self_check, "_apart", lambda a, b: found.append(apart(a, b)) or found[-1])
    load(pair_dirs(family, "replace")[0], "transformers", dtype=dtype)
    assert len(found) == 3 and max(found) < (1e-4 if dtype is torch.float32 else 0.05)


def test_what_cannot_be_compared_is_not_equal() -> None:
    line = torch.tensor([[1.0, 2.0, 3.0]])
    assert self_check._apart(line, line) == 0
    assert self_check._apart(line + 0.5, line) == pytest.approx(0.75**0.5 / 2**0.5)
    assert self_check._apart(torch.full_like(line, torch.nan), line) == torch.inf
    masked = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert self_check._apart(masked, masked) == 0


# The reconstructor, whose prompts share a prefix


def test_a_reconstructor_that_reads_its_prefix_wrongly(
    pair_dirs: Callable[..., tuple[Path, Path]], monkeypatch: Patch
) -> None:
    av, ar = pair_dirs("llama", "replace")
    monkeypatch.setattr(block_reader, "WIDE", 0)
    NLA.from_pretrained(av=av, ar=ar)
    monkeypatch.setattr(block_reader, "cache_keyword", lambda model: "key_values")
    with pytest.raises(NLAError, match="so its vectors would be wrong"):
        NLA.from_pretrained(av=av, ar=ar)


# The keyword


class Takes:
    def new(self, ids: Any, cache: Any = None, **kwargs: Any) -> None: ...

    def old(self, ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...

    def anything(self, *args: Any, **kwargs: Any) -> None: ...


def test_the_keyword_is_read_from_the_signature() -> None:
    assert cache_keyword(Takes().new) == "cache"
    assert cache_keyword(Takes().old) == "past_key_values"
    assert cache_keyword(Takes().anything) == "past_key_values"


@pytest.mark.parametrize("keyword", NAMES)
def test_a_cache_is_found_under_either_name(keyword: str) -> None:
    past = Cache(layer_class_to_replicate=RoomyLayer)
    past.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4), 0)
    assert cache_among({"use_cache": True, keyword: past}) is past
    assert cache_among(dict.fromkeys(NAMES) | {keyword: past}) is past
    where_BT3 = where_of_pass((), {"input_ids": torch.tensor([[7, 8], [9, 7]]), keyword: past})
    assert where_BT3 is not None and where_BT3[..., 1].tolist() == [[5, 6], [5, 6]]


def test_no_cache_is_none() -> None:
    assert cache_among({"use_cache": True}) is None
    assert cache_among(dict.fromkeys(NAMES)) is None


def test_the_keyword_of_a_wrapped_model(av: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(av)
    wanted = "cache" if "cache" in forward_names(model) else "past_key_values"
    assert wanted in forward_names(model)
    assert cache_keyword(model) == cache_keyword(torch.nn.DataParallel(model)) == wanted


def forward_names(module: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(module).forward).parameters)
