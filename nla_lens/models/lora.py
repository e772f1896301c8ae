"""LoRA halves: a PEFT adapter directory where a full model is expected.

The adapter is merged into its base when it is loaded, so that explaining costs no more than with a
full model; into a quantized base it is not merged, since that would round it away.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any, Final

from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError, told

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"


def named_base(path: str | Path) -> str | None:
    """The base model an adapter directory names; None where `path` is not such a directory.

    Raises:
        NLAError: The adapter's config is damaged.
    """
    config_path = Path(path) / CONFIG_NAME
    if not config_path.is_file():
        return None
    try:
        base = read_json(config_path)["base_model_name_or_path"]
    except (NLAError, KeyError) as error:
        raise NLAError(f"{config_path} does not name a base model: {error}") from error
    if not isinstance(base, str) or not base:
        raise NLAError(
            f"{config_path}: base_model_name_or_path is {base!r}; expected a name, or pass base="
        )
    return base


def adapter_base(path: str | Path, base: str | None = None) -> str | None:
    """The base model of an adapter directory; None where `path` is not such a directory.

    Args:
        path: The directory.
        base: What is known of the base already; None reads adapter_config.json.

    Raises:
        NLAError: The adapter's config is damaged, or its weights are not safetensors.
    """
    if not (Path(path) / CONFIG_NAME).is_file():
        return None
    found = base or named_base(path)
    if not (Path(path) / WEIGHTS_NAME).is_file():
        # PEFT would fall back to a pickle.
        raise NLAError(f"no {WEIGHTS_NAME} in {path}: only safetensors adapters are loaded")
    return found


def merge_adapter(model: Any, path: str | Path, base: str | None = None) -> Any:
    """Applies the adapter in `path` to its freshly loaded base.

    Args:
        model: The base as the adapter was trained on it (a causal LM, or cut after block K).
        path: The adapter's directory.
        base: Where the base was found, if not where adapter_config.json says.

    Raises:
        NLAError: peft is not installed, or the adapter does not fit the base.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise NLAError(
            f"{path} is a LoRA adapter; loading it needs peft: pip install 'nla-lens[lora]'"
        ) from error
    # Late, for it loads torch, which those who only read files do without.
    from nla_lens.models.passes import turn

    with turn(warnings), warnings.catch_warnings():
        # PEFT only warns where it leaves parts of an adapter out; `_check_fit` is stricter.
        warnings.filterwarnings("ignore", message=".*missing adapter keys.*")
        try:
            given = _keys(path)
            part = _trained_on(model, given)
            adapted = PeftModel.from_pretrained(part, str(path))
            if base is not None:
                # PEFT looks there for the size of the base's vocabulary, on the hub if need be.
                for config in adapted.peft_config.values():
                    config.base_model_name_or_path = base
            _check_fit(adapted, given, path)
            quantized = getattr(model, "is_quantized", False)
            merged = adapted if quantized else adapted.merge_and_unload()
        except NLAError:
            raise
        # PEFT and safetensors raise whatever a damaged adapter makes them trip over.
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise NLAError(
                f"the adapter {path} does not fit its base ({type(error).__name__}: {reason})"
            ) from told(error)
    return merged if part is model else model


def _keys(path: str | Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(Path(path) / WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())


def _trained_on(model: Any, keys: set[str]) -> Any:
    """The part of a causal LM whose modules the adapter's keys name: it, or the model inside.

    An AR adapter may have been trained on the decoder alone, without lm_head.
    """
    from nla_lens.models.anatomy import text_model

    path = next((key for key in sorted(keys) if ".lora_A." in key), "")
    path = path.removeprefix("base_model.model.").partition(".lora_A.")[0]
    for part in (model, model.base_model, text_model(model)):
        with contextlib.suppress(AttributeError):
            part.get_submodule(path)
            return part
    return model


def _check_fit(adapted: Any, given: set[str], path: str | Path) -> None:
    """Refuses an adapter of which parts found no place, or the other way round.

    Raises:
        NLAError: Names the keys.
    """
    from peft import get_peft_model_state_dict

    from nla_lens.models.anatomy import blocks_of

    placed = set(get_peft_model_state_dict(adapted))
    # `target_modules` also names parts of a vision tower, which no NLA adapter trains.
    missing = {key for key in placed - given if "vision" not in key}
    # A reconstructor's base is cut after block K; the adapter may have been trained on all of it.
    n_blocks = len(blocks_of(adapted))
    surplus = {key for key in given - placed if _block(key) < n_blocks}
    if missing or surplus:
        raise NLAError(
            f"the adapter {path} does not fit its base: no place for {sorted(surplus)[:3]}, "
            f"nothing for {sorted(missing)[:3]}"
        )


def _block(key: str) -> int:
    """Index of the block a weight belongs to, -1 for none."""
    found = re.search(r"\.layers\.(\d+)\.", key)
    return -1 if found is None else int(found[1])
