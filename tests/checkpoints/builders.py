"""Writing whole checkpoints: a source model, an AV, an AR.

    >>> av, ar = build_pair(tmp_path, "qwen2")      # tmp_path/qwen2-av, tmp_path/qwen2-ar

The files are those of a released checkpoint in everything but size. Nothing here imports
transformers, so what is written does not depend on its version.
"""

import json
from pathlib import Path

import torch

from . import configs, sidecars, vocabulary, weights
from .sidecars import Overrides

SOURCE_SEED, AR_SEED = 0, 101
# With these, and the default sizes, 48 greedy tokens for `vectors()` differ from vector to vector
# under both rules, and the best logit leads by 0.005 or more everywhere: a hundred times what
# rounding in float32 does, so batch and single rows cannot part.
AV_SEEDS = {"llama": 2, "qwen2": 35, "qwen3": 42, "gemma3_text": 40, "gemma3": 40}


def _json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _write(
    directory: Path | str,
    family: str,
    tensors: dict[str, torch.Tensor],
    text: dict,
    *,
    seed: int,
    dtype: torch.dtype,
    layout: str,
    style: str,
    key_names: str,
    generation: dict | None,
    tokenizer: dict | None,
) -> Path:
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if family == "gemma3":
        tensors = weights.hub_names(tensors, configs.VISION, text["hidden_size"], seed)
        if key_names == "module":
            tensors = weights.module_names(tensors)
    weights.save(tensors, directory, dtype, layout)
    _json(directory / "config.json", configs.full_config(family, text, dtype, style=style))
    generation_config = configs.generation_config(family) | (generation or {})
    _json(directory / "generation_config.json", generation_config)
    vocabulary.write_tokenizer(directory, family, **(tokenizer or {}))
    return directory


def build_source(
    directory: Path | str,
    family: str,
    *,
    d_model: int = 64,
    n_blocks: int = 6,
    seed: int = SOURCE_SEED,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    layout: str = "single",
    style: str = "hub",
    key_names: str = "hub",
    generation: dict | None = None,
    tokenizer: dict | None = None,
    closing: bool = False,
    quiet_eos: bool = True,
) -> Path:
    """Write a model of a family, without sidecar.

    Args:
        directory: where; made if need be.
        family: "llama", "qwen2", "qwen3", "gemma3_text" or "gemma3" (the multimodal wrapper,
            with exactly the text weights of "gemma3_text" of the same seed).
        d_model: width; a multiple of 16.
        n_blocks: decoder blocks.
        seed: another seed, other weights.
        dtype: of the file.
        tied: lm_head is the embedding table; None: only Gemma.
        layout: "single", "sharded", "indexed" or "stale_index", see `weights.save`.
        style: "hub", or "v5" for a config as transformers 5 saves it.
        key_names: of the wrapper's tensors: "hub" (as released) or "module".
        generation: laid over generation_config.json.
        tokenizer: laid over tokenizer_config.json; also `template_file=True`.
        closing: some generations reach `</explanation>`, overhanging by a line feed;
            untied families only.
        quiet_eos: False: some generations end early.
    """
    text = configs.text_config(family, d_model=d_model, n_blocks=n_blocks, tied=tied, style=style)
    quiet = set(vocabulary.quiet_ids(family, text["vocab_size"]))
    loud = [] if quiet_eos else configs.eos_ids(family)
    tensors = weights.make(text, seed, sorted(quiet - set(loud)))
    if loud:
        weights.raise_outputs(tensors, loud, 1.6)
    if closing:
        tag = vocabulary.tokenizer(family).encode("</explanation>\n", add_special_tokens=False).ids
        weights.teach_sequence(tensors, tag)
    return _write(
        directory,
        family,
        tensors,
        text,
        seed=seed,
        dtype=dtype,
        layout=layout,
        style=style,
        key_names=key_names,
        generation=generation,
        tokenizer=tokenizer,
    )


def build_av(
    directory: Path | str,
    family: str,
    *,
    layer: int = 3,
    injection: str = "replace",
    injection_scale: float | str | None = None,
    schema: int | None = None,
    spelling: str | None = None,
    sidecar_kind: str | None = None,
    sidecar_overrides: Overrides = None,
    base: str | Path | None = None,
    seed: int | None = None,
    **source: object,
) -> Path:
    """Write an AV: a full model and a sidecar.

    Args:
        directory: where.
        family: as for `build_source`.
        layer: K.
        injection: "replace" writes the sidecar of the kitft releases; "norm_matched_add" that
            of nanoNLA (kind nla_dataset, schema 1, actor and critic, no scales), in which
            nothing names the rule.
        injection_scale: the target norm; None: the family's of `sidecars.INJECTION_SCALES`.
        schema, spelling, sidecar_kind: see `sidecars.sidecar`; None: as that rule's releases.
        sidecar_overrides: laid over the sidecar (`ABSENT` removes a key), or a function of it.
        base: named as the source model.
        seed: another seed, other weights; None: the family's of `AV_SEEDS`.
        source: further arguments of `build_source`.
    """
    directory = build_source(
        directory, family, seed=AV_SEEDS[family] if seed is None else seed, **source
    )
    nano = injection == "norm_matched_add"
    made = sidecars.sidecar(
        "av",
        family,
        d_model=source.get("d_model", 64),
        layer=layer,
        base=str(base or f"test/{family}-source"),
        injection_scale=sidecars.INJECTION_SCALES[family]
        if injection_scale is None
        else injection_scale,
        schema=schema or (1 if nano else 2),
        spelling=spelling or ("actor" if nano else "av"),
        kind=sidecar_kind or ("nla_dataset" if nano else "nla_model"),
    )
    sidecars.write_sidecar(directory, sidecars.override(made, sidecar_overrides))
    return directory


def build_ar(
    directory: Path | str,
    family: str,
    *,
    layer: int = 3,
    megatron_dummies: bool = False,
    real_final_norm: bool = False,
    head_bias: bool = False,
    mse_scale: float | str | None = "default",
    d_model: int = 64,
    seed: int = AR_SEED,
    dtype: torch.dtype = torch.float32,
    head_dtype: torch.dtype | None = None,
    tied: bool | None = None,
    layout: str = "single",
    style: str = "hub",
    key_names: str = "hub",
    schema: int = 2,
    spelling: str = "av",
    sidecar_kind: str = "nla_model",
    sidecar_overrides: Overrides = None,
    base: str | Path | None = None,
    tokenizer: dict | None = None,
) -> Path:
    """Write an AR: K+1 blocks, value_head.safetensors, tokenizer, sidecar. No norm, no lm_head.

    Blocks 0..K and the embedding are those of `build_source` of the same seed and family.

    Args:
        directory: where.
        family: as for `build_source`.
        layer: K; config.json gets K+1 blocks and as many `layer_types`.
        megatron_dummies: a norm of ones and an lm_head of shape [d, d] in the file.
        real_final_norm: a final norm that is not ones in the file; it must be ignored.
        head_bias: the value head has a `bias`.
        mse_scale: "default" is sqrt(d), written out; None is null; `ABSENT` leaves it out.
        head_dtype: of the value head; None: as `dtype`.
        d_model, seed, dtype, tied, layout, style, key_names, tokenizer: as for `build_source`.
        schema, spelling, sidecar_kind, sidecar_overrides, base: as for `build_av`.
    """
    text = configs.text_config(family, d_model=d_model, n_blocks=layer + 1, tied=tied, style=style)
    tensors = weights.make(text, seed, vocabulary.quiet_ids(family, text["vocab_size"]))
    tensors.pop("lm_head.weight", None)
    if not real_final_norm:
        del tensors["model.norm.weight"]
    if megatron_dummies:
        tensors["model.norm.weight"] = torch.ones(d_model)
        tensors["lm_head.weight"] = weights.noise("dummy", (d_model, d_model), seed)
    directory = _write(
        directory,
        family,
        tensors,
        text,
        seed=seed,
        dtype=dtype,
        layout=layout,
        style=style,
        key_names=key_names,
        generation=None,
        tokenizer=tokenizer,
    )
    weights.write_value_head(directory, d_model, seed, head_dtype or dtype, head_bias)
    made = sidecars.sidecar(
        "ar",
        family,
        d_model=d_model,
        layer=layer,
        base=str(base or f"test/{family}-source"),
        injection_scale=None,
        mse_scale=sidecars.default_mse_scale(d_model) if mse_scale == "default" else mse_scale,
        schema=schema,
        spelling=spelling,
        kind=sidecar_kind,
    )
    sidecars.write_sidecar(directory, sidecars.override(made, sidecar_overrides))
    return directory


def build_pair(
    directory: Path | str,
    family: str,
    *,
    stem: str | None = None,
    layer: int = 3,
    injection: str = "replace",
    av: dict | None = None,
    ar: dict | None = None,
    **both: object,
) -> tuple[Path, Path]:
    """Write `<stem>-av` and `<stem>-ar` side by side (stem: the family's name if not given).

    Args:
        directory: the folder they go into.
        family: as for `build_source`.
        stem: the first part of both names.
        layer: K of both.
        injection: as for `build_av`.
        av: arguments of `build_av` alone.
        ar: arguments of `build_ar` alone.
        both: arguments of both.
    """
    stem = stem or family
    ar = dict(ar or {})
    if injection == "norm_matched_add":
        ar = {"sidecar_kind": "nla_dataset", "schema": 1, "spelling": "actor"} | ar
    av_dir = build_av(
        Path(directory) / f"{stem}-av",
        family,
        layer=layer,
        injection=injection,
        **both,
        **(av or {}),
    )
    return av_dir, build_ar(Path(directory) / f"{stem}-ar", family, layer=layer, **both, **ar)
