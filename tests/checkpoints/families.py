"""Small random models of many families, made by transformers and saved as it saves them.

Unlike the checkpoints of `builders`, these depend on the transformers that is installed, and need
not be those of a release: what is compared with them is the same class's own plain forward pass.
"""

import json
from pathlib import Path
from typing import Any

import torch

from nla_lens.models.saved_by_5 import reads_as_4

from . import sidecars, vocabulary, weights

TOKENIZER = "qwen2"
D, N_BLOCKS, VOCAB_SIZE, HEADS = 32, 4, 640, 4
SCALE = 8.0
_ATTENTION = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "intermediate_size": 48}
_LLAMA = {**_ATTENTION, "head_dim": 8, "max_position_embeddings": 512}
_GPT2 = {"n_positions": 512, "n_head": HEADS}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_MOE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
_LINEAR |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_HALF = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 2
_GEMMA4 = {"num_global_key_value_heads": 1, "global_head_dim": 16, "attention_k_eq_v": False}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_head": HEADS}),
    "codegen": ("codegen", {**_GPT2, "rotary_dim": 4}),
    "cohere": ("cohere", _LLAMA),
    "cohere2": ("cohere2", {**_LLAMA, "sliding_window": 8, "layer_types": _SLIDING}),
    "falcon": ("falcon", {"num_attention_heads": HEADS, "bias": True}),
    "falcon-alibi": ("falcon", {"num_attention_heads": HEADS, "alibi": True, "bias": True}),
    "falcon-new": (
        "falcon",
        {"num_attention_heads": HEADS, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "gemma": ("gemma", _LLAMA),
    "gemma2": ("gemma2", {**_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma4": (
        "gemma4_text",
        {
            **_LLAMA,
            **_GEMMA4,
            "pad_token_id": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "gemma4-dense": (
        "gemma4_text",
        {
            **_LLAMA,
            **_GEMMA4,
            "pad_token_id": 0,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "sliding_window": 24,
            "layer_types": _SLIDING,
        },
    ),
    "glm": ("glm", _LLAMA),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gpt_neo": (
        "gpt_neo",
        {
            "num_heads": HEADS,
            "num_layers": N_BLOCKS,
            "attention_types": [[["global", "local"], N_BLOCKS // 2]],
            "window_size": 8,
        },
    ),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": HEADS, "intermediate_size": 48}),
    "gpt2": ("gpt2", _GPT2),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "granite": (
        "granite",
        {**_LLAMA, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 16}),
    "mixtral": ("mixtral", {**_LLAMA, **_MOE}),
    "mpt": ("mpt", {"n_heads": HEADS, "expansion_ratio": 2, "max_seq_len": 512}),
    "olmo": ("olmo", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "opt": ("opt", {"num_attention_heads": HEADS, "ffn_dim": 48, "word_embed_proj_dim": D}),
    "opt-350m": (
        "opt",
        {
            "num_attention_heads": HEADS,
            "ffn_dim": 48,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "phi": ("phi", _ATTENTION),
    "phi3": ("phi3", {**_LLAMA, "pad_token_id": 0}),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA, **_MOE}),
    "stablelm": ("stablelm", _LLAMA),
    "starcoder2": ("starcoder2", _LLAMA),
    "xglm": ("xglm", {"attention_heads": HEADS, "ffn_dim": 48, "max_position_embeddings": 512}),
    # --- more state than keys and values
    "bamba": (
        "bamba",
        {**_LLAMA, **_MAMBA, "attn_layer_indices": [1, 3], "mamba_chunk_size": 16},
    ),
    "falcon_h1": ("falcon_h1", {**_LLAMA, **_MAMBA, "mamba_d_ssm": 64, "mamba_chunk_size": 16}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "time_step_rank": 4}),
    "jamba": (
        "jamba",
        {
            **_LLAMA,
            **_MOE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": (
        "lfm2",
        {**_LLAMA, "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48},
    ),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": (
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    ),
    "minimax": ("minimax", {**_LLAMA, **_MOE, "layer_types": _HALF, "block_size": 16}),
    "nemotron_h": (
        "nemotron_h",
        {
            **_LLAMA,
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", {**_LLAMA, **_LINEAR, "layer_types": _HALF}),
    "qwen3_5": ("qwen3_5_text", {**_LLAMA, **_LINEAR, "layer_types": _HALF}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**_LLAMA, **_LINEAR, **_MOE, "layer_types": _HALF}),
    "qwen3_next": ("qwen3_next", {**_LLAMA, **_LINEAR, **_MOE, "layer_types": _HALF}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            **_LLAMA,
            "lru_width": D,
            "attention_window_size": 24,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **_LLAMA,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "use_mem_rope": True,
            "adapter_rank": 4,
        },
    ),
}
"""For each name a model_type and what its config has besides the sizes that all share."""


def is_known(name: str) -> bool:
    """Whether the transformers that is installed has the family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return OPTIONS[name][0] in CONFIG_MAPPING


def config(name: str) -> Any:
    """A small config of the family, with random sizes left at nothing."""
    from transformers import AutoConfig

    model_type, options = OPTIONS[name]
    shared = {
        "hidden_size": D,
        "num_hidden_layers": N_BLOCKS,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 1,
        "eos_token_id": VOCAB_SIZE - 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(model_type, **{**shared, **options})


def model(name: str, seed: int = 0) -> Any:
    """The causal LM in eval mode, float32, with weights that make its blocks matter."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
    made = randomize(made, seed).eval().requires_grad_(False)
    # Answers of random weights should not end early.
    made.get_output_embeddings().weight[VOCAB_SIZE - 1] *= 0.05
    return made


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int) -> Any:
    """Gives every matrix and norm numbers of a trained model's size; the rest stays as it is."""
    tied = {id(p): n for n, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        if tied[id(parameter)] != name or parameter.ndim == 0:
            continue
        values = weights.noise(name, tuple(parameter.shape), seed)
        if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
            parameter.copy_(parameter + 0.2 * values)
        elif parameter.ndim == 1 and name.endswith("bias") and "dt" not in name:
            parameter.copy_(0.2 * values)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.copy_(0.7 * values)
        elif parameter.ndim >= 2 and "A_log" not in name:
            parameter.copy_(values * 1.6 / parameter.shape[-1] ** 0.5)
    return module


def save(name: str, directory: Path, seed: int = 0, make: Any = None) -> Path:
    """Writes the model, and a tokenizer and generation_config beside it."""
    made = (make or model)(name, seed)
    tensors = {}
    if name == "zamba2" and reads_as_4():
        # 4 does not save what blocks share.
        tensors["state_dict"] = {key: x.clone() for key, x in made.state_dict().items()}
    made.save_pretrained(directory, **tensors)
    eos = [VOCAB_SIZE - 1]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    vocabulary.write_tokenizer(directory, TOKENIZER)
    return directory


def save_av(name: str, directory: Path, rule: str, *, layer: int = 1, make: Any = None) -> Path:
    """Writes the model (or another that `make` makes) as an AV, with a sidecar for a rule."""
    save(name, directory, make=make)
    nano = {"schema": 1, "spelling": "actor", "kind": "nla_dataset"}
    sidecar = sidecars.sidecar(
        "av",
        TOKENIZER,
        d_model=D,
        layer=layer,
        base=f"test/{name}",
        injection_scale=SCALE,
        **(nano if rule == "norm_matched_add" else {}),
    )
    sidecars.write_sidecar(directory, sidecar)
    return directory


def save_ar(name: str, directory: Path, seed: int = 1) -> Path:
    """Writes the model without lm_head as an AR that reads its last block."""
    made = model(name, seed)
    made.base_model.save_pretrained(directory)
    vocabulary.write_tokenizer(directory, TOKENIZER)
    weights.write_value_head(directory, D, seed, torch.float32)
    layer = made.config.num_hidden_layers - 1
    sidecar = sidecars.sidecar(
        "ar", TOKENIZER, d_model=D, layer=layer, base=f"test/{name}", injection_scale=None
    )
    sidecars.write_sidecar(directory, sidecar)
    return directory


def wrapper(name: str, seed: int = 0) -> Any:
    """The family's multimodal wrapper around a text model as `model` makes it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = config(name)
    kind, options = text.model_type.removesuffix("_text"), {}
    seeing = {"hidden_size": 16, "intermediate_size": 16}
    if kind == "gemma4":
        options["audio_config"] = None
        seeing |= {"num_hidden_layers": text.num_hidden_layers, "num_attention_heads": 2}
        seeing |= {"num_key_value_heads": 2, "head_dim": 8}
    else:
        seeing |= {"depth": 2, "num_heads": 2, "out_hidden_size": D, "num_position_embeddings": 16}
    whole = AutoConfig.for_model(kind, text_config=text.to_dict(), vision_config=seeing, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForImageTextToText.from_config(whole, dtype=torch.float32)
    made = randomize(made, seed).eval().requires_grad_(False)
    made.get_output_embeddings().weight[VOCAB_SIZE - 1] *= 0.05
    return made
