"""Reads `nla_meta.yaml`, the file beside config.json that says how a checkpoint is an NLA.

All spellings seen in the wild are read into one `Sidecar`: schema 1 and 2, `av/ar` and
`actor/critic`, model and dataset kinds. The file was written by a stranger: it is read with a safe
loader, size, depth and types are checked, and nothing in it is ever formatted or executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from nla_lens.checkpoints.releases import RULES, Rule
from nla_lens.checkpoints.section import Section
from nla_lens.disk.reading import read_yaml
from nla_lens.errors import NLAError
from nla_lens.models.tokens import check_template_options

SIDECAR_NAME: Final = "nla_meta.yaml"
_MAX_BYTES: Final = 250_000
_SCHEMAS: Final = (1, 2)
_ROLES: Final = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}

Role = Literal["av", "ar"]

VAR_NRM_DEFINITIONS: Final[Mapping[str, str]] = {
    "around_mean": "mean squared distance of the normalised vectors from their mean",
    "around_unit_mean": "the same from the mean scaled to mse_scale: a constant guess's mse_nrm",
}
"""The two baselines that are called var_nrm; released files mean the first."""
# Keys whose names look like maths, and that are read (or say what is so anyway).
_KNOWN: Final = frozenset(
    {
        "injection_scale", "injection_rule", "injection_char", "injection_token_id",
        "injection_left_neighbor_id", "injection_right_neighbor_id", "mse_scale", "var_nrm",
        "var_nrm_definition", "centre_mean", "center_mean",
    }
)  # fmt: skip


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
        layers: `extraction.layers`: every layer it was trained on, where it is more than one.
        ar_blocks_below: `ar.num_hidden_layers`, which is K and not the K+1 of config.json.
        ar_blocks: `ar.n_blocks`: blocks of a reconstructor that is not cut after block K; our
            extension, absent from released files.
        centre_mean: `extraction.centre_mean`: a file beside the sidecar; its vector is subtracted
            before injection and added to what is reconstructed.
        injection_scale: Norm the vector gets before it replaces an embedding.
        injection_rule: `extraction.injection_rule`; our extension, absent from released files.
        mse_scale: Norm for the scores; None with `mse_scale_given` means raw.
        mse_scale_given: Whether the key stands in the file at all.
        var_nrm: `extraction.var_nrm`; our extension, absent from released files.
        var_nrm_definition: `extraction.var_nrm_definition`, a key of `VAR_NRM_DEFINITIONS`.
        min_position: `extraction.min_position`, the first position trained on; our extension.
        injection_char: The marker.
        injection_token_id: Its id.
        left_id: Id of the token before it in the canonical prompt.
        right_id: Id of the token after it.
        critic_suffix_ids: Last ids of every tokenized AR prompt.
        av_template: User turn with `{injection_char}`.
        ar_template: Raw AR prompt with `{explanation}`.
        chat_template_kwargs: What the chat template is given beside the messages.
    """

    path: Path
    kind: Literal["nla_model", "nla_dataset"]
    role: Role | None = None
    source_model: str | None = None
    d_model: int | None = None
    layer: int | None = None
    layers: tuple[int, ...] | None = None
    ar_blocks_below: int | None = None
    ar_blocks: int | None = None
    centre_mean: str | None = None
    injection_scale: float | None = None
    injection_rule: Rule | None = None
    mse_scale: float | None = None
    mse_scale_given: bool = False
    var_nrm: float | None = None
    var_nrm_definition: str | None = None
    min_position: int | None = None
    injection_char: str | None = None
    injection_token_id: int | None = None
    left_id: int | None = None
    right_id: int | None = None
    critic_suffix_ids: tuple[int, ...] | None = None
    av_template: str | None = None
    ar_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)


def read_sidecar(directory: Path) -> Sidecar:
    """Reads `directory/nla_meta.yaml`.

    Raises:
        NLAError: No such file, not YAML, too large, or a value of the wrong type; names the file
            and the key.
    """
    path = directory / SIDECAR_NAME
    return parse_sidecar(read_raw(path), path)


def read_raw(path: Path) -> Mapping[str, Any]:
    """A sidecar as it stands there.

    Raises:
        NLAError: No such file, not YAML, or too large.
    """
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
    top = Section(raw, path)
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
    for section in (top, extraction, tokens, ar, top.section("av", "actor")):
        section.check_maths(_KNOWN)
    d_model = _agreed("the width", path, _said("d_model", 1, top, extraction))
    return Sidecar(
        path=path,
        kind=kind,  # type: ignore[arg-type]
        role=_role(top),
        source_model=top.text("base_checkpoint") or extraction.text("base_model"),
        d_model=d_model,
        layer=_layer(top, extraction, ar),
        layers=extraction.integers("layers"),
        ar_blocks_below=ar.integer("num_hidden_layers", least=0),
        ar_blocks=ar.integer("n_blocks", least=1),
        centre_mean=_mean_file(extraction),
        injection_scale=extraction.scale("injection_scale", d_model),
        injection_rule=_rule(extraction),
        mse_scale=extraction.scale("mse_scale", d_model),
        mse_scale_given="mse_scale" in extraction.raw,
        var_nrm=extraction.scale("var_nrm", d_model),
        var_nrm_definition=_definition(extraction),
        min_position=extraction.integer("min_position", least=0),
        injection_char=tokens.text("injection_char"),
        injection_token_id=tokens.integer("injection_token_id", least=0),
        left_id=tokens.integer("injection_left_neighbor_id", least=0),
        right_id=tokens.integer("injection_right_neighbor_id", least=0),
        critic_suffix_ids=tokens.integers("critic_suffix_ids"),
        av_template=prompts.text("av", "actor"),
        ar_template=prompts.text("ar", "critic"),
        chat_template_kwargs=check_template_options(
            top.mapping("chat_template_kwargs"), f"{path}: chat_template_kwargs"
        ),
    )


def _definition(extraction: Section) -> str | None:
    found = extraction.text("var_nrm_definition")
    if found is not None and found not in VAR_NRM_DEFINITIONS:
        raise NLAError(
            f"{extraction.path}: extraction.var_nrm_definition is {found!r:.80}; known are "
            f"{list(VAR_NRM_DEFINITIONS)}"
        )
    return found


def _mean_file(extraction: Section) -> str | None:
    """The file of a mean, which lies beside the sidecar."""
    found = extraction.text("centre_mean", "center_mean")
    if found is None:
        return None
    if Path(found).name != found or not found.endswith((".npy", ".safetensors")):
        key = "centre_mean" if "centre_mean" in extraction.raw else "center_mean"
        raise extraction.wrong(key, found, "an .npy or .safetensors file beside the sidecar")
    return found


def _role(top: Section) -> Role | None:
    role = top.text("role")
    if role is None:
        return None
    if role not in _ROLES:
        raise NLAError(f"{top.path}: role is {role!r}; expected av or ar (older: actor, critic)")
    return _ROLES[role]  # type: ignore[return-value]


def _rule(extraction: Section) -> Rule | None:
    rule = extraction.text("injection_rule")
    if rule is not None and rule not in RULES:
        raise NLAError(f"{extraction.path}: injection_rule is {rule!r}; known are {list(RULES)}")
    return rule


def _layer(top: Section, extraction: Section, ar: Section) -> int | None:
    said = {
        **_said("extraction_layer_index", 0, top, extraction, ar),
        **_said("layer_index", 0, extraction),
        **_said("num_hidden_layers", 0, ar),
    }
    return _agreed("the extraction layer", top.path, said)


def _said(key: str, least: int, *sections: Section) -> dict[str, int | None]:
    return {f"{s.prefix}{key}": s.integer(key, least=least) for s in sections}


def _agreed(what: str, path: Path, said: Mapping[str, int | None]) -> int | None:
    known = {where: value for where, value in said.items() if value is not None}
    if len(set(known.values())) > 1:
        raise NLAError(f"{path} contradicts itself about {what}: {known}")
    return next(iter(known.values()), None)
