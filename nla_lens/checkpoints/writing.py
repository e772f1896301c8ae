"""A spec as a sidecar: everything that is known, so that nothing is needed besides.

`parse_sidecar` gives back what is written here; `nla_meta.schema.json` describes it.
"""

from __future__ import annotations

from typing import Any

import yaml

from nla_lens.checkpoints.releases import source_elsewhere
from nla_lens.checkpoints.sidecar import Role
from nla_lens.checkpoints.spec import NLASpec


def sidecar_text(spec: NLASpec, role: Role | None) -> str:
    """The YAML of a half's sidecar; without a role, of one that serves both."""
    return yaml.safe_dump(sidecar_of(spec, role), sort_keys=False, allow_unicode=True, width=10_000)


def sidecar_of(spec: NLASpec, role: Role | None) -> dict[str, Any]:
    """The same as a mapping; keys that say nothing are left out."""
    source = spec.source_model and source_elsewhere(spec.source_model)
    extraction = {
        "injection_rule": spec.injection,
        "injection_scale": spec.injection_scale,
        "var_nrm": spec.var_nrm,
        "var_nrm_definition": spec.var_nrm_definition if spec.var_nrm is not None else None,
        "min_position": spec.min_position,
        "centre_mean": spec.centre_mean,
    }
    tokens = {
        "injection_char": spec.injection_char,
        "injection_token_id": spec.injection_token_id,
        "injection_left_neighbor_id": spec.injection_left_neighbor_id,
        "injection_right_neighbor_id": spec.injection_right_neighbor_id,
        "critic_suffix_ids": list(spec.critic_suffix_ids or ()) or None,
    }
    whole: dict[str, Any] = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "base_checkpoint": source,
        "d_model": spec.d_model,
        "extraction_layer_index": spec.layer,
        # Null is a word of its own here: compare raw.
        "extraction": {**_said(extraction), "mse_scale": spec.mse_scale},
        "tokens": _said(tokens),
        "prompt_templates": _said({"av": spec.av_template, "ar": spec.ar_template}),
        "chat_template_kwargs": dict(spec.chat_template_kwargs) or None,
        "ar": _said({"num_hidden_layers": spec.layer, "n_blocks": spec.ar_blocks}) or None,
    }
    return _said(whole)


def _said(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
