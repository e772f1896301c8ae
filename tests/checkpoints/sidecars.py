"""nla_meta.yaml in every shape that was seen: schema 1 and 2, both spellings, both kinds."""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from . import texts, vocabulary

ABSENT = "<<absent>>"  # as a value: the key is left out (also as an override: the key is removed)

# One of each size class of the releases, in units of these small models.
INJECTION_SCALES = {
    "llama": 30.0,
    "qwen2": 150.0,
    "qwen3": 40.0,
    "gemma3_text": 800.0,
    "gemma3": 800.0,
}

Overrides = Mapping[str, Any] | Callable[[dict], dict | None] | None


def marker_ids(family: str) -> tuple[int, int, int]:
    """Left neighbour, marker and right neighbour, as they stand in the AV prompt."""
    marker = texts.MARKERS[family]
    prompt = texts.AV_TEMPLATE.replace("{injection_char}", marker)
    ids = vocabulary.tokenizer(family).encode(prompt, add_special_tokens=False).ids
    at = ids.index(vocabulary.token_id(family, marker))
    return ids[at - 1], ids[at], ids[at + 1]


def suffix_ids(family: str) -> list[int]:
    """The last ids of the AR prompt, measured: five, or those that are the same for every text."""
    prompts = [texts.AR_TEMPLATE.replace("{explanation}", text) for text in texts.EXPLANATIONS]
    rows = [vocabulary.tokenizer(family).encode(prompt).ids for prompt in prompts]
    length = 0
    while length < 5 and len({row[-1 - length] for row in rows}) == 1:
        length += 1
    return rows[0][-length:]


def sidecar(
    role: str,
    family: str,
    *,
    d_model: int,
    layer: int,
    base: str,
    injection_scale: float | str | None = ABSENT,
    mse_scale: float | str | None = ABSENT,
    schema: int = 2,
    spelling: str = "av",
    kind: str = "nla_model",
) -> dict:
    """A sidecar as a mapping; see nla-facts section 3.

    Args:
        role: "av" or "ar", whatever the spelling.
        family: names the marker and the tokenizer.
        d_model: width.
        layer: K.
        base: the source model: a hub name or a directory.
        injection_scale: a number, None, "sqrt_d_model", a numeric string or `ABSENT`.
        mse_scale: the same.
        schema: 1 or 2.
        spelling: "av" (av, ar) or "actor" (actor, critic, the older one).
        kind: "nla_model" or "nla_dataset"; a data set's has neither scale and no role.
    """
    av, ar = ("av", "ar") if spelling == "av" else ("actor", "critic")
    left, marker, right = marker_ids(family)
    tokens = {
        "injection_char": texts.MARKERS[family],
        "injection_token_id": marker,
        "injection_left_neighbor_id": left,
        "injection_right_neighbor_id": right,
        "critic_suffix_ids": suffix_ids(family) if role == "ar" else None,
    }
    templates = {av: texts.AV_TEMPLATE, ar: texts.AR_TEMPLATE}
    if kind == "nla_dataset":
        return {
            "kind": kind,
            "schema_version": schema,
            "stage": "av_sft" if role == "av" else "ar_sft",
            "row_count": 1000,
            "extraction": {
                "base_model": base,
                "d_model": d_model,
                "layer_index": layer,
                "norm": "none",
            },
            "tokens": tokens,
            "prompt_templates": templates,
        }
    scales = {"injection_scale": injection_scale, "mse_scale": mse_scale}
    made = {
        "kind": kind,
        "schema_version": schema,
        "role": av if role == "av" else ar,
        "stage": "rl",
        "base_checkpoint": base,
        "d_model": d_model,
        "extraction_layer_index": layer,
        "extraction": {key: value for key, value in scales.items() if value != ABSENT},
        "tokens": tokens,
        "prompt_templates": templates,
        "trained_on": ["test/activations"],
    }
    if role == "ar":
        made[ar] = {"num_hidden_layers": layer}
        if schema == 2:
            made[ar]["extraction_layer_index"] = layer
    return made


def default_mse_scale(d_model: int) -> float:
    """sqrt(d) with the digits that the releases write."""
    return round(math.sqrt(d_model), 4)


def override(mapping: dict, change: Overrides) -> dict:
    """A changed copy; the change is a nested mapping, laid over it, or a function of it."""
    made = copy.deepcopy(mapping)
    if change is None:
        return made
    if callable(change):
        returned = change(made)
        return made if returned is None else returned
    for key, value in change.items():
        if isinstance(value, str) and value == ABSENT:
            made.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(made.get(key), dict):
            made[key] = override(made[key], value)
        else:
            made[key] = value
    return made


def write_sidecar(directory: Path | str, mapping: Mapping | str) -> Path:
    """Write nla_meta.yaml; a string is written as it is (for broken files)."""
    text = (
        mapping
        if isinstance(mapping, str)
        else yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True)
    )
    path = Path(directory) / "nla_meta.yaml"
    path.write_text(text, encoding="utf-8")
    return path
