"""Reads config.json so that it means the same in every transformers version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nla_lens.errors import NLAError


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint directory or hub repository.

    transformers 5 writes all of RoPE under `rope_parameters`; transformers 4 ignores that key,
    falls back to theta 10000 and writes wrong text without a word. There the values are put where
    it looks.

    Raises:
        NLAError: `rope_parameters` of a form transformers 4 has no place for.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    if int(transformers.__version__.split(".")[0]) < 5:
        text = getattr(config, "text_config", None) or config
        parameters = getattr(text, "rope_parameters", None)
        if parameters:
            _spell_for_4(text, parameters, path)
    return config


def _spell_for_4(text: Any, parameters: Any, path: str | Path) -> None:
    by_layer_type = "full_attention" in parameters
    full = parameters["full_attention"] if by_layer_type else parameters
    if not isinstance(full, dict) or "rope_theta" not in full:
        raise NLAError(
            f"{path}: rope_parameters={parameters!r:.200} cannot be read by transformers 4; "
            "install transformers 5"
        )
    text.rope_theta = full["rope_theta"]
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    text.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling
    if by_layer_type and "sliding_attention" in parameters:
        text.rope_local_base_freq = parameters["sliding_attention"]["rope_theta"]
