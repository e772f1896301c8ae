"""Reads the dictionaries people publish, each as its own code reads it.

| format | files | latents | where it reads |
|---|---|---|---|
| qresearch | `*.pt`: `encoder.*`, `decoder.*` | ReLU | input of block l of `SAE-l<l>`, as the notebook of its authors feeds it; sae-lens says output |
| Goodfire | `*.pth`: `encoder_linear.*`, `decoder_linear.*` | ReLU | output of block l |
| SAELens | `cfg.json`, `sae_weights.safetensors` | as configured | `hook_name` |
| Gemma Scope 2 | `config.json`, `params.safetensors` | JumpReLU | `hf_hook_point_in`, or the folder |
| sparsify | `cfg.json`, `sae.safetensors` | TopK | the folder: `layers.N` is a block's output |
| dictionary_learning | `config.json`, `ae.pt` | `dict_class` | `submodule_name`, `layer` |

Two places where sae-lens 6.54 reads otherwise, and why it is not followed: sparsify subtracts b_dec
from its input whatever `normalize_decoder` says, and stores `W_dec` as `[d_sae, d]`
(EleutherAI/sparsify, `SparseCoder.encode`, `.decode`).
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nla_lens.adapters.dictionaries.dictionary import Dictionary
from nla_lens.adapters.dictionaries.files import (
    Files,
    UnsupportedDictionaryError,
    build,
    find_block,
)
from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.errors import NLAError


def read_dictionary(files: Files, hook_name: str | None = None) -> Dictionary:
    """Reads one dictionary.

    Args:
        files: Its files.
        hook_name: Where it reads; None takes what the files say.

    Raises:
        NLAError: No known format, or a file that does not fit it.
    """
    tensors = files.tensors
    for reader in _readers(files, tensors):
        found = reader(files, tensors)
        return found if hook_name is None else _at(found, hook_name)
    raise NLAError(
        f"{files.weights} has tensors {sorted(tensors)[:8]}, no format that is known: qresearch, "
        "Goodfire, SAELens, Gemma Scope 2, sparsify, dictionary_learning"
    )


_Reader = Callable[[Files, Mapping[str, StoredTensor]], Dictionary]


def _readers(files: Files, tensors: Mapping[str, StoredTensor]) -> list[_Reader]:
    if files.weights.name == "sae_weights.safetensors":
        from nla_lens.adapters.dictionaries.saelens import read_saelens

        return [read_saelens]
    if files.weights.name == "sae.safetensors":
        return [_sparsify]
    if "w_enc" in tensors:
        return [_gemma_scope]
    if "trainer" in files.config:
        return [_dictionary_learning]
    if "encoder_linear.weight" in tensors:
        return [_goodfire]
    if {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"} == set(tensors):
        return [_qresearch]
    return []


def _at(dictionary: Dictionary, hook_name: str) -> Dictionary:
    return replace(dictionary, cfg=replace(dictionary.cfg, hook_name=hook_name))


def _linear(
    files: Files, tensors: Mapping[str, StoredTensor], names: tuple[str, str], **cfg: Any
) -> Dictionary:
    """A ReLU dictionary out of two `nn.Linear`."""
    encoder, decoder = names
    return build(
        files,
        tensors,
        enc=(f"{encoder}.weight", True),
        dec=(f"{decoder}.weight", False),
        vectors={"b_enc": f"{encoder}.bias", "b_dec": f"{decoder}.bias"},
        architecture="relu",
        **cfg,
    )


def _qresearch(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    block = find_block(files, r"SAE-l(\d+)")
    hook_name = None if block is None else f"blocks.{block}.hook_resid_pre"
    return _linear(files, tensors, ("encoder", "decoder"), format="qresearch", hook_name=hook_name)


def _goodfire(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    block = find_block(files, r"SAE-l(\d+)")
    hook_name = None if block is None else f"blocks.{block}.hook_resid_post"
    names = ("encoder_linear", "decoder_linear")
    return _linear(files, tensors, names, format="Goodfire", hook_name=hook_name)


def _gemma_scope(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    if "affine_skip_connection" in tensors or files.config.get("hf_hook_point_out"):
        raise UnsupportedDictionaryError(
            f"{files.folder} is a transcoder: its directions are not in the space it reads"
        )
    architecture = files.config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise UnsupportedDictionaryError(f"{files.folder} has architecture={architecture!r}")
    point = str(files.config.get("hf_hook_point_in", ""))
    read = re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.output", point)
    named = find_block(files, r"layer_(\d+)")
    if read:
        hook_name: str | None = f"blocks.{read[1]}.hook_resid_post"
    elif point or named is None:
        hook_name = point or None
    else:
        sides = {"attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
        where = f"{files.folder} {files.name}"
        side = next((s for key, s in sides.items() if key in where), "hook_resid_post")
        hook_name = f"blocks.{named}.{side}"
    return build(
        files,
        tensors,
        enc=("w_enc", False),
        dec=("w_dec", True),
        vectors={n: n for n in ("b_enc", "b_dec", "threshold")},
        format="Gemma Scope 2",
        architecture="jumprelu",
        hook_name=hook_name,
        model_name=files.config.get("model_name"),
    )


def _sparsify(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    cfg = files.config
    for key, usual in (("activation", "topk"), ("signed", False), ("transcode", False)):
        if cfg.get(key, usual) != usual:
            raise UnsupportedDictionaryError(f"{files.folder} has {key}={cfg[key]!r} in cfg.json")
    if cfg.get("skip_connection") or "W_skip" in tensors:
        raise UnsupportedDictionaryError(f"{files.folder} is a transcoder with a skip connection")
    folder = find_block(files, r"(?:layers|h|blocks)[._](\d+)(?:$|[./])")
    part = re.search(r"\.(mlp|attn|self_attn)", files.folder.name)
    sides = {None: "hook_resid_post", "mlp": "hook_mlp_out"}
    side = sides.get(part[1] if part else None, "hook_attn_out")
    embedding = "hook_embed" if files.folder.name.endswith("embed_tokens") else None
    decoder = ("W_dec", True) if "W_dec" in tensors else ("decoder.weight", False)
    d_in = cfg.get("d_in")
    expansion = cfg.get("expansion_factor")
    n_latents = cfg.get("num_latents") or (d_in * expansion if d_in and expansion else None)
    return build(
        files,
        tensors,
        enc=("encoder.weight", True),
        dec=decoder,
        vectors={"b_enc": "encoder.bias", "b_dec": "b_dec"},
        d_in=d_in,
        d_sae=n_latents,
        format="sparsify",
        architecture="topk",
        k=cfg.get("k"),
        apply_b_dec_to_input=True,
        hook_name=embedding if folder is None else f"blocks.{folder}.{side}",
    )


_CLASSES: dict[str, dict[str, Any]] = {
    "AutoEncoder": {"architecture": "relu", "apply_b_dec_to_input": True},
    "AutoEncoderNew": {"architecture": "relu"},
    "AutoEncoderTopK": {"architecture": "topk", "apply_b_dec_to_input": True},
    "BatchTopKSAE": {"architecture": "jumprelu", "apply_b_dec_to_input": True},
    "MatryoshkaBatchTopKSAE": {"architecture": "jumprelu", "apply_b_dec_to_input": True},
    "JumpReluAutoEncoder": {"architecture": "jumprelu", "scale_by_decoder_norm": True},
    "GatedAutoEncoder": {
        "architecture": "gated",
        "apply_b_dec_to_input": True,
        "scale_by_decoder_norm": True,
    },
}


def _dictionary_learning(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    trainer = files.config["trainer"]
    kind = trainer.get("dict_class") if isinstance(trainer, Mapping) else None
    if kind not in _CLASSES:
        raise UnsupportedDictionaryError(
            f"{files.folder} has dict_class={kind!r}; known are {sorted(_CLASSES)}"
        )
    bare = "W_enc" in tensors
    b_dec = next((n for n in ("b_dec", "bias", "decoder_bias", "decoder.bias") if n in tensors), "")
    vectors = {"b_dec": b_dec or "b_dec", "b_enc": "b_enc" if bare else "encoder.bias"}
    by = "b_enc"
    if kind == "GatedAutoEncoder":
        vectors = {"b_dec": b_dec or "b_dec", "b_gate": "gate_bias", "b_mag": "mag_bias"}
        vectors["r_mag"], by = "r_mag", "b_gate"
    if _CLASSES[kind]["architecture"] == "jumprelu":
        vectors["threshold"] = "threshold"
    where, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    side = next((s for s in ("resid_pre", "attn", "mlp") if s in where), "resid_post")
    side = side if side.startswith("resid") else f"{side}_out"
    k = trainer.get("k") if kind == "AutoEncoderTopK" else None
    return build(
        files,
        tensors,
        enc=("W_enc", False) if bare else ("encoder.weight", True),
        dec=("W_dec", True) if bare else ("decoder.weight", False),
        vectors=vectors,
        latents_by=by,
        d_in=trainer.get("activation_dim"),
        d_sae=trainer.get("dict_size"),
        format="dictionary_learning",
        hook_name=None if layer is None else f"blocks.{layer}.hook_{side}",
        model_name=trainer.get("lm_name"),
        k=k,
        **_CLASSES[kind],
    )
