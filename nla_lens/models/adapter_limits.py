"""An adapter's config and tensors, looked at before peft builds what they name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from nla_lens.checks import is_int, is_number
from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError
from nla_lens.models.limited import check_patterns

_MOST_ENTRIES: Final = 100_000
_PLAIN: Final = re.compile(r"[\w.\-]*")


def check_adapter(config_path: Path, weights_path: Path, names: list[str]) -> None:
    """Refuses an adapter that costs more than it is, or that holds no numbers.

    Args:
        config_path: adapter_config.json.
        weights_path: The tensors, as safetensors.
        names: Of the base's modules, which its regular expressions are held against.

    Raises:
        NLAError: Ranks its tensors do not have, a scale that is none, regular expressions that do
            not come to an end, NaN.
    """
    config = read_json(config_path)

    def wrong(key: str, expected: str) -> NLAError:
        found = f"{key} is {config.get(key)!r:.80}; expected {expected}"
        return NLAError(f"the adapter does not fit its base: {config_path}: {found}")

    longest = _check_tensors(weights_path)
    for key, ranks in (("r", [config.get("r", 8)]), ("rank_pattern", _values(config, wrong))):
        if not all(is_int(rank) and 0 <= rank <= longest for rank in ranks):
            raise wrong(key, f"ranks of at most {longest}, as its tensors have")
    alphas = [config.get("lora_alpha", 8), *_values(config, wrong, "alpha_pattern")]
    if not all(is_number(alpha) and math.isfinite(alpha) for alpha in alphas):
        raise wrong("lora_alpha", "a number")
    patterns = list(_patterns(config))
    if len(patterns) > _MOST_ENTRIES:
        raise NLAError(f"{config_path} names {len(patterns)} modules")
    # Names without anything special are soon compared.
    special = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
    if special:
        try:
            check_patterns(special, names)
        except NLAError as error:
            raise NLAError(
                f"{config_path}: a regular expression in it ({special[0]!r:.80}) cannot be used: "
                f"{error}"
            ) from None


def _values(config: Mapping[str, Any], wrong: Any, key: str = "rank_pattern") -> list[Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise wrong(key, "values by module")
    return list(found.values())


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """All that peft takes for a regular expression, as it builds it."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str) and config[key] != "all-linear":
            yield config[key]
    for key in ("rank_pattern", "alpha_pattern"):
        for name in config.get(key) or ():
            yield rf"(.*\.)?({name})$"
    for key in ("modules_to_save", "target_parameters"):
        listed = config.get(key) or []
        for name in [listed] if isinstance(listed, str) else listed:
            yield rf"(^|.*\.){name}($|\..*)"
    listed = config.get("layers_pattern") or []
    for name in [listed] if isinstance(listed, str) else listed:
        yield rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\..*"


def _check_tensors(path: Path) -> int:
    """The longest side of an adapter's tensors, all of them finite."""
    from safetensors import safe_open

    longest = 0
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            tensor = file.get_tensor(key)
            longest = max(longest, *tensor.shape, 0)
            if not tensor.is_floating_point() or tensor.itemsize < 2:
                raise NLAError(
                    f"{path}: {key:.200} is {tensor.dtype}; expected float32, bfloat16 or float16: "
                    "what is quantized has scales elsewhere"
                )
            if not bool(tensor.isfinite().all()):
                raise NLAError(f"{path}: {key} holds NaN or infinity")
    return longest
