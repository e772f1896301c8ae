"""The suites called scopes: Gemma Scope 2, Llama Scope, Qwen Scope.

Llama Scope (arXiv 2410.20526) was trained with TopK and is used with one JumpReLU threshold, on activations
scaled to the length sqrt(d) on average. How its authors apply the threshold is in their code (OpenMOSS/
Language-Model-SAEs at 4ec6f0a, October 2024: `post_processing.py` measures it, `SparseAutoEncoder.from_config`
undoes the scaling first and brings every direction to length 1):

    s    = sqrt(d) / dataset_average_activation_norm
    pre  = x W_enc + b_enc / s              x as it is in the model, not scaled
    f_i  = pre_i ||W_dec_i||  where that is above `jump_relu_threshold`, else 0
    x^   = sum_i f_i W_dec_i / ||W_dec_i|| + b_dec / s

Published thresholds bear this out: times s they are about 2 at every place, residuals of norm 6 and 29 and
transcoders alike. A threshold taken for scaled activations is too low by s (2 to 10); sae-lens 6.54 has s but not
the lengths, which are about 1.5.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from nla_lens.adapters.dictionaries import places
from nla_lens.adapters.dictionaries.dictionary import Dictionary
from nla_lens.adapters.dictionaries.files import (
    Files,
    UnsupportedDictionaryError,
    build,
    find_block,
    find_name,
    flag,
    words,
)
from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.checks import is_number
from nla_lens.errors import NLAError

_TWO_PLACES: Final = ("transcoder", "clt", "crosscoder")
_FOLDERS: Final = {
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
}
_LETTERS: Final = {"R": "resid_post", "A": "attn_out", "M": "mlp_out"}
_LLAMA_NAME: Final = r"-L(\d+)(R|A|M|TC)-\d+x(?=$|/)"
_QWEN_FILE: Final = r"layer(\d+)\.sae\.pt$"
_QWEN_REPO: Final = r"SAE-(Res)-.+-L0_(\d+)(?=$|/)"


def refuse_gemma_scope(files: Files) -> None:
    """Raises an UnsupportedDictionaryError on what says that it is no autoencoder."""
    cfg = files.config
    kind = cfg.get("type")
    point_in, point_out = cfg.get("hf_hook_point_in"), cfg.get("hf_hook_point_out")
    folder = _gemma_folder(files)
    if kind not in (None, "sae"):
        what = f"is of type={words(kind)}"
    elif cfg.get("affine_connection"):
        what = "has an affine connection"
    elif point_out not in (None, point_in):
        what = f"is a transcoder: it reads {words(point_in)} and writes {words(point_out)}"
    elif kind is None and point_in is None and folder in _TWO_PLACES:
        what = f"is in a folder of {folder}s"
    else:
        what = None
    if what is not None:
        raise UnsupportedDictionaryError(
            f"{files.folder} {what}; only autoencoders (type='sae') are read here: of the others "
            "directions are not in the space they read"
        )
    architecture = cfg.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise UnsupportedDictionaryError(f"{files.folder} has architecture={words(architecture)}")


def _gemma_folder(files: Files) -> str | None:
    """`resid_post` and the like: the folder that the dictionary's own is in."""
    for part in (files.folder.parent.name, *reversed(files.name.split("/"))):
        plain = part.removesuffix("_all")
        if plain in (*_FOLDERS, *_TWO_PLACES):
            return plain
    return None


def read_gemma_scope(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    """The place that the config says; without it, that of the folder.

    Raises:
        UnsupportedDictionaryError: It is a transcoder, or has another architecture.
    """
    refuse_gemma_scope(files)
    if "affine_skip_connection" in tensors:
        raise UnsupportedDictionaryError(
            f"{files.folder} is a transcoder: its directions are not in the space it reads"
        )
    point = files.config.get("hf_hook_point_in")
    block, side = find_block(files, r"layer_(\d+)(?=_|$)"), _FOLDERS.get(_gemma_folder(files) or "")
    by_folder = f"blocks.{block}.{side}" if side and block is not None else None
    return build(
        files,
        tensors,
        enc=("w_enc", False),
        dec=("w_dec", True),
        vectors={n: n for n in ("b_enc", "b_dec", "threshold")},
        format="Gemma Scope 2",
        architecture="jumprelu",
        hook_name=places.of_hf_point(point) if isinstance(point, str) else by_folder,
        model_name=files.config.get("model_name"),
    )


def refuse_llama_scope(files: Files) -> None:
    """Raises an UnsupportedDictionaryError on what is not read here, an NLAError on bad values."""
    cfg = files.config
    point_in, point_out = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    named = find_name(files, _LLAMA_NAME)
    if point_out not in (None, point_in) or (
        point_in is None and named is not None and named[2] == "TC"
    ):
        raise UnsupportedDictionaryError(
            f"{files.folder} is a transcoder: it reads {words(point_in)} and writes "
            f"{words(point_out)}, so its directions are not in the space it reads"
        )
    wrong = None
    norm = _norm_activation(cfg)
    if str(cfg.get("act_fn", "")).lower() not in ("jumprelu", "relu", "topk"):
        wrong = f"act_fn={words(cfg.get('act_fn'))}"
    elif cfg.get("use_glu_encoder"):
        wrong = "use_glu_encoder=True"
    elif cfg.get("use_decoder_bias", True) is not True:
        wrong = f"use_decoder_bias={words(cfg['use_decoder_bias'])}"
    elif norm not in ("dataset-wise", "inference"):
        wrong = f"norm_activation={words(norm)}"
    if wrong is not None:
        raise UnsupportedDictionaryError(
            f"{files.folder} has {wrong} in hyperparams.json, which is not read here"
        )
    if norm == "dataset-wise":
        _length(files)
    if _threshold(cfg) is None and str(cfg["act_fn"]).lower() == "jumprelu":
        raise NLAError(
            f"{files.folder} has jump_relu_threshold={words(cfg.get('jump_relu_threshold'))}, "
            "which a JumpReLU dictionary needs"
        )


def _norm_activation(cfg: Mapping[str, Any]) -> Any:
    usual = "dataset-wise" if cfg.get("dataset_average_activation_norm") is not None else None
    return cfg.get("norm_activation", usual)


def _threshold(cfg: Mapping[str, Any]) -> float | None:
    """A threshold above zero; the authors' code then uses it, whatever was trained with."""
    found: Any = cfg.get("jump_relu_threshold")
    return float(found) if is_number(found) and 0 < found < math.inf else None


def _length(files: Files) -> float:
    """The average length of what it reads, which training brought to sqrt(d).

    Raises:
        NLAError: No length, or another one of what it writes, which is the same place.
    """
    norms: Any = files.config.get("dataset_average_activation_norm")
    sides = ("in", "out") if isinstance(norms, Mapping) else ()
    found: list[Any] = [norms.get(side) for side in sides]
    there = [float(n) for n in found if is_number(n) and 0 < n < math.inf]
    if not there or len(there) != len([n for n in found if n is not None]):
        raise NLAError(
            f"{files.folder} has dataset_average_activation_norm={words(norms)}, expected the "
            "positive lengths 'in' and 'out'"
        )
    if not math.isclose(there[0], there[-1], rel_tol=1e-3):
        raise UnsupportedDictionaryError(
            f"{files.folder} reads vectors of length {there[0]:g} and writes {there[-1]:g}: a "
            "transcoder, or files that do not belong together"
        )
    return there[0]


def read_llama_scope(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    """As the authors' own code reads it; see the module.

    Raises:
        UnsupportedDictionaryError: A transcoder, or settings that are not read here.
        NLAError: The scale of its input or its threshold is missing.
    """
    refuse_llama_scope(files)
    cfg, named = files.config, find_name(files, _LLAMA_NAME)
    by_name = places.of_side(_LETTERS[named[2]], named[1]) if named and named[2] != "TC" else None
    threshold, act_fn = _threshold(cfg), str(cfg["act_fn"]).lower()
    by_lengths = flag(files, "sparsity_include_decoder_norm", True)
    jumps = threshold is not None and act_fn != "relu"
    found = build(
        files,
        tensors,
        enc=("encoder.weight", True),
        dec=("decoder.weight", False),
        vectors={"b_enc": "encoder.bias", "b_dec": "decoder.bias"},
        d_in=cfg.get("d_model"),
        d_sae=cfg.get("d_sae"),
        format="Llama Scope",
        architecture="jumprelu" if jumps else act_fn,
        constants={"threshold": threshold} if jumps and threshold else {},
        k=cfg.get("top_k") if act_fn == "topk" and not jumps else None,
        apply_b_dec_to_input=flag(files, "apply_decoder_bias_to_pre_encoder", False),
        scale_by_decoder_norm=by_lengths,
        threshold_by_decoder_norm=by_lengths and jumps,
        hook_name=cfg.get("hook_point_in", by_name),
        model_name="meta-llama/Llama-3.1-8B" if find_name(files, r"Llama3_1-8B-Base-L") else None,
    )
    if _norm_activation(cfg) != "dataset-wise":
        return found
    scale = math.sqrt(found.cfg.d_in) / _length(files)
    biases = {name: found.vectors[name] / scale for name in ("b_enc", "b_dec")}
    return replace(found, vectors={**found.vectors, **biases})


def refuse_qwen_scope(files: Files) -> None:
    """Raises an UnsupportedDictionaryError on what is not read here, an NLAError without k."""
    cfg = files.config
    kind = cfg.get("model_type", "topk_sae")
    if kind != "topk_sae":
        raise UnsupportedDictionaryError(f"{files.folder} has model_type={words(kind)}")
    if _qwen_k(files) is None:
        raise NLAError(
            f"{files.weights.name} is one of Qwen Scope's, which keep the k largest latents, and "
            "nothing says k: get the config.json of its repository beside it"
        )


def _qwen_k(files: Files) -> Any:
    named = find_name(files, _QWEN_REPO)
    return files.config.get("k", int(named[2]) if named else None)


def read_qwen_scope(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    """One layer's file; the config beside it is about all of them.

    b_dec is not taken off the input, as the repositories' own example has it.

    Raises:
        UnsupportedDictionaryError: Another architecture.
        NLAError: Nothing says k.
    """
    refuse_qwen_scope(files)
    cfg, named = files.config, find_name(files, _QWEN_REPO)
    side = cfg.get("hook_point", "resid_post" if named else None)
    block = find_block(files, _QWEN_FILE)
    return build(
        files,
        tensors,
        enc=("W_enc", True),
        dec=("W_dec", False),
        vectors={"b_enc": "b_enc", "b_dec": "b_dec"},
        d_in=cfg.get("d_model"),
        d_sae=cfg.get("d_sae"),
        format="Qwen Scope",
        architecture="topk",
        k=_qwen_k(files),
        hook_name=places.of_side(side, block) if isinstance(side, str) else None,
        model_name=cfg.get("base_model"),
    )
