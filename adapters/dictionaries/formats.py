"""Reads the dictionaries people publish, each as its own code reads it.

| format | files | latents | where it reads |
|---|---|---|---|
| qresearch | `*-SAE-l<l>.pt`: `encoder.*`, `decoder.*` | ReLU | input of block l, as the notebook of its authors feeds it; sae-lens says output |
| Goodfire | `*.pth`: `encoder_linear.*`, `decoder_linear.*` | ReLU | output of block l |
| SAELens | `cfg.json`, `sae_weights.safetensors` | as configured | `hook_name` |
| Gemma Scope 2 | `config.json`, `params.safetensors` | JumpReLU | `hf_hook_point_in`, or the folder |
| Llama Scope | `hyperparams.json`, `checkpoints/final.safetensors` | JumpReLU, one threshold | `hook_point_in` |
| Qwen Scope | `config.json`, `layer<l>.sae.pt` | TopK | `hook_point` of block l |
| sparsify | `cfg.json`, `sae.safetensors` | TopK | the folder: `layers.N` is a block's output |
| dictionary_learning | `config.json`, `ae.pt` | `dict_class` | `submodule_name`, `layer` |

A format is known by names or by a config: four tensors called `encoder.*` and `decoder.*` are in three of these,
with other latents each. Where neither says it, the caller must (`format=`).

Places where sae-lens 6.54 reads otherwise, and why it is not followed: sparsify subtracts b_dec
from its input whatever `normalize_decoder` says, and stores `W_dec` as `[d_sae, d]`
(EleutherAI/sparsify, `SparseCoder.encode`, `.decode`); for Llama Scope see `scope_files`.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from nla_lens.adapters.dictionaries import dictionary_learning_files, linear_files, scope_files
from nla_lens.adapters.dictionaries.dictionary import Dictionary
from nla_lens.adapters.dictionaries.files import Files, words
from nla_lens.adapters.dictionaries.saelens import read_saelens, refuse_saelens
from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.errors import NLAError

Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: Whose it is.
        read: Reads a dictionary in it.
        refuse: Raises what names and config alone refuse, before any tensor is fetched.
    """

    name: str
    read: Callable[[Files, Tensors], Dictionary]
    refuse: Callable[[Files], None] = lambda files: None


QRESEARCH: Final = Format("qresearch", linear_files.read_qresearch)
GOODFIRE: Final = Format("Goodfire", linear_files.read_goodfire)
SAELENS: Final = Format("SAELens", read_saelens, refuse_saelens)
GEMMA_SCOPE: Final = Format(
    "Gemma Scope 2", scope_files.read_gemma_scope, scope_files.refuse_gemma_scope
)
LLAMA_SCOPE: Final = Format(
    "Llama Scope", scope_files.read_llama_scope, scope_files.refuse_llama_scope
)
QWEN_SCOPE: Final = Format("Qwen Scope", scope_files.read_qwen_scope, scope_files.refuse_qwen_scope)
SPARSIFY: Final = Format("sparsify", linear_files.read_sparsify, linear_files.refuse_sparsify)
DICTIONARY_LEARNING: Final = Format(
    "dictionary_learning",
    dictionary_learning_files.read_dictionary_learning,
    dictionary_learning_files.refuse_dictionary_learning,
)
_ALL: Final = (
    QRESEARCH,
    GOODFIRE,
    SAELENS,
    GEMMA_SCOPE,
    LLAMA_SCOPE,
    QWEN_SCOPE,
    SPARSIFY,
    DICTIONARY_LEARNING,
)
NAMES: Final = (*(f.name for f in _ALL), *dictionary_learning_files.CLASSES)
"""What `format=` takes: files of dictionary_learning may not tell its classes apart."""
_BARE: Final = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}


def named_format(name: object) -> Format:
    """The format a caller names, in any spelling of case and blanks.

    Raises:
        NLAError: No such format.
    """
    plain = re.sub(r"[\W_]+", "", name).lower() if isinstance(name, str) else ""
    for found in _ALL:
        if re.sub(r"[\W_]+", "", found.name).lower() == plain:
            return found
    for kind in dictionary_learning_files.CLASSES:
        if kind.lower() == plain:
            return _as_class(kind)
    raise NLAError(f"format={words(name)} is none of {', '.join(NAMES)}")


def _as_class(kind: str) -> Format:
    """dictionary_learning's files, read as one of its classes."""
    return Format(
        kind,
        lambda files, tensors: dictionary_learning_files.read_dictionary_learning(
            files, tensors, kind
        ),
    )


def format_of(files: Files) -> Format | None:
    """The format that names and config prove; None where they prove none.

    Raises:
        NLAError: They prove that it is no dictionary.
    """
    config, name = files.config, files.weights.name
    if name == "sae_weights.safetensors":
        return SAELENS
    if name == "sae.safetensors":
        return SPARSIFY
    if name == "params.safetensors" or "hf_hook_point_in" in config:
        return GEMMA_SCOPE
    if "jump_relu_threshold" in config or "dataset_average_activation_norm" in config:
        return LLAMA_SCOPE
    if config.get("model_type") == "topk_sae" or re.fullmatch(r"layer\d+\.sae\.pt", name):
        return QWEN_SCOPE
    if "trainer" in config:
        return DICTIONARY_LEARNING
    if "architectures" in config or "num_hidden_layers" in config:
        raise NLAError(
            f"{files.name} is a language model (its config says model_type="
            f"{words(config.get('model_type'))}), not a dictionary"
        )
    return None


def read_dictionary(
    files: Files, hook_name: str | None = None, format: Format | None = None
) -> Dictionary:
    """Reads one dictionary.

    Args:
        files: Its files.
        hook_name: Where it reads; None takes what the files say.
        format: As the caller names it; None takes what is proven.

    Raises:
        NLAError: No proven format, or a file that does not fit it.
    """
    known = format or format_of(files)
    if known is not None:
        known.refuse(files)
    tensors = files.tensors
    known = known or _by_tensors(files, tensors)
    found = known.read(files, tensors)
    return (
        found if hook_name is None else replace(found, cfg=replace(found.cfg, hook_name=hook_name))
    )


def _by_tensors(files: Files, tensors: Tensors) -> Format:
    """The format that the tensors' own names prove, with the file's.

    Raises:
        NLAError: They prove none.
    """
    if {"w_enc", "w_dec"} <= set(tensors):
        return GEMMA_SCOPE
    if "encoder_linear.weight" in tensors:
        return GOODFIRE
    if dictionary_learning_files.is_one(files, tensors):
        return DICTIONARY_LEARNING
    if set(tensors) == _BARE:
        if linear_files.is_qresearch(files):
            return QRESEARCH
        raise NLAError(
            f"{files.weights} has the tensors {sorted(_BARE)}, which prove no format: qresearch, "
            "Llama Scope and dictionary_learning use these names for different latents. Get the "
            "config that belongs to it, or say which with format=, as in format='qresearch'"
        )
    raise NLAError(
        f"{files.weights} has tensors {words(*sorted(tensors)[:8])}, no format that is known: "
        f"{', '.join(f.name for f in _ALL)}; say which with format= if it is one of them"
    )
