"""The tensors of a checkpoint, each a function of its name and shape, and their files."""

import itertools
import json
import math
import os
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

# Standard deviations in units of 1/sqrt(fan-in), found by trial: attention picks out few
# positions, the marker's row among them, and blocks outweigh the embedding of the last token;
# otherwise a random model falls into a loop, the same for every vector.
_GAIN = {
    "q_proj": 1.7,
    "k_proj": 1.7,
    "v_proj": 1.3,
    "o_proj": 3.0,
    "gate_proj": 2.0,
    "up_proj": 1.5,
    "down_proj": 2.0,
}


def shapes(text: dict, n_blocks: int | None = None) -> dict[str, tuple[int, ...]]:
    """Names (as in a text model's file) and shapes of the tensors that a text config asks for."""
    family = text["model_type"]
    d, ff, vocab = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    head_dim = text.get("head_dim", d // heads)
    block = {
        "self_attn.q_proj.weight": (heads * head_dim, d),
        "self_attn.k_proj.weight": (kv_heads * head_dim, d),
        "self_attn.v_proj.weight": (kv_heads * head_dim, d),
        "self_attn.o_proj.weight": (d, heads * head_dim),
        "mlp.gate_proj.weight": (ff, d),
        "mlp.up_proj.weight": (ff, d),
        "mlp.down_proj.weight": (d, ff),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    if family == "qwen2":
        block |= {
            f"self_attn.{p}_proj.bias": (block[f"self_attn.{p}_proj.weight"][0],) for p in "qkv"
        }
    if family in ("qwen3", "gemma3_text"):
        block |= {f"self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
    if family == "gemma3_text":
        block |= {f"{p}_feedforward_layernorm.weight": (d,) for p in ("pre", "post")}
    named = {"model.embed_tokens.weight": (vocab, d)}
    for index in range(text["num_hidden_layers"] if n_blocks is None else n_blocks):
        named |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    named["model.norm.weight"] = (d,)
    if not text["tie_word_embeddings"]:
        named["lm_head.weight"] = (vocab, d)
    return named


def vision_shapes(vision: dict, d_model: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as in the hub's files, of the wrapper's vision tower and projector."""
    v, ff, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    named = {
        "embeddings.patch_embedding.weight": (v, vision["num_channels"], patch, patch),
        "embeddings.patch_embedding.bias": (v,),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, v),
    }
    for index in range(vision["num_hidden_layers"]):
        linear = {f"self_attn.{p}": (v, v) for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
        linear |= {"mlp.fc1": (ff, v), "mlp.fc2": (v, ff), "layer_norm1": (v,), "layer_norm2": (v,)}
        for name, shape in linear.items():
            named[f"encoder.layers.{index}.{name}.weight"] = shape
            named[f"encoder.layers.{index}.{name}.bias"] = shape[:1]
    named |= {"post_layernorm.weight": (v,), "post_layernorm.bias": (v,)}
    return {f"vision_tower.vision_model.{name}": shape for name, shape in named.items()} | {
        "multi_modal_projector.mm_input_projection_weight": (v, d_model),
        "multi_modal_projector.mm_soft_emb_norm.weight": (v,),
    }


def noise(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Standard normal numbers that depend on the name, the shape and the seed alone."""
    key = zlib.crc32(f"{seed}/{name}/{shape}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))


def tensor(name: str, shape: tuple[int, ...], seed: int, family: str) -> torch.Tensor:
    """One weight in float32, scaled by what it is for."""
    values = noise(name, shape, seed)
    part = name.split(".")[-2]
    if name == "model.norm.weight":
        # Random signs, so that with tied weights a token does not predict itself.
        values = torch.sign(values) * (1 + 0.3 * values.abs())
        return 2 * values - 1 if family == "gemma3_text" else values
    if part in ("q_norm", "k_norm"):
        values = 1.7 + 0.2 * values
        return values - 1 if family == "gemma3_text" else values
    if part.startswith("post_") and family == "gemma3_text":  # scales what a block adds
        return 0.5 + 0.2 * values
    if part.endswith("norm") or part.endswith("layernorm"):
        return 0.2 * values if family == "gemma3_text" else 1 + 0.2 * values
    if name.endswith("bias"):
        return 0.3 * values
    if part == "embed_tokens":  # Gemma multiplies by sqrt(d) itself
        return values * (1 / math.sqrt(shape[1]) if family == "gemma3_text" else 0.7)
    if part == "lm_head":
        return values * 2 / math.sqrt(shape[1])
    return values * _GAIN.get(part, 1.0) / math.sqrt(math.prod(shape[1:]) or 1)


def make(
    text: dict, seed: int, quiet: list[int] = (), n_blocks: int | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of a text model in float32.

    Args:
        text: the text config.
        seed: another seed, another model.
        quiet: ids whose output rows are small, so that they are not generated.
        n_blocks: fewer blocks than the config has.
    """
    family = text["model_type"]
    made = {
        name: tensor(name, shape, seed, family) for name, shape in shapes(text, n_blocks).items()
    }
    raise_outputs(made, quiet, 0.1)
    return made


def _output(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])


def raise_outputs(tensors: dict[str, torch.Tensor], ids: list[int], factor: float) -> None:
    """Make tokens likelier (and unlikelier) than others by longer output rows."""
    _output(tensors)[list(ids)] *= factor


def teach_sequence(tensors: dict[str, torch.Tensor], ids: list[int]) -> None:
    """Rig an untied model: its first token comes up now and then, and the rest always follow.

    The embedding of each token is made long enough to outweigh what the blocks add, and the
    output row of the next one points along it, as it looks behind the final norm.
    """
    if "lm_head.weight" not in tensors:
        raise ValueError("teach_sequence needs an untied lm_head")
    embed, output, norm = (
        tensors[f"{n}.weight"] for n in ("model.embed_tokens", "lm_head", "model.norm")
    )
    output[ids[0]] *= 2
    for current, following in itertools.pairwise(ids):
        embed[current] *= 60 / embed[current].norm()
        direction = embed[current] * norm
        output[following] = 3 * direction / direction.norm()


def hub_names(
    tensors: dict[str, torch.Tensor], vision: dict, d_model: int, seed: int
) -> dict[str, torch.Tensor]:
    """A text model's tensors under the names of the released wrappers, vision tower added."""
    renamed = {f"language_model.{name}": value for name, value in tensors.items()}
    rest = {
        name: 0.1 * noise(name, shape, seed)
        for name, shape in vision_shapes(vision, d_model).items()
    }
    return renamed | rest


def module_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hub names of a wrapper -> names of its modules in memory, as some training tools save."""
    pairs = (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
    renamed = {}
    for name, value in tensors.items():
        old, new = next(pair for pair in pairs if name.startswith(pair[0]))
        renamed[new + name.removeprefix(old)] = value
    return renamed


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        str(path),
        metadata={"format": "pt"},
    )
    os.chmod(path, 0o644)


def save(
    tensors: dict[str, torch.Tensor], directory: Path, dtype: torch.dtype, layout: str = "single"
) -> None:
    """Write the weights.

    Args:
        tensors: name -> values.
        directory: where.
        dtype: of all tensors written.
        layout: "single" (model.safetensors); "sharded" (three shards and their index);
            "indexed" (model.safetensors, with an index that names it); "stale_index"
            (a whole model.safetensors beside an index of shards that are not there).
    """
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    names = list(tensors)
    if layout == "single":
        return _save(tensors, directory / "model.safetensors")
    shards = [names] if layout == "indexed" else [names[i::3] for i in range(3)]
    weight_map = {}
    for number, part in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if layout == "indexed"
            else f"model-{number:05d}-of-00003.safetensors"
        )
        weight_map |= dict.fromkeys(part, file)
        if layout != "stale_index":
            _save({name: tensors[name] for name in part}, directory / file)
    if layout == "stale_index":
        _save(tensors, directory / "model.safetensors")
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return None


def write_value_head(
    directory: Path, d_model: int, seed: int, dtype: torch.dtype, bias: bool = False
) -> None:
    """Write value_head.safetensors: `weight` [d, d], and `bias` [d] if asked."""
    head = {"weight": noise("value_head", (d_model, d_model), seed) / d_model**0.5}
    if bias:
        head["bias"] = noise("value_head.bias", (d_model,), seed)
    _save(
        {name: value.to(dtype) for name, value in head.items()},
        directory / "value_head.safetensors",
    )


def vectors(d_model: int = 64, n: int = 6, seed: int = 0) -> torch.Tensor:
    """Vectors [n, d] in float32 whose norms go from 1e-3 to 1e4."""
    directions = noise("vectors", (n, d_model), seed)
    norms = torch.logspace(-3, 4, n) if n > 1 else torch.ones(1)
    return directions / directions.norm(dim=-1, keepdim=True) * norms[:, None]


def many_vectors(n: int) -> torch.Tensor:
    """As many different ones `[n, 64]`, of all norms."""
    return torch.cat([vectors(seed=seed) for seed in range(n // 6 + 1)])[:n]
