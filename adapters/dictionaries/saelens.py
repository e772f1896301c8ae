"""SAELens' own format: `cfg.json` and `sae_weights.safetensors`, of version 6 and of those before.

What is not read here (layer-norm input, `hook_z` reshaping, AbsTopK, matching pursuit, transcoders)
is left to sae-lens where it is installed; see `nla_lens.adapters.sae.load_dictionary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from nla_lens.adapters.dictionaries.dictionary import Dictionary
from nla_lens.adapters.dictionaries.files import Files, UnsupportedDictionaryError, build
from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor

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


def read_saelens(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    """Reads a SAELens dictionary.

    Raises:
        UnsupportedDictionaryError: It does something that is not read here.
        NLAError: The tensors do not fit `cfg.json`.
    """
    cfg: dict[str, Any] = {_OLD_NAMES.get(k, k): v for k, v in files.config.items()}
    metadata = cfg["metadata"] if isinstance(cfg.get("metadata"), Mapping) else {}
    name = cfg.get("architecture", "standard")
    k = cfg.get("k")
    if name == "standard" and cfg.get("activation_fn") == "topk":
        name, k = "topk", (cfg.get("activation_fn_kwargs") or {}).get("k")
    _refuse_the_rest(files, cfg, name, tensors)
    architecture = _ARCHITECTURES[name]
    vectors = {n: n for n in ("b_dec", "b_enc")}
    latents_by = "b_enc"
    if architecture == "gated":
        vectors = {n: n for n in ("b_dec", "b_gate", "b_mag", "r_mag")}
        latents_by = "b_gate"
    if architecture == "jumprelu":
        vectors["threshold"] = "topk_threshold" if "topk_threshold" in tensors else "threshold"
    in_training = "topk_threshold" in tensors
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
        hook_name=metadata.get("hook_name") or cfg.get("hook_name"),
        model_name=metadata.get("model_name") or cfg.get("model_name"),
        k=k if architecture == "topk" else None,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        scale_by_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm"))
        and (architecture == "topk" or in_training),
    )
    if in_training and found.cfg.scale_by_decoder_norm:
        # Before it is saved for use, the threshold is in units of scaled latents.
        threshold_F = found.vectors["threshold"] / found.W_dec.norm(dim=-1)
        found = replace(found, vectors={**found.vectors, "threshold": threshold_F})
    return found


def _refuse_the_rest(
    files: Files, cfg: Mapping[str, Any], name: Any, tensors: Mapping[str, StoredTensor]
) -> None:
    """Raises an UnsupportedDictionaryError that names what is not read here."""
    wrong = None
    normalize = cfg.get("normalize_activations")
    if name not in _ARCHITECTURES:
        wrong = f"architecture={name!r}"
    elif cfg.get("activation_fn", "relu") not in ("relu", "topk"):
        wrong = f"activation_fn={cfg['activation_fn']!r}"
    # True is what versions before 3 say for an average norm that is not in the files.
    elif normalize not in (None, False, "none"):
        wrong = f"normalize_activations={normalize!r}"
    elif cfg.get("reshape_activations", "none") != "none" or "hook_z" in str(cfg.get("hook_name")):
        wrong = "reshape_activations='hook_z'"
    elif "scaling_factor" in tensors and not tensors["scaling_factor"].whole().eq(1).all():
        wrong = "a scaling_factor that was not folded into the weights"
    if wrong is not None:
        raise UnsupportedDictionaryError(
            f"{files.folder} has {wrong} in cfg.json, which is not read here; load it with "
            "sae_lens.SAE.load_from_disk and pass the SAE itself"
        )
