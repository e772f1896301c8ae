"""LoRA halves: a PEFT adapter directory where a full model is expected.

The adapter is merged into its base when it is loaded, so that explaining costs no more than with a
full model; into a quantized base it is not merged, since that would round it away.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError, told
from nla_lens.models.adapter_limits import check_adapter
from nla_lens.models.lora_kinds import CONFIG_NAME as CONFIG_NAME
from nla_lens.models.lora_kinds import fit_vocabulary, is_copy, is_table, refuse_other_kinds, untie
from nla_lens.models.turns import turn

WEIGHTS_NAME: Final = "adapter_model.safetensors"
_LEAD: Final = "base_model.model."
"""What PEFT puts before the names of the base's modules."""


def named_base(path: str | Path) -> str | None:
    """The base model an adapter directory names; None where `path` is not such a directory.

    Raises:
        NLAError: The adapter's config is damaged.
    """
    config_path = Path(path) / CONFIG_NAME
    # Not Path.is_file, which raises on a name too long to be a file's.
    if not os.path.isfile(config_path):
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
    # Not Path.is_file, which raises on a name too long to be a file's.
    if not os.path.isfile(Path(path) / CONFIG_NAME):
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
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise NLAError(
            f"{path} is a LoRA adapter; loading it needs peft: pip install 'nla-lens[lora]'"
        ) from error
    refuse_other_kinds(path)
    with turn(warnings), warnings.catch_warnings():
        # PEFT only warns where it leaves parts of an adapter out; `_check_fit` is stricter.
        # Tied tables are dealt with, too.
        for message in (".*missing adapter keys", ".*no longer tied", ".*tie_word_embeddings"):
            warnings.filterwarnings("ignore", message=message)
        try:
            given = _shapes(path)
            part, lead = _trained_on(model, given)
            given = {_without(lead, key): shape for key, shape in given.items()}
            names = [name for name, _ in part.named_modules()]
            check_adapter(Path(path) / CONFIG_NAME, Path(path) / WEIGHTS_NAME, names)
            fit_vocabulary(model, part, given, path)
            config = PeftConfig.from_pretrained(str(path))
            # By its task PEFT would look for what only a causal LM has.
            config.task_type = None
            mapping = {f"^{re.escape(lead)}": ""} if lead else None
            adapted = PeftModel.from_pretrained(part, str(path), config=config, key_mapping=mapping)
            if base is not None:
                # PEFT looks there for the size of the base's vocabulary, on the hub if need be.
                for config in adapted.peft_config.values():
                    config.base_model_name_or_path = base
            _check_fit(adapted, set(given), path)
            untie(adapted)
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


def _shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(Path(path) / WEIGHTS_NAME, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _trained_on(model: Any, keys: Iterable[str]) -> tuple[Any, str]:
    """The part of a causal LM whose modules the adapter's keys name, and what leads up to them.

    An AR adapter may have been trained on the decoder alone, without lm_head; others on the text
    model of a multimodal wrapper or on the wrapper of a text model, or on what `torch.compile` or
    DataParallel had wrapped. What leads up to the keys is then to be left out of them.
    """
    from nla_lens.models.anatomy import text_model

    path = next((key for key in sorted(keys) if ".lora_A." in key), "")
    names = path.removeprefix(_LEAD).partition(".lora_A.")[0].split(".")
    for start in range(len(names)):
        for part in (model, model.base_model, text_model(model)):
            with contextlib.suppress(AttributeError):
                part.get_submodule(".".join(names[start:]))
                return part, "".join(f"{name}." for name in names[:start])
    return model, ""


def _without(lead: str, key: str) -> str:
    return _LEAD + key.removeprefix(_LEAD).removeprefix(lead)


def _check_fit(adapted: Any, given: set[str], path: str | Path) -> None:
    """Refuses an adapter of which parts found no place, or the other way round.

    Raises:
        NLAError: Names the keys.
    """
    from peft import get_peft_model_state_dict

    from nla_lens.models.anatomy import block_index, blocks_of

    # Whole tables of embeddings are looked at apart: PEFT goes by the config of the base on disk.
    given = {key for key in given if not (is_table(adapted, key) or is_copy(key, given))}
    placed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    placed = {key for key in placed if not is_table(adapted, key)}
    # `target_modules` also names parts of a vision tower, which no NLA adapter trains.
    missing = {key for key in placed - given if "vision" not in key}
    # A reconstructor's base is cut after block K; the adapter may have been trained on all of it.
    n_blocks = len(blocks_of(adapted))
    surplus = {key for key in given - placed if block_index(adapted, key) < n_blocks}
    if missing or surplus:
        raise NLAError(
            f"the adapter {path} does not fit its base: no place for {sorted(surplus)[:3]}, "
            f"nothing for {sorted(missing)[:3]}"
        )
