"""config.json and generation_config.json of each family, with the keys of the released files.

The files are written by hand and not by transformers, so that they are the same whichever
version of it is installed: `rope_theta`, `rope_scaling` and `torch_dtype` as in the hub's files
of 2024 and 2025, or `rope_parameters` and `dtype` as transformers 5 saves them (`style="v5"`;
transformers 4.x then falls back to theta 10000 without a word).
"""

import torch

from . import vocabulary

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "gemma3")
VOCAB_SIZE = 640  # larger than every tokenizer here, as the embedding tables of the releases are
SLIDING_WINDOW = 24  # much shorter than the prompt

_BASE = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}


def _id(family: str, token: str) -> int:
    return vocabulary.tokenizer(family).token_to_id(token)


def _llama(tied: bool) -> dict:
    return _BASE | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        # the original length is short, so that the scaling matters within one prompt
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": tied,
        "bos_token_id": _id("llama", "<|begin_of_text|>"),
        "eos_token_id": eos_ids("llama"),
    }


def _qwen2(tied: bool) -> dict:
    return _BASE | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "bos_token_id": _id("qwen2", "<|endoftext|>"),  # in the config, yet never written
        "eos_token_id": _id("qwen2", "<|im_end|>"),
    }


def _qwen3(tied: bool) -> dict:
    return _qwen2(tied) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 32,  # four heads: wider than d_model
        "rope_scaling": None,
        "sliding_window": None,
        "bos_token_id": _id("qwen3", "<|endoftext|>"),
        "eos_token_id": _id("qwen3", "<|im_end|>"),
    }


def _gemma3_text(tied: bool) -> dict:
    return _BASE | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": SLIDING_WINDOW,
        "tie_word_embeddings": tied,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


VISION = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 24,
    "image_size": 28,
    "intermediate_size": 32,
    "layer_norm_eps": 1e-6,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "vision_use_head": False,
}


def _layer_types(family: str, n_blocks: int) -> list[str]:
    if family.startswith("gemma3"):  # sliding, sliding, full, ...: both kinds early
        return [
            "full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(n_blocks)
        ]
    return ["full_attention"] * n_blocks


def _to_v5(config: dict) -> None:
    theta = config.pop("rope_theta")
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    parameters = {**scaling, "rope_theta": theta}
    if "rope_local_base_freq" in config:
        local = {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    config["rope_parameters"] = parameters


def text_config(
    family: str, *, d_model: int, n_blocks: int, tied: bool | None = None, style: str = "hub"
) -> dict:
    """The decoder's config: the whole config.json but for the Gemma 3 wrapper, where it is nested.

    Args:
        family: one of `FAMILIES`.
        d_model: width; a multiple of 16.
        n_blocks: decoder blocks.
        tied: whether lm_head is the embedding table; None: as the family's large releases.
        style: "hub" or "v5", see above.
    """
    if tied is None:
        tied = family.startswith("gemma3")
    make = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3}.get(family, _gemma3_text)
    config = make(tied) | {
        "hidden_size": d_model,
        "intermediate_size": d_model * 5 // 2,
        "num_hidden_layers": n_blocks,
    }
    if family == "llama":
        config["head_dim"] = d_model // config["num_attention_heads"]
    else:
        config["layer_types"] = _layer_types(family, n_blocks)
    if style == "v5":
        _to_v5(config)
    return config


def full_config(family: str, text: dict, dtype: torch.dtype, *, style: str = "hub") -> dict:
    """config.json as written: the text config, or the Gemma 3 wrapper around it."""
    config = dict(text)
    if family == "gemma3":
        nested = {key: value for key, value in text.items() if key != "architectures"}
        config = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "boi_token_index": _id(family, "<start_of_image>"),
            "eoi_token_index": _id(family, "<end_of_image>"),
            "image_token_index": _id(family, "<image_soft_token>"),
            "eos_token_id": eos_ids(family),
            "initializer_range": 0.02,
            "mm_tokens_per_image": 4,
            "text_config": nested,
            "vision_config": VISION,
        }
    config["dtype" if style == "v5" else "torch_dtype"] = str(dtype).removeprefix("torch.")
    config["transformers_version"] = "5.23.0" if style == "v5" else "4.51.3"
    return config


def eos_ids(family: str) -> list[int]:
    """What ends a generation of this family, as its generation_config.json lists it."""
    names = {
        "llama": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "qwen2": ("<|im_end|>", "<|endoftext|>"),
        "qwen3": ("<|im_end|>", "<|endoftext|>"),
    }.get(family, ("<eos>", "<end_of_turn>"))
    return [_id(family, name) for name in names]


def generation_config(family: str) -> dict:
    """The family's generation_config.json; all of it but the ids leaks into "greedy" if let."""
    config = {"do_sample": True, "eos_token_id": eos_ids(family), "transformers_version": "4.51.3"}
    if family == "llama":
        return config | {
            "bos_token_id": _id(family, "<|begin_of_text|>"),
            "temperature": 0.6,
            "top_p": 0.9,
        }
    if family.startswith("gemma3"):
        leaks = {"cache_implementation": "hybrid", "top_k": 64, "top_p": 0.95}
        return config | leaks | {"bos_token_id": 2, "pad_token_id": 0}
    end = _id(family, "<|endoftext|>")
    leaks = {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    return config | leaks | {"bos_token_id": end, "pad_token_id": end}
