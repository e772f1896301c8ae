"""A HookedTransformer out of a checkpoint directory.

HookedTransformer.from_pretrained takes names of a fixed list only. Here its own converters do the
weights; the config is what they would have made of a hub model of the family.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .checkpoints import reference


def hooked_transformer(directory: Path, *, fold_ln: bool = False, **processing: bool) -> Any:
    """Load a Llama or Qwen2 checkpoint as a HookedTransformer.

    Args:
        directory: written by `build_source`.
        fold_ln: fold the norms' weights into what reads from them.
        processing: further switches of `load_and_process_state_dict`; all off if not named.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained import weight_conversions

    config = reference.read_text_config(directory)
    cfg = _config(config, fold_ln)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    convert = getattr(weight_conversions, f"convert_{config['model_type']}_weights")
    off = dict.fromkeys(("center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(
        convert(loaded, model.cfg), fold_ln=fold_ln, **(off | processing)
    )
    return model.requires_grad_(False).eval()


def _config(config: dict, fold_ln: bool) -> Any:
    from transformer_lens import HookedTransformerConfig

    d_head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scaling = config.get("rope_scaling") or {}
    ntk = {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_low_freq_factor": scaling.get("low_freq_factor"),
        "NTK_by_parts_high_freq_factor": scaling.get("high_freq_factor"),
        "NTK_by_parts_factor": scaling.get("factor"),
        "NTK_original_ctx_len": scaling.get("original_max_position_embeddings"),
    }
    return HookedTransformerConfig(
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        d_head=d_head,
        n_heads=config["num_attention_heads"],
        n_key_value_heads=config["num_key_value_heads"],
        d_mlp=config["intermediate_size"],
        d_vocab=config["vocab_size"],
        n_ctx=256,
        eps=config["rms_norm_eps"],
        act_fn=config["hidden_act"],
        normalization_type="RMSPre" if fold_ln else "RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=int(config["rope_theta"]),
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        default_prepend_bos=config["model_type"] == "llama",
        original_architecture=config["architectures"][0] if "architectures" in config else None,
        init_weights=False,
        device="cpu",
        **(ntk if scaling else {}),
    )
