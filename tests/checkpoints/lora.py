"""LoRA halves: a PEFT adapter over a source model, written by hand (peft need not be installed)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import sidecars, vocabulary, weights
from .builders import AR_SEED
from .sidecars import Overrides

# As `builders.AV_SEEDS`, for an adapter over the source of seed 0: the best logit leads by 0.003.
LORA_SEEDS = {"llama": 9, "qwen2": 52, "qwen3": 1, "gemma3_text": 6, "gemma3": 6}
_TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def _write_adapter(
    directory: Path | str,
    family: str,
    base_dir: Path | str,
    *,
    blocks: int | None,
    prefix: str | None,
    seed: int,
    rank: int,
    alpha: int,
    rslora: bool,
    targets: tuple[str, ...],
    task: str,
    dtype: torch.dtype,
    adapter: dict | None,
) -> tuple[Path, int]:
    directory, base_dir = Path(directory), Path(base_dir)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.loads((base_dir / "config.json").read_text())
    text = text.get("text_config", text)
    if prefix is None:
        prefix = (
            "base_model.model.model.language_model."
            if family == "gemma3"
            else "base_model.model.model."
        )
    tensors = {}
    for name, (*shape,) in weights.shapes(text, blocks).items():
        if name.endswith(".weight") and name.split(".")[-2] in targets:
            path = prefix + name.removeprefix("model.").removesuffix(".weight")
            a = weights.noise(f"{name}.lora_A", (rank, shape[1]), seed) / shape[1] ** 0.5
            b = weights.noise(f"{name}.lora_B", (shape[0], rank), seed) * 0.5 / rank**0.5
            tensors |= {f"{path}.lora_A.weight": a.to(dtype), f"{path}.lora_B.weight": b.to(dtype)}
    save_file(tensors, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    (directory / "adapter_model.safetensors").chmod(0o644)
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": str(base_dir),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(targets),
        "task_type": task,
        "use_dora": False,
        "use_rslora": rslora,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config | (adapter or {}), indent=2))
    vocabulary.write_tokenizer(directory, family)
    return directory, text["hidden_size"]


def build_lora_av(
    directory: Path | str,
    family: str,
    base_dir: Path | str,
    *,
    layer: int = 3,
    injection: str = "replace",
    rank: int = 4,
    alpha: int = 8,
    rslora: bool = False,
    targets: tuple[str, ...] = _TARGETS,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    sidecar_overrides: Overrides = None,
    adapter: dict | None = None,
) -> Path:
    """Write an AV as adapter_config.json, adapter_model.safetensors, tokenizer and sidecar.

    Args:
        directory: where.
        family: that of the base.
        base_dir: a model of `build_source`; adapter_config.json names it.
        layer: K.
        injection: as for `build_av`.
        rank, alpha, rslora: the factor is alpha / rank, or alpha / sqrt(rank) with rslora.
        targets: names of the linear maps that get one.
        seed: of the adapter's numbers; None: the family's of `LORA_SEEDS`.
        dtype: of the file.
        sidecar_overrides: laid over the sidecar, or a function of it.
        adapter: laid over adapter_config.json.
    """
    directory, d_model = _write_adapter(
        directory,
        family,
        base_dir,
        blocks=None,
        prefix=None,
        seed=LORA_SEEDS[family] if seed is None else seed,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        targets=targets,
        task="CAUSAL_LM",
        dtype=dtype,
        adapter=adapter,
    )
    nano = (
        {"schema": 1, "spelling": "actor", "kind": "nla_dataset"}
        if injection == "norm_matched_add"
        else {}
    )
    made = sidecars.sidecar(
        "av",
        family,
        d_model=d_model,
        layer=layer,
        base=str(base_dir),
        injection_scale=sidecars.INJECTION_SCALES[family],
        **nano,
    )
    sidecars.write_sidecar(directory, sidecars.override(made, sidecar_overrides))
    return directory


def build_lora_ar(
    directory: Path | str,
    family: str,
    base_dir: Path | str,
    *,
    layer: int = 3,
    bare_prefix: bool = False,
    all_blocks: bool = False,
    head_bias: bool = False,
    rank: int = 4,
    alpha: int = 8,
    rslora: bool = False,
    targets: tuple[str, ...] = _TARGETS,
    seed: int = AR_SEED,
    dtype: torch.dtype = torch.float32,
    sidecar_overrides: Overrides = None,
    adapter: dict | None = None,
) -> Path:
    """Write an AR as an adapter over blocks 0..K of its base, and the value head.

    Args:
        bare_prefix: tensor names as of an adapter on the decoder without lm_head
            (`base_model.model.layers...` instead of `base_model.model.model.layers...`).
        all_blocks: the adapter also has tensors for the blocks above K, which play no part.
        head_bias: the value head has a `bias`.

    The other arguments are those of `build_lora_av`; the seed is that of the value head, too.
    """
    directory, d_model = _write_adapter(
        directory,
        family,
        base_dir,
        blocks=None if all_blocks else layer + 1,
        prefix="base_model.model." if bare_prefix else None,
        seed=seed,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        targets=targets,
        task="FEATURE_EXTRACTION" if bare_prefix else "CAUSAL_LM",
        dtype=dtype,
        adapter=adapter,
    )
    weights.write_value_head(directory, d_model, seed, dtype, head_bias)
    made = sidecars.sidecar(
        "ar",
        family,
        d_model=d_model,
        layer=layer,
        base=str(base_dir),
        injection_scale=None,
        mse_scale=sidecars.default_mse_scale(d_model),
    )
    sidecars.write_sidecar(directory, sidecars.override(made, sidecar_overrides))
    return directory
