"""Loading through transformers: tokenizers, causal LMs, and backbones cut after a block.

transformers is imported inside the functions, so that `import nla_lens` stays quick.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nla_lens.errors import NLAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PER_LAYER_LISTS = ("layer_types",)
_FOREIGN_ERRORS = ("safetensors_rust", "safetensors", "builtins")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint directory or hub repository."""
    from transformers import AutoTokenizer

    with _clear_errors(path, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=trust_remote_code
        )
    return tokenizer


def load_causal_lm(
    path: str | Path,
    *,
    dtype: Any = None,
    device: Any = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM in eval mode; `dtype` None is what config.json says.

    Raises:
        NLAError: The directory holds no such model, or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    return _load(
        AutoModelForCausalLM, path, {}, dtype, device, device_map, trust_remote_code, may_miss=()
    )


def load_backbone(
    path: str | Path,
    *,
    n_blocks: int | None = None,
    dtype: Any = None,
    device: Any = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The blocks of a model without lm_head and final norm: its output is the residual stream.

    Args:
        path: Checkpoint directory or hub repository.
        n_blocks: Load only the first blocks; None is all that config.json names.
        dtype: As in `load_causal_lm`.
        device: As in `load_causal_lm`.
        device_map: As in `load_causal_lm`.
        trust_remote_code: As in `load_causal_lm`.

    Raises:
        NLAError: Too few blocks, or weights of a block are missing.
    """
    from transformers import AutoConfig, AutoModel

    with _clear_errors(path, "config.json"):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    if n_blocks is not None:
        truncate(config, n_blocks, path)
    # An lm_head in the file is simply not looked at; the final norm may be absent.
    model = _load(
        AutoModel,
        path,
        {"config": config, **_renaming(config)},
        dtype,
        device,
        device_map,
        trust_remote_code,
        may_miss=("norm.weight",),
    )
    remove_final_norm(model)
    return model


def _renaming(config: Any) -> dict[str, Any]:
    """transformers 4 does not strip a causal LM's `model.` for Gemma 3's bare text model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    prefix = getattr(MODEL_MAPPING.get(type(config), None), "base_model_prefix", "model")
    if prefix == "model" or hasattr(config, "text_config"):
        return {}
    return {"key_mapping": {r"^model\.": ""}}


def truncate(config: Any, n_blocks: int, path: object = "the model") -> None:
    """Cuts a config to its first blocks, with the lists that have an entry per block.

    Raises:
        NLAError: The model has fewer blocks.
    """
    text = getattr(config, "text_config", None) or config
    if text.num_hidden_layers < n_blocks:
        raise NLAError(
            f"{path} has {text.num_hidden_layers} blocks; layer {n_blocks - 1} does not exist"
        )
    text.num_hidden_layers = n_blocks
    for name in _PER_LAYER_LISTS:
        per_layer = getattr(text, name, None)
        if isinstance(per_layer, list):
            setattr(text, name, per_layer[:n_blocks])


def _load(
    auto_class: Any,
    path: str | Path,
    options: Mapping[str, Any],
    dtype: Any,
    device: Any,
    device_map: Any,
    trust_remote_code: bool,
    may_miss: tuple[str, ...],
) -> PreTrainedModel:
    with _clear_errors(path, "model"), _quiet_transformers():
        model, report = auto_class.from_pretrained(
            str(path),
            dtype="auto" if dtype is None else dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    missing = sorted(k for k in report["missing_keys"] if not k.endswith(may_miss or ("\0",)))
    if missing or report["mismatched_keys"]:
        raise NLAError(
            f"{path}: the weights do not fit config.json; missing {missing[:5]}, of another shape "
            f"{list(report['mismatched_keys'])[:5]}"
        )
    if device is not None and device_map is None:
        model = model.to(device)
    model.eval().requires_grad_(False)
    loaded: PreTrainedModel = model
    return loaded


def text_model(model: Any) -> Any:
    """The stack of decoder blocks inside a (causal, wrapped, multimodal) model.

    Raises:
        NLAError: No list of blocks is found.
    """
    for path in ("model.language_model", "language_model.model", "language_model", "model", ""):
        found: Any = model
        for name in filter(None, path.split(".")):
            found = getattr(found, name, None)
        if isinstance(getattr(found, "layers", None), nn.ModuleList):
            return found
    raise NLAError(f"no decoder blocks found in {type(model).__name__}: expected model.layers")


def remove_final_norm(model: Any) -> None:
    """Replaces the final norm by identity, so that the model puts out the residual stream.

    Raises:
        NLAError: The model has no final norm under the usual name.
    """
    stack = text_model(model)
    if not hasattr(stack, "norm"):
        raise NLAError(f"{type(stack).__name__} has no final norm named `norm`")
    stack.norm = nn.Identity()


def input_device(model: Any) -> torch.device:
    """Where token ids must be for the embedding."""
    embedding = model.get_input_embeddings()
    device: torch.device = next(embedding.parameters()).device
    return device


@contextlib.contextmanager
def _clear_errors(path: object, what: str) -> Iterator[None]:
    try:
        yield
    # transformers raises whatever the parser under it raised.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        if isinstance(error, NLAError):
            raise
        reason = " ".join(str(error).split())[:400]
        raise NLAError(
            f"the {what} of {path} cannot be loaded ({type(error).__name__}: {reason})"
        ) from error
    except Exception as error:
        # safetensors and tokenizers raise classes of their own that derive from Exception alone.
        if type(error).__module__.split(".")[0] not in (
            "safetensors_rust",
            "safetensors",
            "builtins",
        ):
            raise
        raise NLAError(f"the {what} of {path} cannot be loaded: {error}") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences the report of unused weights: a reconstructor's lm_head is unused on purpose."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
