"""qresearch, Goodfire and sparsify: two matrices, two biases, and what their names say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nla_lens.adapters.dictionaries import places
from nla_lens.adapters.dictionaries.dictionary import Dictionary
from nla_lens.adapters.dictionaries.files import (
    Files,
    UnsupportedDictionaryError,
    build,
    find_block,
    words,
)
from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.checks import is_int

_BLOCK: Final = r"-SAE-l(\d+)(?=$|[./])"


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


def is_qresearch(files: Files) -> bool:
    """Whether names say so, and no config beside it says anything."""
    return not files.config and find_block(files, _BLOCK) is not None


def read_qresearch(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    """The input of block l, as the authors' notebook feeds it."""
    place = places.of_side("resid_pre", find_block(files, _BLOCK))
    return _linear(files, tensors, ("encoder", "decoder"), format="qresearch", hook_name=place)


def read_goodfire(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    """The output of block l."""
    place = places.of_side("resid_post", find_block(files, _BLOCK))
    names = ("encoder_linear", "decoder_linear")
    return _linear(files, tensors, names, format="Goodfire", hook_name=place)


def refuse_sparsify(files: Files) -> None:
    """Raises an UnsupportedDictionaryError on what is not read here."""
    cfg = files.config
    for key, usual in (("activation", "topk"), ("signed", False), ("transcode", False)):
        if cfg.get(key, usual) != usual:
            raise UnsupportedDictionaryError(
                f"{files.folder} has {key}={words(cfg[key])} in cfg.json, which is not read here"
            )
    if cfg.get("skip_connection"):
        raise UnsupportedDictionaryError(f"{files.folder} is a transcoder with a skip connection")


def read_sparsify(files: Files, tensors: Mapping[str, StoredTensor]) -> Dictionary:
    """The output of the module that the folder is called after.

    Raises:
        UnsupportedDictionaryError: It does something that is not read here.
    """
    refuse_sparsify(files)
    if "W_skip" in tensors:
        raise UnsupportedDictionaryError(f"{files.folder} is a transcoder with a skip connection")
    cfg = files.config
    d_in: Any = cfg.get("d_in")
    expansion: Any = cfg.get("expansion_factor")
    n_latents: Any = cfg.get("num_latents")
    if not n_latents and is_int(d_in) and is_int(expansion):
        n_latents = int(d_in) * int(expansion)
    given = files.name.rstrip("/").split("/")[-1]
    return build(
        files,
        tensors,
        enc=("encoder.weight", True),
        dec=("W_dec", True) if "W_dec" in tensors else ("decoder.weight", False),
        vectors={"b_enc": "encoder.bias", "b_dec": "b_dec"},
        d_in=d_in,
        d_sae=n_latents or None,
        format="sparsify",
        architecture="topk",
        k=cfg.get("k"),
        apply_b_dec_to_input=True,
        hook_name=places.of_module(files.folder.name) or places.of_module(given),
    )
