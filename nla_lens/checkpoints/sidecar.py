"""Reads `nla_meta.yaml`, the file beside config.json that says how a checkpoint is an NLA.

All spellings seen in the wild are read into one `Sidecar`: schema 1 and 2, `av/ar` and
`actor/critic`, model and dataset kinds. The file was written by a stranger: it is read with a safe
loader, size, depth and types are checked, and nothing in it is ever formatted or executed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from nla_lens.checkpoints.releases import RULES, Rule
from nla_lens.disk.reading import read_yaml
from nla_lens.errors import NLAError

SIDECAR_NAME: Final = "nla_meta.yaml"
_MAX_BYTES: Final = 250_000
_SCHEMAS: Final = (1, 2)
SCALES: Final = (1e-15, 1e15)
"""Squares of norms outside leave float32's range."""
_ROLES: Final = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}

Role = Literal["av", "ar"]


@dataclass(frozen=True)
class Sidecar:
    """What one sidecar says; None where it says nothing.

    Attributes:
        path: The file.
        kind: `nla_model`, or `nla_dataset` (nanoNLA-style checkpoints carry their dataset's).
        role: `av` or `ar`; None in a dataset sidecar.
        source_model: The model whose residual stream is meant (`base_checkpoint`).
        d_model: Width of the residual stream.
        layer: K, the extraction layer.
        ar_blocks_below: `ar.num_hidden_layers`, which is K and not the K+1 of config.json.
        injection_scale: Norm the vector gets before it replaces an embedding.
        injection_rule: `extraction.injection_rule`; our extension, absent from released files.
        mse_scale: Norm for the scores; None with `mse_scale_given` means raw.
        mse_scale_given: Whether the key stands in the file at all.
        var_nrm: `extraction.var_nrm`; our extension, absent from released files.
        min_position: `extraction.min_position`, the first position trained on; our extension.
        injection_char: The marker.
        injection_token_id: Its id.
        left_id: Id of the token before it in the canonical prompt.
        right_id: Id of the token after it.
        critic_suffix_ids: Last ids of every tokenized AR prompt.
        av_template: User turn with `{injection_char}`.
        ar_template: Raw AR prompt with `{explanation}`.
    """

    path: Path
    kind: Literal["nla_model", "nla_dataset"]
    role: Role | None = None
    source_model: str | None = None
    d_model: int | None = None
    layer: int | None = None
    ar_blocks_below: int | None = None
    injection_scale: float | None = None
    injection_rule: Rule | None = None
    mse_scale: float | None = None
    mse_scale_given: bool = False
    var_nrm: float | None = None
    min_position: int | None = None
    injection_char: str | None = None
    injection_token_id: int | None = None
    left_id: int | None = None
    right_id: int | None = None
    critic_suffix_ids: tuple[int, ...] | None = None
    av_template: str | None = None
    ar_template: str | None = None
    stage: str | None = field(default=None, compare=False)


def read_sidecar(directory: Path) -> Sidecar:
    """Reads `directory/nla_meta.yaml`.

    Raises:
        NLAError: No such file, not YAML, too large, or a value of the wrong type; names the file
            and the key.
    """
    path = directory / SIDECAR_NAME
    return parse_sidecar(_load_yaml(path), path)


def _load_yaml(path: Path) -> Mapping[str, Any]:
    if not path.exists() or path.is_dir():
        raise NLAError(
            f"no {SIDECAR_NAME} in {path.parent}: not an NLA checkpoint, or one whose sidecar was "
            "left behind; ask whoever made it for the file"
        )
    return read_yaml(path, most_bytes=_MAX_BYTES, what="a sidecar")


def parse_sidecar(raw: Mapping[str, Any], path: Path) -> Sidecar:
    """Checks types and folds the spellings into one; `path` is for messages.

    Raises:
        NLAError: Unknown kind, schema or role, a value of the wrong type, or two that contradict
            each other.
    """
    top = _Section(raw, path)
    kind = top.text("kind")
    if kind not in ("nla_model", "nla_dataset"):
        raise NLAError(f"{path}: kind is {kind!r}; expected nla_model or nla_dataset")
    schema = top.integer("schema_version", least=0)
    if schema not in (None, *_SCHEMAS):
        raise NLAError(
            f"{path}: schema_version is {schema}; this nla_lens reads {_SCHEMAS}, a newer one may "
            "read it"
        )
    extraction, tokens = top.section("extraction"), top.section("tokens")
    prompts, ar = top.section("prompt_templates"), top.section("ar", "critic")
    d_model = _agreed("the width", path, _said("d_model", 1, top, extraction))
    return Sidecar(
        path=path,
        kind=kind,  # type: ignore[arg-type]
        role=_role(top),
        stage=top.text("stage"),
        source_model=top.text("base_checkpoint") or extraction.text("base_model"),
        d_model=d_model,
        layer=_layer(top, extraction, ar),
        ar_blocks_below=ar.integer("num_hidden_layers", least=0),
        injection_scale=extraction.scale("injection_scale", d_model),
        injection_rule=_rule(extraction),
        mse_scale=extraction.scale("mse_scale", d_model),
        mse_scale_given="mse_scale" in extraction.raw,
        var_nrm=extraction.scale("var_nrm", d_model),
        min_position=extraction.integer("min_position", least=0),
        injection_char=tokens.text("injection_char"),
        injection_token_id=tokens.integer("injection_token_id", least=0),
        left_id=tokens.integer("injection_left_neighbor_id", least=0),
        right_id=tokens.integer("injection_right_neighbor_id", least=0),
        critic_suffix_ids=tokens.integers("critic_suffix_ids"),
        av_template=prompts.text("av", "actor"),
        ar_template=prompts.text("ar", "critic"),
    )


def _role(top: _Section) -> Role | None:
    role = top.text("role")
    if role is None:
        return None
    if role not in _ROLES:
        raise NLAError(f"{top.path}: role is {role!r}; expected av or ar (older: actor, critic)")
    return _ROLES[role]  # type: ignore[return-value]


def _rule(extraction: _Section) -> Rule | None:
    rule = extraction.text("injection_rule")
    if rule is not None and rule not in RULES:
        raise NLAError(f"{extraction.path}: injection_rule is {rule!r}; known are {list(RULES)}")
    return rule


def _layer(top: _Section, extraction: _Section, ar: _Section) -> int | None:
    said = {
        **_said("extraction_layer_index", 0, top, extraction, ar),
        **_said("layer_index", 0, extraction),
        **_said("num_hidden_layers", 0, ar),
    }
    return _agreed("the extraction layer", top.path, said)


def _said(key: str, least: int, *sections: _Section) -> dict[str, int | None]:
    return {f"{s.prefix}{key}": s.integer(key, least=least) for s in sections}


def _agreed(what: str, path: Path, said: Mapping[str, int | None]) -> int | None:
    known = {where: value for where, value in said.items() if value is not None}
    if len(set(known.values())) > 1:
        raise NLAError(f"{path} contradicts itself about {what}: {known}")
    return next(iter(known.values()), None)


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:
        # Python refuses to write out integers of thousands of digits.
        return f"a {type(value).__name__} too large to show"


class _Section:
    """One mapping of the file, read key by key with its types checked."""

    def __init__(self, raw: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.raw, self.path, self.prefix = raw, path, prefix

    def _wrong(self, key: str, value: object, expected: str) -> NLAError:
        return NLAError(f"{self.path}: {self.prefix}{key} is {_shown(value)}; expected {expected}")

    def section(self, *spellings: str) -> _Section:
        key = next((k for k in spellings if self.raw.get(k) is not None), spellings[0])
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(key, value, "a mapping")
        return _Section(value or {}, self.path, f"{self.prefix}{key}.")

    def text(self, *spellings: str) -> str | None:
        known = {key: self.raw[key] for key in spellings if self.raw.get(key) is not None}
        for key, value in known.items():
            if not isinstance(value, str):
                raise self._wrong(key, value, "text")
        if len(set(known.values())) > 1:
            names = " and ".join(f"{self.prefix}{key}" for key in known)
            raise NLAError(f"{self.path}: {names} are two spellings of one key, and differ")
        return next(iter(known.values()), None)

    def integer(self, key: str, *, least: int) -> int | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self._wrong(key, value, f"an integer of at least {least}")
        return value

    def integers(self, key: str) -> tuple[int, ...] | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            raise self._wrong(key, value, "a list of token ids")
        return tuple(value)

    def scale(self, key: str, d_model: int | None) -> float | None:
        """A positive number, a numeric string, "sqrt_d_model", or nothing ("raw", "none")."""
        value = self.raw.get(key)
        if value is None or value in ("raw", "none"):
            return None
        if value == "sqrt_d_model":
            if d_model is None:
                raise self._wrong(key, value, "a number, since the sidecar has no d_model")
            return math.sqrt(d_model)
        try:
            number = float(value) if isinstance(value, (int, float, str)) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        least, most = SCALES
        if isinstance(value, bool) or not least <= number <= most:
            raise self._wrong(key, value, 'a positive number, "sqrt_d_model" or null')
        return number
