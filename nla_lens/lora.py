"""LoRA halves: a PEFT adapter directory where a full model is expected.

The adapter is merged into its base when it is loaded, so that explaining costs no more than with a
full model; into a quantized base it is not merged, since that would round it away.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Final

from nla_lens.errors import NLAError

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"


def adapter_base(path: str | Path) -> str | None:
    """The base model an adapter directory names; None where `path` is not such a directory.

    Raises:
        NLAError: The adapter's config is damaged, or its weights are not safetensors.
    """
    config_path = Path(path) / CONFIG_NAME
    if not config_path.is_file():
        return None
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NLAError(f"{config_path} does not name a base model: {error!r}") from error
    if not isinstance(base, str) or not base:
        raise NLAError(f"{config_path}: base_model_name_or_path is {base!r}; expected a name")
    if not (Path(path) / WEIGHTS_NAME).is_file():
        # PEFT would fall back to a pickle.
        raise NLAError(f"no {WEIGHTS_NAME} in {path}: only safetensors adapters are loaded")
    return base


def merge_adapter(model: Any, path: str | Path) -> Any:
    """Applies the adapter in `path` to its freshly loaded base.

    Args:
        model: The base as the adapter was trained on it (a causal LM, or cut after block K).
        path: The adapter's directory.

    Raises:
        NLAError: peft is not installed, or the adapter does not fit the base.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise NLAError(
            f"{path} is a LoRA adapter; loading it needs peft: pip install 'nla-lens[lora]'"
        ) from error
    with warnings.catch_warnings():
        # PEFT only warns where it leaves parts of an adapter out; `_check_fit` is stricter.
        warnings.filterwarnings("ignore", message=".*missing adapter keys.*")
        try:
            adapted = PeftModel.from_pretrained(model, str(path))
        except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:400]
            raise NLAError(f"the adapter {path} does not fit its base: {reason}") from error
    _check_fit(adapted, path)
    if getattr(model, "is_quantized", False):
        return adapted
    return adapted.merge_and_unload()


def _check_fit(adapted: Any, path: str | Path) -> None:
    """Refuses an adapter of which parts found no place, or the other way round.

    Raises:
        NLAError: Names the keys.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    # Here, so that naming a checkpoint's files does not load torch.
    from nla_lens.anatomy import text_model

    with safe_open(Path(path) / WEIGHTS_NAME, framework="pt") as file:
        given = set(file.keys())
    placed = set(get_peft_model_state_dict(adapted))
    # `target_modules` also names parts of a vision tower, which no NLA adapter trains.
    missing = {key for key in placed - given if "vision" not in key}
    # A reconstructor's base is cut after block K; the adapter may have been trained on all of it.
    n_blocks = len(text_model(adapted.get_base_model()).layers)
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
