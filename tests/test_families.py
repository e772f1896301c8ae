"""Many families, wrapped and offloaded models: what a plain pass of the same class computes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

import nla_lens
from nla_lens import NLAError
from nla_lens.errors import NLAWarning
from nla_lens.models import block_reader
from nla_lens.models.anatomy import blocks_of
from nla_lens.stream import hf_source

from .checkpoints import build_source, families

LAYER = 1
TEXTS = [
    "A letter from a teacher.",
    "x",
    "The text is a recipe. The words before the vector name a pan, some garlic and an onion, and "
    "then the salt that goes in next.",
    "Two friends speak.",
]
# transformers' own hidden_states of these begin behind block 0: which layer is meant is not known.
UNKNOWN = ("falcon_mamba", "mamba", "mamba2")
KNOWN = [name for name in families.OPTIONS if name not in UNKNOWN and families.is_known(name)]


def known(*names: str) -> list[str]:
    return [name for name in names if name in KNOWN]


# Those at the end keep more than keys and values, and some in caches of their own.
WRITING = (
    *("gpt2", "gpt_neox", "opt", "qwen3_5", "gemma4", "falcon", "bloom"),
    *("jamba", "lfm2", "minimax", "recurrent_gemma", "falcon_h1"),
)
each_family = pytest.mark.parametrize("name", KNOWN)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: families.save(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from .checkpoints import vocabulary

    vocabulary.write_tokenizer(path := tmp_path_factory.mktemp("tokens"), families.TOKENIZER)
    return AutoTokenizer.from_pretrained(path)


model_of = cache(families.model)


@torch.no_grad()
def states(model: Any, ids: list[int]) -> tuple[Tensor, ...]:
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return tuple(state[0] for state in out.hidden_states)


def wanted(model: Any, tokenizer: Any, layer: int = LAYER) -> list[Tensor]:
    """`hidden_states[K + 1]` of each text alone, in a plain pass."""
    return [states(model, tokenizer(text)["input_ids"])[layer + 1] for text in TEXTS]


def relative(got: Tensor, by_hand: Tensor) -> float:
    got, by_hand = got.double(), by_hand.double()
    return float(((got - by_hand).norm(dim=-1) / by_hand.norm(dim=-1)).max())


def same(got: list[Any], by_hand: list[Tensor], within: float = 2e-6) -> None:
    assert [g.shape for g in got] == [b.shape for b in by_hand]
    assert max(map(relative, got, by_hand)) < within


# --- sources --------------------------------------------------------------------------------------


@each_family
def test_sources(saved: Any, tokenizer: Any, monkeypatch: Any, name: str) -> None:
    """A model, its directory (blocks 0..K alone) and nnsight say what a plain pass says."""
    model, loaded = model_of(name), []
    load = hf_source.load_backbone
    monkeypatch.setattr(
        hf_source, "load_backbone", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    by_hand = wanted(model, tokenizer)
    before = [states(model, tokenizer(text)["input_ids"])[LAYER] for text in TEXTS]
    assert min(map(relative, before, by_hand)) > 0.01
    same(nla_lens.extract(model, TEXTS, LAYER, tokenizer=tokenizer), by_hand)
    same(nla_lens.extract(saved(name), TEXTS, LAYER), by_hand)
    assert len(blocks_of(loaded[0])) == LAYER + 1 and type(loaded[0]).__name__.endswith("Model")
    nnsight = pytest.importorskip("nnsight")
    same(
        nla_lens.extract(nnsight.NNsight(families.model(name)), TEXTS, LAYER, tokenizer=tokenizer),
        by_hand,
    )


@each_family
def test_sources_of_a_large_width(tokenizer: Any, monkeypatch: Any, name: str) -> None:
    """Texts cut and padded, and last blocks that run for few tokens: the ways of large models."""
    monkeypatch.setattr(block_reader, "WIDE", 0)
    model = model_of(name)
    by_hand = [resid[-1:] for resid in wanted(model, tokenizer)]
    got = nla_lens.extract(model, TEXTS, LAYER, positions=[-1], tokenizer=tokenizer)
    same(got, by_hand, within=1e-5)
    firsts = [resid[:1] for resid in wanted(model, tokenizer)]
    same(nla_lens.extract(model, TEXTS, LAYER, positions=0, tokenizer=tokenizer), firsts, 1e-5)


def test_rotations_that_go_by_the_length(tokenizer: Any, monkeypatch: Any) -> None:
    """In a long text each token is rotated otherwise; cutting or padding would change them."""
    monkeypatch.setattr(block_reader, "WIDE", 0)
    config = families.config("phi3")
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config.original_max_position_embeddings = rope["original_max_position_embeddings"] = 8
    config.rope_parameters, config.max_position_embeddings = rope, 64
    model = families.randomize(AutoModel.from_config(config), 0).eval()
    by_hand = [states(model, tokenizer(text)["input_ids"])[LAYER + 1] for text in TEXTS]
    assert max(map(len, by_hand)) > 20 > min(map(len, by_hand))
    same(nla_lens.extract(model, TEXTS, LAYER, tokenizer=tokenizer), by_hand, 1e-5)
    got = nla_lens.extract(model, TEXTS, LAYER, positions=slice(4), tokenizer=tokenizer)
    same(got, [resid[:4] for resid in by_hand], 1e-5)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_family_whose_layers_are_counted_otherwise(tokenizer: Any, name: str) -> None:
    if not families.is_known(name):
        pytest.skip("this transformers does not know it")
    with pytest.raises(NLAError, match=r"hidden_states\[1\] is not the output of block 0"):
        nla_lens.extract(model_of(name), TEXTS, LAYER, tokenizer=tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "falcon-alibi", "gpt_neox", "mpt"])
def test_a_padded_batch_is_rows_alone(tokenizer: Any, name: str, side: str) -> None:
    """What people compare with: transformers' own padded batch, masked and with its positions."""
    model = model_of(name)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    placed = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    if name in ("bloom", "mpt", "opt", "falcon-alibi"):
        placed = {}
    with torch.no_grad():
        batch = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **placed
        ).hidden_states[LAYER + 1]
    got = nla_lens.extract(model, TEXTS, LAYER, tokenizer=tokenizer, batch_size=4)
    same(got, [row[real.bool()] for row, real in zip(batch, mask, strict=True)], within=1e-5)


@pytest.mark.parametrize("name", known(*WRITING))
def test_explain_text_writes_on(saved: Any, tokenizer: Any, name: str, tmp_path: Path) -> None:
    from nla_lens.stream.hf_source import HFSource

    source = HFSource(model_of(name), tokenizer)
    ids = tokenizer(TEXTS[0])["input_ids"]
    grown = list(ids)
    for _ in range(6):
        with torch.no_grad():
            out = model_of(name)(input_ids=torch.tensor([grown]), use_cache=False)
        grown.append(int(out.logits[0, -1].argmax()))
    assert source.go_on(ids, 6) == grown[len(ids) :]


# --- what is refused ------------------------------------------------------------------------------


def tiny(kind: str) -> Any:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 50}
    small |= {"num_hidden_layers": 2}
    if kind == "xlnet":
        small = {"d_model": 16, "d_inner": 16, "n_head": 2, "d_head": 8, "n_layer": 2}
    return AutoModel.from_config(AutoConfig.for_model(kind, **small)).eval()


def t5() -> Any:
    config = AutoConfig.for_model("t5", d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2)
    return AutoModel.from_config(config).eval()


def looking_ahead() -> Any:
    config = families.config("gemma2")
    config.use_bidirectional_attention = True
    return AutoModel.from_config(config).eval()


def on_meta() -> Any:
    with torch.device("meta"):
        return AutoModel.from_config(families.config("gpt2"))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tiny("llama"), tiny("llama")


class StreamsSideBySide(nn.Module):
    """A block whose output is two residual streams, as in models with hyper-connections."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, resid_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([resid_BTD, resid_BTD])


def side_by_side() -> Any:
    model = tiny("gpt2")
    model.h[0] = StreamsSideBySide(model.h[0])
    return model


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: tiny("bert"), "BertModel is an encoder: its tokens see those after them"),
        (lambda: tiny("roberta"), "RobertaModel is an encoder"),
        (t5, "T5Model is an encoder-decoder model"),
        (lambda: t5().encoder, "T5.* is an encoder-decoder model"),
        (looking_ahead, "Gemma2Model is an encoder"),
        (lambda: tiny("vit"), "no decoder blocks found in ViTModel"),
        (on_meta, "on the meta device, that is, not loaded"),
        (Two, r"Two holds 2 transformers models \(LlamaModel, LlamaModel\)"),
        (lambda: tiny("xlnet"), "residual stream of XLNetModel is not known"),
        (side_by_side, "residual stream of GPT2Model is not known"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "cannot read the residual stream of a Sequential"),
    ],
)
def test_what_is_no_decoder(make: Callable[[], Any], names: str, tokenizer: Any) -> None:
    with pytest.raises(NLAError, match=names):
        nla_lens.extract(make(), TEXTS, 0, tokenizer=tokenizer)


def test_an_encoder_on_disk(tokenizer: Any, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NLAError, match="BertModel is an encoder"):
        nla_lens.extract(tmp_path, TEXTS, 0)


# --- wrapped and offloaded ------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As people write one: a model inside, and something of their own beside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = nn.ModuleDict({"lm": model}), nn.Linear(4, 4)


def distributed(model: nn.Module) -> Any:
    from torch import distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for parameter in list(model.parameters())[:1]:
        parameter.requires_grad_(True)
    return nn.parallel.DistributedDataParallel(model)


def prepared(model: nn.Module) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, distributed, torch.compile, Wrapper, prepared, lambda m: Wrapper(Wrapper(m))],
    ids=["DataParallel", "DDP", "compile", "own", "accelerate", "own twice"],
)
def test_the_model_inside(tokenizer: Any, wrap: Any, name: str) -> None:
    model = families.model(name)
    by_hand = wanted(model, tokenizer)
    same(nla_lens.extract(wrap(model), TEXTS, LAYER, tokenizer=tokenizer), by_hand)


def adapted(model: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules="all-linear",
        r=2,
        init_lora_weights=False,
        **{"lora_dropout": 0.0, **options},
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config, adapter_name="mine").eval()


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "falcon"])
def test_active_adapters_act(tokenizer: Any, name: str) -> None:
    plain = wanted(model_of(name), tokenizer)
    model = adapted(families.model(name))
    by_hand = wanted(model, tokenizer)
    assert min(map(relative, plain, by_hand)) > 1e-3
    same(nla_lens.extract(model, TEXTS, LAYER, tokenizer=tokenizer), by_hand)
    same(nla_lens.extract(nn.DataParallel(model), TEXTS, LAYER, tokenizer=tokenizer), by_hand)
    with model.disable_adapter():
        same(nla_lens.extract(model, TEXTS, LAYER, tokenizer=tokenizer), plain)


def test_virtual_tokens_are_refused(tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(families.model("gpt2"), config)
    with pytest.raises(NLAError, match=r"PREFIX_TUNING: it acts by virtual tokens"):
        nla_lens.extract(model, TEXTS, LAYER, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: families.model("gpt2").train(),
        lambda: adapted(families.model("mistral"), lora_dropout=0.1).train(),
    ],
)
def test_dropout_is_said(make: Any, tokenizer: Any) -> None:
    with pytest.warns(NLAWarning, match=r"in training mode, .*dropout acts at .* model\.eval"):
        nla_lens.extract(model := make(), TEXTS, LAYER, tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nla_lens.extract(model.eval(), TEXTS, LAYER, tokenizer=tokenizer)
        # Training mode alone changes nothing where no dropout is.
        nla_lens.extract(families.model("qwen3_moe").train(), TEXTS, LAYER, tokenizer=tokenizer)


def offloaded(kind: str, model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    if kind == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if kind == "disk_offload":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    names = [name for name, _ in model.named_children()]
    stack = next(name for name in names if name not in ("lm_head", "embed_out"))
    parts = [f"{stack}.{name}" for name, _ in getattr(model, stack).named_children()]
    device_map = dict.fromkeys([*parts, *(n for n in names if n != stack)], "disk")
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("name", known("gpt2", "qwen3_5", "falcon", "gemma4"))
@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_sources(tokenizer: Any, tmp_path: Path, name: str, kind: str) -> None:
    by_hand = wanted(model_of(name), tokenizer)
    model = offloaded(kind, families.model(name), tmp_path)
    assert all(p.device.type == "meta" for p in blocks_of(model).parameters())
    same(nla_lens.extract(model, TEXTS, LAYER, tokenizer=tokenizer), by_hand)
    assert all(p.device.type == "meta" for p in blocks_of(model).parameters())


def test_a_missing_norm_of_a_block_is_not_a_final_norm(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build_source(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NLAError, match=re.escape("layers.1.input_layernorm.weight")):
        nla_lens.extract(tmp_path, TEXTS, LAYER)
