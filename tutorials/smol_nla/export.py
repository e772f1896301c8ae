"""Writes the two halves as nla_lens and PEFT read them: adapters, a head, sidecars."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from halves import AR_TEMPLATE, AV_TEMPLATE, HEAD, Prompt, Reconstructor, Verbalizer, trained_state
from safetensors.torch import save_file
from sizes import Settings
from smollm import HUB_NAME

CONFIG = (
    "base_model_name_or_path",
    "bias",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)
FIRST = 1
"""First position that is not flagged: the very first token is a sink. Those before the tenth are
not trained on, and score as later ones do."""


def write_half(
    folder: Path,
    network: Verbalizer | Reconstructor,
    prompt: Prompt,
    settings: Settings,
    figures: dict[str, float],
) -> None:
    """Writes a half: its adapter in bfloat16, its sidecar, and the head of a reconstructor.

    Args:
        folder: Where.
        network: The half.
        prompt: The verbalizer's prompt.
        settings: Sizes of the run.
        figures: `scale` and `var` of the training vectors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = network.lora.peft_config["default"].to_dict()
    # Beside the halves where it lies there, else the sidecar's.
    config["base_model_name_or_path"] = f"../{HUB_NAME.rpartition('/')[2]}"
    config["inference_mode"] = True
    # What every PEFT knows; a newer one's further settings are all at rest.
    said = {name: config[name] for name in CONFIG}
    said["target_modules"] = sorted(said["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2) + "\n")
    state = {name: tensor.bfloat16() for name, tensor in trained_state(network).items()}
    if isinstance(network, Reconstructor):
        _save({"weight": state.pop(HEAD)}, folder / HEAD)
    _save(state, folder / "adapter_model.safetensors")
    role = "av" if isinstance(network, Verbalizer) else "ar"
    meta = sidecar(role, prompt, settings, figures, network.lora.config.hidden_size)
    text = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    (folder / "nla_meta.yaml").write_text(text, encoding="utf-8")


def sidecar(
    role: str, prompt: Prompt, settings: Settings, figures: dict[str, float], d_model: int
) -> dict[str, object]:
    """The sidecar of a half."""
    meta: dict[str, object] = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "sft",
        "base_checkpoint": HUB_NAME,
        "d_model": d_model,
        "extraction_layer_index": settings.layer,
        "extraction": {
            "injection_rule": "replace",
            "injection_scale": figures["scale"],
            "mse_scale": round(d_model**0.5, 7),
            "var_nrm": figures["var"],
            "min_position": FIRST,
        },
        "tokens": {
            "injection_char": prompt.char,
            "injection_token_id": prompt.token,
            "injection_left_neighbor_id": prompt.ids[prompt.marker - 1],
            "injection_right_neighbor_id": prompt.ids[prompt.marker + 1],
        },
        "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE},
        "trained_on": ["tutorials/smol_nla/debian.py"],
    }
    if role == "ar":
        meta["ar"] = {"num_hidden_layers": settings.layer}
    return meta


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)
