"""Loading through transformers: tokenizers, causal LMs, and backbones cut after a block.

transformers is imported inside the functions, so that `import nla_lens` stays quick.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_lens.errors import NLAError, NLAWarning, told
from nla_lens.models import cutting
from nla_lens.models.anatomy import final_norm_name, remove_final_norm, text_model
from nla_lens.models.lora import adapter_base, merge_adapter
from nla_lens.models.quiet import quiet_transformers
from nla_lens.models.reaching import reached
from nla_lens.models.saved_by_5 import (
    advice,
    keep_own_head,
    read_rope_parameters,
    reads_as_4,
    tokenizer_saved_by_5,
)
from nla_lens.models.small_files import (
    check_config,
    check_generation_config,
    check_regular,
    check_tokenizer_config,
    find_small_file,
)
from nla_lens.models.tokenizer_limits import check_tokenizer
from nla_lens.models.tokenizer_names import TOKENIZER_NAMES
from nla_lens.models.two_readings import other_pieces, two_readings
from nla_lens.models.weight_files import check_unused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint directory or hub repository; an adapter's may be its base's."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    auto_class: Any = AutoTokenizer
    base = adapter_base(path)
    if base is not None:
        named = [name for name in TOKENIZER_NAMES if (Path(path) / name).is_file()]
        path = path if named else base
        if named == ["tokenizer.json"]:
            # transformers 4 looks for a config beside it.
            auto_class = PreTrainedTokenizerFast
    path = reached(path)

    with _clear_errors(path, "tokenizer", trust_remote_code):
        check_regular(path)
        config = check_tokenizer_config(path)
        built_from = find_small_file(path, "tokenizer.json")
        whole = None if built_from is None else check_tokenizer(built_from)
        with quiet_transformers():
            tokenizer = tokenizer_saved_by_5(path) if reads_as_4() else None
        if tokenizer is None:
            tokenizer = auto_class.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        doubt = None
        if whole is not None:
            doubt = two_readings(tokenizer, whole, config)
        elif (pieces := find_small_file(path, "tokenizer.model")) is not None:
            doubt = other_pieces(tokenizer, pieces)
    if doubt is not None:
        warnings.warn(f"the tokenizer of {path}: {doubt}", NLAWarning, stacklevel=2)
    return tokenizer


def load_causal_lm(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: Any = None,
    device: Any = None,
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM in eval mode; `dtype` None is what config.json says.

    `base` is what an adapter goes onto; None is what its adapter_config.json says.
    `quantization_config` is transformers' own (a `BitsAndBytesConfig`, say); None is config.json's.

    Raises:
        NLAError: The directory holds no such model, or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    placing = (dtype, device, device_map, quantization_config, trust_remote_code)
    base = adapter_base(path, base)
    whole = reached(base or path)
    with _clear_errors(whole, "generation_config.json"):
        check_generation_config(whole)
    options = {"config": _load_config(whole, trust_remote_code)}
    model = _load(AutoModelForCausalLM, whole, options, *placing, has_all_blocks=True)
    return model if base is None else _frozen(merge_adapter(model, path, base))


def load_backbone(
    path: str | Path,
    *,
    n_blocks: int | None = None,
    base: str | None = None,
    dtype: Any = None,
    device: Any = None,
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The blocks of a model without lm_head and final norm: its output is the residual stream.

    Args:
        path: Checkpoint directory or hub repository.
        n_blocks: Load only the first blocks; None is all that config.json names.
        base: As in `load_causal_lm`.
        dtype: As in `load_causal_lm`.
        device: As in `load_causal_lm`.
        device_map: As in `load_causal_lm`.
        quantization_config: As in `load_causal_lm`.
        trust_remote_code: As in `load_causal_lm`.

    Raises:
        NLAError: Too few blocks, or weights of a block are missing.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    base = adapter_base(path, base)
    whole = reached(base or path)
    config = _load_config(whole, trust_remote_code)
    if n_blocks is not None:
        with _clear_errors(whole, "config.json"):
            cutting.check_blocks(config, n_blocks, path)
    placing = (dtype, device, device_map, quantization_config, trust_remote_code)
    auto_class = AutoModel if base is None else AutoModelForCausalLM
    if n_blocks is not None:
        auto_class = cutting.cut(auto_class, n_blocks)
    # An lm_head in the file is simply not looked at; the final norm may be absent.
    options = {"config": config, **(_renaming(config) if base is None else {})}
    model = _load(auto_class, whole, options, *placing, needs_final_norm=base is not None)
    if n_blocks is not None:
        cutting.finish(model, n_blocks)
    if base is not None:
        model = text_model(_frozen(merge_adapter(model, path, base)))
    remove_final_norm(model)
    return model


def load_configs(path: str | Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model's config and its generation_config, as they are with the weights; loads no weights.

    Raises:
        NLAError: One of them cannot be read.
    """
    from transformers import GenerationConfig

    path = reached(path)
    config = _load_config(path, trust_remote_code)
    with _clear_errors(path, "generation_config.json"):
        check_generation_config(path)
        if (Path(path) / "generation_config.json").is_file():
            return config, GenerationConfig.from_pretrained(str(path))
        return config, GenerationConfig.from_model_config(config)


def _load_config(path: str | Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    with _clear_errors(path, "config.json"):
        check_regular(path)
        check_config(path)
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        if reads_as_4():
            read_rope_parameters(getattr(config, "text_config", None) or config)
            keep_own_head(config, path)
    return config


def _renaming(config: Any) -> dict[str, Any]:
    """transformers 4 does not strip a causal LM's `model.` for Gemma 3's bare text model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    prefix = getattr(MODEL_MAPPING.get(type(config), None), "base_model_prefix", "model")
    if prefix == "model" or hasattr(config, "text_config"):
        return {}
    return {"key_mapping": {r"^model\.": ""}}


def _load(
    auto_class: Any,
    path: str | Path,
    options: Mapping[str, Any],
    dtype: Any,
    device: Any,
    device_map: Any,
    quantization_config: Any,
    trust_remote_code: bool,
    needs_final_norm: bool = True,
    has_all_blocks: bool = False,
) -> PreTrainedModel:
    if quantization_config is not None:
        # Not passed on as None: that would hide the one in config.json.
        options = {**options, "quantization_config": quantization_config}
    with _clear_errors(path, "model"), quiet_transformers():
        model, report = auto_class.from_pretrained(
            str(path),
            dtype="auto" if dtype is None else dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            # They are named below; transformers' own words do not.
            ignore_mismatched_sizes=True,
            **options,
        )
    may_miss = () if needs_final_norm else _final_norm_keys(model)
    missing = sorted(set(report["missing_keys"]) - set(may_miss))
    if missing or report["mismatched_keys"]:
        raise NLAError(
            f"{path}: the weights do not fit config.json; missing {missing[:5]}, of another shape "
            f"{[_mismatch(m) for m in sorted(report['mismatched_keys'])[:5]]}{advice(path)}"
        )
    check_unused(path, model, report["unexpected_keys"], whole=has_all_blocks)
    if device is not None and device_map is None:
        with _clear_errors(path, "model"):
            model = model.to(device)
    return _frozen(model)


def _mismatch(found: Any) -> str:
    """A weight, its shape in the file, and the one that is due."""
    if isinstance(found, str):
        # transformers 4 keeps the shapes to itself.
        return found
    name, stored, due = found
    return f"{name} {list(stored)} instead of {list(due)}"


def _final_norm_keys(model: Any) -> list[str]:
    stack, name = text_model(model), final_norm_name(model)
    if name is None:
        return []
    prefix = next(path for path, module in model.named_modules() if module is stack)
    path = ".".join(filter(None, (prefix, name)))
    return [f"{path}.{key}" for key, _ in getattr(stack, name).named_parameters()]


def _frozen(model: Any) -> PreTrainedModel:
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


@contextlib.contextmanager
def _clear_errors(path: str | Path, what: str, foreign_code: bool | None = None) -> Iterator[None]:
    """Says of which file it is what went wrong.

    Args:
        path: The checkpoint.
        what: What is read.
        foreign_code: Of what reads config.json on its way, and may have failed there:
            `trust_remote_code`.
    """
    try:
        yield
    except NLAError:
        raise
    # transformers and the parsers under it raise whatever a damaged file makes them trip over; what
    # the tokenizers library raises when its Rust panics is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if foreign_code is not None and os.path.isfile(Path(path) / "config.json"):
            # Where config.json is what cannot be read, this raises.
            _load_config(path, foreign_code)
        reason = " ".join(str(error).split())[:400]
        raise NLAError(
            f"the {what} of {path} cannot be loaded ({type(error).__name__}: {reason})"
            f"{advice(path)}{_elsewhere(path)}"
        ) from told(error)


def _elsewhere(path: str | Path) -> str:
    if os.path.isdir(path):
        return ""
    return "; where it lies on this machine, name its directory (base= of an adapter's halves)"
