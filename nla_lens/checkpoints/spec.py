"""What an NLA is, put together from its sidecars, configs, the known releases and the caller.

Order of trust: caller, sidecar, config.json, known release. Sidecar and config may not contradict
each other; the injection rule is never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from nla_lens.checkpoints.centre import mean_file
from nla_lens.checkpoints.files import Checkpoint, open_checkpoint
from nla_lens.checkpoints.names import name_halves
from nla_lens.checkpoints.pairs import Bases, open_halves
from nla_lens.checkpoints.releases import Rule, source_here
from nla_lens.checkpoints.settling import settle_mse_scale, settle_rule, settle_scale
from nla_lens.checkpoints.sidecar import Sidecar
from nla_lens.checkpoints.statements import Sources, compare, find_known
from nla_lens.errors import NLAError
from nla_lens.models.tokens import check_template_options
from nla_lens.stream.hook_point import ResidPost

DEFAULT_MIN_POSITION = 10
"""Released NLAs were trained on positions from 50 on and decode poorly before about 10."""


@dataclass(frozen=True)
class NLASpec:
    """All that is known of a loaded NLA.

    Attributes:
        d_model: Width of the residual stream.
        layer: K: the NLA reads the output of decoder block K (from 0); None if nobody says.
        source_model: Hub name or directory of the model that is read.
        injection: `replace` or `norm_matched_add`.
        injection_scale: L2 norm a vector is given before it replaces an embedding; None for the
            other rule.
        mse_scale: L2 norm both sides are given before they are compared; None compares raw.
        var_nrm: Variance of the normalised training vectors, the baseline of `fve_nrm`.
        min_position: Vectors from earlier positions are flagged `early_position`.
        injection_char: The marker whose place in the prompt the vector takes.
        injection_token_id: Its token id.
        injection_left_neighbor_id: Token id before the marker in the canonical prompt.
        injection_right_neighbor_id: Token id after it.
        critic_suffix_ids: Last ids of every tokenized reconstructor prompt.
        av_template: The verbalizer's user turn, with `{injection_char}`.
        ar_template: The reconstructor's prompt, with `{explanation}`.
        var_nrm_definition: Which variance `var_nrm` is: a key of `VAR_NRM_DEFINITIONS`.
        chat_template_kwargs: What the verbalizer's chat template is given beside the messages.
        centre_mean: File of the mean of the vectors: it is subtracted before injection, added to
            what is reconstructed, and both sides are compared without it.
        ar_blocks: Blocks of a reconstructor that is not cut after block K; None where it is.
        av_base: Of a LoRA verbalizer: the model it goes onto.
        ar_base: Of a LoRA reconstructor: the model it goes onto.
        origins: Where each value came from: `sidecar`, `config`, `known release`, `caller`,
            `default`.
    """

    d_model: int
    layer: int | None
    source_model: str | None
    injection: Rule
    injection_scale: float | None
    mse_scale: float | None
    var_nrm: float | None
    min_position: int
    injection_char: str
    injection_token_id: int
    injection_left_neighbor_id: int | None
    injection_right_neighbor_id: int | None
    critic_suffix_ids: tuple[int, ...] | None
    av_template: str
    ar_template: str | None
    var_nrm_definition: str = "around_mean"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    centre_mean: str | None = None
    ar_blocks: int | None = None
    av_base: str | None = field(default=None, compare=False)
    ar_base: str | None = field(default=None, compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def place(self) -> ResidPost | None:
        """The layer as a place in the residual stream."""
        return None if self.layer is None else ResidPost(self.layer)

    @property
    def hook_name(self) -> str | None:
        """`blocks.K.hook_resid_post`."""
        return None if self.place is None else self.place.name

    @property
    def usual_norm(self) -> float | None:
        """Typical ||v||; `injection_scale` was chosen as the mean residual norm."""
        return self.injection_scale

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, origin) of every field, for tables."""
        values = [
            (f.name, repr(getattr(self, f.name)), self.origins.get(f.name, ""))
            for f in fields(self)
            if f.name != "origins"
        ]
        at = next(i for i, row in enumerate(values) if row[0] == "layer") + 1
        return [*values[:at], ("hook_name", repr(self.hook_name), "layer"), *values[at:]]


def build_spec(
    av: Checkpoint,
    ar: Checkpoint | None,
    *,
    injection: str | None = None,
    injection_scale: float | None = None,
    layer: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> NLASpec:
    """Merges what is known of a pair; the last four are the caller's own word.

    Raises:
        NLAError: Something needed is missing, or two sources contradict each other; names both.
    """
    av.check_role("av")
    if ar is not None:
        ar.check_role("ar")
    release = find_known(av, ar)
    sources = Sources(av, ar, release)
    d_model = sources.d_model()
    origins: dict[str, str] = {"d_model": sources.d_model_origin}
    values: dict[str, Any] = {"d_model": d_model}

    def settle(name: str, *candidates: tuple[str, Any], need: str = "") -> Any:
        """Takes the first candidate that says something."""
        for origin, value in candidates:
            if value is not None:
                values[name], origins[name] = value, origin
                return value
        if need:
            raise NLAError(f"{av.name}: {name} is not known: {need}")
        values[name] = None
        return None

    side, ar_side = av.sidecar, ar.sidecar if ar else None
    said_layer = sources.layer(layer)
    settle(
        "layer", ("caller" if layer is not None else "sidecar", said_layer), sources.known("layer")
    )
    source = settle("source_model", ("sidecar", side.source_model), sources.known("source_model"))
    if source is not None:
        values["source_model"] = source_here(source, av.path)
    rule = settle_rule(injection, side, release, values, origins, av.name)
    settle_scale(rule, injection_scale, side, sources, settle)
    settle_mse_scale(d_model, side, ar_side, values, origins)
    settle(
        "var_nrm",
        ("sidecar", ar_side.var_nrm if ar_side else None),
        ("sidecar", side.var_nrm),
        sources.known("var_nrm"),
    )
    settle(
        "var_nrm_definition",
        ("sidecar", ar_side.var_nrm_definition if ar_side else None),
        ("sidecar", side.var_nrm_definition),
        ("default", "around_mean"),
    )
    if release and release.var_nrm_is_estimate and origins.get("var_nrm") == "known release":
        origins["var_nrm"] = "known release (an estimate)"
    settle("min_position", ("sidecar", side.min_position), ("default", DEFAULT_MIN_POSITION))
    _settle_tokens(side, ar_side, settle)
    given = check_template_options(chat_template_kwargs, "chat_template_kwargs=")
    settle(
        "chat_template_kwargs",
        ("caller", given if chat_template_kwargs is not None else None),
        ("sidecar", side.chat_template_kwargs or None),
        ("default", {}),
    )
    settle("centre_mean", ("sidecar", mean_file(av, ar)))
    settle("ar_blocks", ("sidecar", sources.ar_blocks()))
    settle("av_base", (av.base_said, av.base))
    settle("ar_base", (ar.base_said if ar else "", ar.base if ar else None))
    if release is not None:
        compare(values, origins, release, side)
    return NLASpec(**values, origins=origins)


def read_pair(
    name: str | Path | None = None,
    *,
    av: str | Path | None = None,
    ar: str | Path | None = None,
    revision: str | None = None,
    injection: str | None = None,
    injection_scale: float | None = None,
    layer: int | None = None,
    subfolder: str | Mapping[str, str] | None = None,
    base: Bases = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[NLASpec, Checkpoint]:
    """What a checkpoint says of itself, without its weights, and its verbalizer's files.

    Raises:
        NLAError: Not an NLA, incomplete or contradictory, as far as the small files tell.
    """
    names = name_halves(name, av, ar, subfolder=subfolder, revision=revision)
    opened_av, opened_ar = open_halves(
        *names,
        bases=base,
        opening=dict.fromkeys(
            ("av", "ar"), partial(open_checkpoint, revision=revision, weights=False)
        ),
    )
    spec = build_spec(
        opened_av,
        opened_ar,
        injection=injection,
        injection_scale=injection_scale,
        layer=layer,
        chat_template_kwargs=chat_template_kwargs,
    )
    return spec, opened_av


def read_spec(name: str | Path | None = None, **options: Any) -> NLASpec:
    """What a checkpoint says of itself; arguments and errors as of `read_pair`."""
    return read_pair(name, **options)[0]


def _settle_tokens(side: Sidecar, ar_side: Sidecar | None, settle: Any) -> None:
    where = f"it must stand in {side.path}"
    settle("injection_char", ("sidecar", side.injection_char), need=where)
    settle("injection_token_id", ("sidecar", side.injection_token_id), need=where)
    settle("injection_left_neighbor_id", ("sidecar", side.left_id))
    settle("injection_right_neighbor_id", ("sidecar", side.right_id))
    settle("av_template", ("sidecar", side.av_template), need=where)
    # An AV's sidecar may hold the AR's template, too; the AR's own comes first.
    own = ar_side.ar_template if ar_side else None
    settle("ar_template", ("sidecar", own), ("sidecar", side.ar_template))
    settle("critic_suffix_ids", ("sidecar", (ar_side or side).critic_suffix_ids))
