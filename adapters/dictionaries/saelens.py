"""SAELens' own format: `cfg.json` and `sae_weights.safetensors`, of version 6 and of those before.

What is not read here (normalised input, `hook_z` reshaping, single heads, AbsTopK, matching
pursuit, temporal ones, transcoders) is left to sae-lens where it is installed; see
`nla_lens.adapters.sae.load_dictionary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from nla_lens.adapters.dictionaries.dictionary import Dictionary
from nla_lens.adapters.dictionaries.files import (
    Files,
    UnsupportedDictionaryError,
    build,
    flag,
    words,
)
from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.checks import is_int
from nla_lens.errors import NLAError

_OLD_NAMES: Final = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_ARCHITECTURES: Final = {
    "standard": "relu",
    "relu": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "gated": "gated",
}
# Of which each version writes one.
_BESIDE: Final = ("threshold", "log_threshold", "topk_threshold")


def read_saelens(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    """Reads a SAELens dictionary.

    Raises:
        UnsupportedDictionaryError: It does something that is not read here.
        NLAError: The tensors do not fit `cfg.json`.
    """
    refuse_saelens(files)
    cfg, name = _settings(files), _architecture(files)
    metadata = cfg["metadata"] if isinstance(cfg.get("metadata"), Mapping) else {}
    _refuse_tensors(files, name, tensors)
    architecture = _ARCHITECTURES[name]
    vectors = {n: n for n in ("b_dec", "b_enc")}
    latents_by = "b_enc"
    if architecture == "gated":
        vectors = {n: n for n in ("b_dec", "b_gate", "b_mag", "r_mag")}
        latents_by = "b_gate"
    in_training, by_log = "topk_threshold" in tensors, "log_threshold" in tensors
    if architecture == "jumprelu":
        stored = "log_threshold" if by_log else "threshold"
        vectors["threshold"] = "topk_threshold" if in_training else stored
    scaled = flag(files, "rescale_acts_by_decoder_norm", False) and (
        architecture == "topk" or in_training
    )
    found = build(
        files,
        tensors,
        enc=("W_enc", False),
        dec=("W_dec", True),
        vectors=vectors,
        latents_by=latents_by,
        d_in=cfg.get("d_in"),
        d_sae=cfg.get("d_sae"),
        format="SAELens",
        architecture=architecture,
        hook_name=_hook_name(cfg, metadata),
        model_name=metadata.get("model_name") or cfg.get("model_name"),
        k=_k(cfg) if architecture == "topk" else None,
        beside=_BESIDE if architecture == "jumprelu" else (),
        apply_b_dec_to_input=flag(files, "apply_b_dec_to_input", True),
        scale_by_decoder_norm=scaled,
        # Before it is saved for use, the threshold is in units of scaled latents.
        threshold_by_decoder_norm=scaled and in_training,
    )
    if architecture == "jumprelu" and by_log and not in_training:
        threshold_F = found.vectors["threshold"].exp()
        found = replace(found, vectors={**found.vectors, "threshold": threshold_F})
    return found


def _settings(files: Files) -> dict[str, Any]:
    """`cfg.json` with the names of today; where a name stands in both ways, today's counts."""
    cfg = dict(files.config)
    for old, new in _OLD_NAMES.items():
        if old in cfg:
            cfg.setdefault(new, cfg.pop(old))
    return cfg


def _architecture(files: Files) -> Any:
    cfg = _settings(files)
    name = cfg.get("architecture", "standard")
    return "topk" if name == "standard" and cfg.get("activation_fn") == "topk" else name


def _k(cfg: Mapping[str, Any]) -> Any:
    kwargs = cfg.get("activation_fn_kwargs")
    return cfg.get("k", kwargs.get("k") if isinstance(kwargs, Mapping) else None)


def _hook_name(cfg: Mapping[str, Any], metadata: Mapping[str, Any]) -> Any:
    """The place; of some old files the block is left open in it."""
    name = metadata.get("hook_name") or cfg.get("hook_name")
    layer = metadata.get("hook_layer", cfg.get("hook_layer"))
    if isinstance(name, str) and "{layer}" in name:
        return name.replace("{layer}", str(layer)) if is_int(layer) else None
    return name


def refuse_saelens(files: Files) -> None:
    """Raises an UnsupportedDictionaryError that names what of `cfg.json` is not read here."""
    cfg, name = _settings(files), _architecture(files)
    metadata = cfg["metadata"] if isinstance(cfg.get("metadata"), Mapping) else {}
    if not cfg:
        raise NLAError(
            f"{files.folder} has no cfg.json, and {files.weights.name} does not say by itself what "
            "its latents are: get the whole folder"
        )
    if "sae_type" in cfg or "hook_point_in" in cfg:
        raise UnsupportedDictionaryError(
            f"{files.folder} is of OpenMOSS' newer format (llamascopium; sae_type="
            f"{words(cfg.get('sae_type'))}), which is not read here"
        )
    wrong = None
    normalize = cfg.get("normalize_activations")
    head = metadata.get("hook_head_index", cfg.get("hook_head_index"))
    out = metadata.get("hook_name_out", cfg.get("hook_name_out"))
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        wrong = f"architecture={words(name)}"
    elif cfg.get("activation_fn", "relu") not in ("relu", "topk"):
        wrong = f"activation_fn={words(cfg['activation_fn'])}"
    # True is what versions before 3 say for an average norm that is not in the files.
    elif normalize not in (None, False, "none"):
        wrong = f"normalize_activations={words(normalize)}"
    elif cfg.get("reshape_activations", "none") != "none" or "hook_z" in str(
        metadata.get("hook_name") or cfg.get("hook_name")
    ):
        wrong = "reshape_activations='hook_z'"
    elif head is not None:
        wrong = f"hook_head_index={words(head)}"
    elif out not in (None, _hook_name(cfg, metadata)):
        wrong = f"hook_name_out={words(out)}, another place than it reads"
    if wrong is not None:
        raise UnsupportedDictionaryError(
            f"{files.folder} has {wrong} in cfg.json, which is not read here; load it with "
            "sae_lens.SAE.load_from_disk and pass the SAE itself"
        )


def _refuse_tensors(files: Files, name: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises an NLAError on tensors that change what `cfg.json` says."""
    for scale in ("scaling_factor", "finetuning_scaling_factor"):
        if scale in tensors and not tensors[scale].whole().eq(1).all():
            raise UnsupportedDictionaryError(
                f"{files.folder} has a {scale} that was not folded into the weights, which is not "
                "read here; load it with sae_lens.SAE.load_from_disk and pass the SAE itself"
            )
    more = {"threshold", "log_threshold", "W_skip", "r_mag"} & set(tensors)
    if _ARCHITECTURES[name] in ("relu", "topk") and more:
        raise NLAError(
            f"{files.weights} has {sorted(more)}, which a dictionary of architecture={name!r} has "
            "not: cfg.json belongs to other weights"
        )
