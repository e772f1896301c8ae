"""dictionary_learning: `ae.pt`, and a `config.json` that says which class wrote it.

Where that is missing the tensors' names tell the classes apart, but for two: AutoEncoderTopK and
BatchTopKSAE write the same names and mean other latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from nla_lens.adapters.dictionaries import places
from nla_lens.adapters.dictionaries.dictionary import Dictionary
from nla_lens.adapters.dictionaries.files import (
    Files,
    UnsupportedDictionaryError,
    build,
    words,
)
from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.checks import is_int
from nla_lens.errors import NLAError

CLASSES: Final[dict[str, dict[str, Any]]] = {
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
_FILE: Final = "ae.pt"
_LINEAR: Final = {"encoder.weight", "decoder.weight"}
_GATED: Final = {"gate_bias", "mag_bias", "r_mag"}
_BARE: Final = {"W_enc", "W_dec", "b_enc", "b_dec"}


def is_one(files: Files, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the names of file and tensors say that dictionary_learning wrote it."""
    names = set(tensors)
    return (
        files.weights.name == _FILE
        or names == _LINEAR | {"encoder.bias", "bias"}
        or names >= _LINEAR | _GATED
        or names >= _BARE | {"group_sizes"}
    )


def _class_of(files: Files, tensors: Mapping[str, StoredTensor]) -> str:
    """The class whose names these are.

    Raises:
        UnsupportedDictionaryError: Two have them, or none.
    """
    names = set(tensors)
    if names >= _LINEAR | _GATED:
        return "GatedAutoEncoder"
    if names >= _BARE | {"threshold"}:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in names else "JumpReluAutoEncoder"
    if names == _LINEAR | {"encoder.bias", "bias"}:
        return "AutoEncoder"
    if names == _LINEAR | {"encoder.bias", "decoder.bias"}:
        return "AutoEncoderNew"
    if names >= _LINEAR | {"encoder.bias", "b_dec"}:
        raise UnsupportedDictionaryError(
            f"{files.weights} has no config.json, and its tensors {sorted(names)} are those of "
            "both AutoEncoderTopK and BatchTopKSAE, whose latents differ: get its config.json, or "
            "say which with format='AutoEncoderTopK' or format='BatchTopKSAE'"
        )
    nearest = min(_EXPECTED, key=lambda kind: len(_EXPECTED[kind] ^ names))
    lacking, more = sorted(_EXPECTED[nearest] - names), sorted(names - _EXPECTED[nearest])
    raise UnsupportedDictionaryError(
        f"{files.weights} has no config.json, and its tensors {words(*sorted(names)[:8])} are "
        f"those of none of dictionary_learning's classes; nearest is {nearest}: missing {lacking}, "
        f"not known {words(*more[:8]) or 'none'}"
    )


_EXPECTED: Final[dict[str, set[str]]] = {
    "AutoEncoder": _LINEAR | {"encoder.bias", "bias"},
    "AutoEncoderNew": _LINEAR | {"encoder.bias", "decoder.bias"},
    "AutoEncoderTopK": _LINEAR | {"encoder.bias", "b_dec"},
    "BatchTopKSAE": _LINEAR | {"encoder.bias", "b_dec", "threshold"},
    "JumpReluAutoEncoder": _BARE | {"threshold"},
    "MatryoshkaBatchTopKSAE": _BARE | {"threshold", "group_sizes"},
    "GatedAutoEncoder": _LINEAR | _GATED | {"decoder_bias"},
}


def _check_class(files: Files, tensors: Mapping[str, StoredTensor], kind: str) -> None:
    """Refuses a class whose tensors these are not: the latents of each mean something else.

    Raises:
        NLAError: Names the first that is missing, or one that tells of another class.
    """
    due, names = _EXPECTED[kind], set(tensors)
    lacking = sorted(due - names)
    other = sorted((names - due) & {"group_sizes"})
    if lacking or other:
        what = f"no {lacking[0]}" if lacking else other[0]
        raise NLAError(
            f"{files.weights} is said to be a {kind}, but has {what}; found "
            f"{words(*sorted(names)[:8])}: its config belongs to other weights"
        )


def _trainer(files: Files) -> Mapping[str, Any]:
    trainer = files.config.get("trainer")
    return trainer if isinstance(trainer, Mapping) else {}


def refuse_dictionary_learning(files: Files, kind: str | None = None) -> None:
    """Raises an UnsupportedDictionaryError on what is not read here."""
    if "trainer" not in files.config:
        return
    kind = kind or _trainer(files).get("dict_class")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UnsupportedDictionaryError(
            f"{files.folder} has dict_class={words(kind)}; known are {sorted(CLASSES)}"
        )
    if _io(files) == "in_and_out":
        raise UnsupportedDictionaryError(
            f"{files.folder} is a transcoder (io='in_and_out'): its directions are not in the "
            "space it reads"
        )


def _io(files: Files) -> Any:
    buffer = files.config.get("buffer")
    return buffer.get("io", "out") if isinstance(buffer, Mapping) else "out"


def read_dictionary_learning(
    files: Files, tensors: Mapping[str, StoredTensor], kind: str | None = None
) -> Dictionary:
    """Reads one of its classes.

    Args:
        files: Its files.
        tensors: Its tensors by name.
        kind: Which class, where a caller says so.

    Raises:
        UnsupportedDictionaryError: It does something that is not read here.
    """
    refuse_dictionary_learning(files, kind)
    trainer = _trainer(files)
    said = kind or trainer.get("dict_class")
    kind = said or _class_of(files, tensors)
    if said:
        _check_class(files, tensors, said)
    bare = "W_enc" in tensors
    b_dec = next((n for n in ("b_dec", "bias", "decoder_bias", "decoder.bias") if n in tensors), "")
    vectors = {"b_dec": b_dec or "b_dec", "b_enc": "b_enc" if bare else "encoder.bias"}
    by = "b_enc"
    if kind == "GatedAutoEncoder":
        vectors = {"b_dec": b_dec or "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias"}
        vectors["r_mag"], by = "r_mag", "b_gate"
    if CLASSES[kind]["architecture"] == "jumprelu":
        vectors["threshold"] = "threshold"
    if kind.endswith("BatchTopKSAE"):
        _check_threshold(files, tensors)
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
        hook_name=_place(files, trainer),
        model_name=trainer.get("lm_name"),
        k=_k(files, trainer, tensors) if kind == "AutoEncoderTopK" else None,
        # Measured in training; encode keeps the k largest all the same.
        beside=("threshold",) if kind == "AutoEncoderTopK" else (),
        **CLASSES[kind],
    )


def _check_threshold(files: Files, tensors: Mapping[str, StoredTensor]) -> None:
    threshold = tensors.get("threshold")
    # As it is made; training measures it, and encode would take every latent above it.
    if threshold is not None and threshold.shape in ((), (1,)) and float(threshold.whole()) < 0:
        raise NLAError(
            f"threshold in {files.weights} is {float(threshold.whole()):g}: it was never measured, "
            "so the latents of single vectors are not known; get a file from later in training"
        )


def _k(files: Files, trainer: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Any:
    """What the config says, or else the weights.

    Raises:
        NLAError: They differ.
    """
    said, stored = trainer.get("k"), tensors.get("k")
    if stored is None or stored.shape not in ((), (1,)):
        return said
    found = stored.mapped.reshape(()).item()
    whole = int(found) if math.isfinite(found) and found == int(found) else found
    if said is not None and said != whole:
        raise NLAError(
            f"{files.weights} holds k={whole!r}, its config k={words(said)}: they do not belong "
            "together"
        )
    return whole


def _place(files: Files, trainer: Mapping[str, Any]) -> str | None:
    """`resid_post_layer_8` with its layer, or a module's path; None for anything else."""
    where, layer, io = trainer.get("submodule_name"), trainer.get("layer"), _io(files)
    if not isinstance(where, str):
        return None
    named = re.fullmatch(r"([a-z_]+?)(?:_layer_?(\d+))?", where)
    if named is not None:
        block = int(named[2]) if named[2] else layer
        sure = io == "out" and is_int(block) and layer in (None, block)
        return places.of_side(named[1], block) if sure else None
    place = places.of_module(where)
    if io == "in":
        inside = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", place or "")
        return places.of_side("resid_pre", inside[1]) if inside else None
    return place if io == "out" else None
