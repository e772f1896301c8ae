"""Writes checkpoints in the released layout: config, weights, tokenizer, sidecar."""

from __future__ import annotations

import json
from pathlib import Path

import tokenization
import torch
import yaml
from pair_training import ar_prompt_ids, av_prompt_ids
from safetensors.torch import save_file
from settings import Settings
from tokenizers import Tokenizer
from torch import nn

BASE = "nla_lens/tiny"
SUFFIX_TOKENS = 3


def export_causal_lm(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, settings: Settings, blocks: int
) -> None:
    """Writes a causal language model; the tied output matrix is not stored twice."""
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    _write(folder, weights, tokenizer, settings, blocks)


def export_reconstructor(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, settings: Settings
) -> None:
    """Writes the truncated backbone and, beside it, the value head."""
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("model.")}
    # Loaders that build a whole Llama expect the key; the norm is not used.
    weights["model.norm.weight"] = torch.ones(settings.d_model)
    _write(folder, weights, tokenizer, settings, settings.layer + 1)
    _save({"weight": model.value_head.weight}, folder / "value_head.safetensors")


def export_sidecar(
    folder: Path,
    role: str,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    injection_scale: float | None = None,
    rule: str | None = None,
    var_nrm: float | None = None,
    trained_on: list[str],
) -> None:
    """Writes ``nla_meta.yaml``.

    Args:
        folder: The checkpoint's folder.
        role: "av" or "ar".
        tokenizer: The tokenizer.
        settings: Sizes of the run.
        injection_scale: Norm of the injected embedding; None for norm-matched add and the AR.
        rule: Injection rule of an AV.
        var_nrm: Variance of the normalised training vectors, for the AR.
        trained_on: What the checkpoint was trained on.
    """
    prompt = av_prompt_ids(tokenizer)
    marker_id = tokenizer.token_to_id(tokenization.MARKER)
    marker = prompt.index(marker_id)
    # All positions are trained on, so none is flagged as too early.
    extraction: dict[str, object] = {"injection_scale": injection_scale, "min_position": 0}
    if role == "av":
        extraction["injection_rule"] = rule
    else:
        extraction["mse_scale"] = round(settings.d_model**0.5, 7)
        extraction["var_nrm"] = var_nrm
    meta: dict[str, object] = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "sft",
        "base_checkpoint": BASE,
        "d_model": settings.d_model,
        "extraction_layer_index": settings.layer,
        "extraction": extraction,
        "tokens": {
            "injection_char": tokenization.MARKER,
            "injection_token_id": marker_id,
            "injection_left_neighbor_id": prompt[marker - 1],
            "injection_right_neighbor_id": prompt[marker + 1],
            "critic_suffix_ids": ar_prompt_ids(tokenizer, "A")[-SUFFIX_TOKENS:],
        },
        "prompt_templates": {"av": tokenization.AV_PROMPT, "ar": tokenization.AR_PROMPT},
        "trained_on": trained_on,
    }
    if role == "ar":
        meta["ar"] = {
            "num_hidden_layers": settings.layer,
            "extraction_layer_index": settings.layer,
        }
    text = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    _text(folder / "nla_meta.yaml", text)


def _write(
    folder: Path,
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    settings: Settings,
    blocks: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save(weights, folder / "model.safetensors")
    ids = {f"{name}_token_id": i for name, i in (("pad", 0), ("bos", 1), ("eos", 2))}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": settings.d_model,
        "intermediate_size": settings.mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "head_dim": settings.d_model // settings.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        # transformers 4 reads the first of these, transformers 5 the second.
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "initializer_range": 0.02,
        "dtype": "float32",
        **ids,
    }
    _text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    _text(folder / "generation_config.json", json.dumps(ids, indent=1) + "\n")
    tokenization.save(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    stored = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in weights.items()}
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)
