"""The model card of an NLA that is written: what it reads, how it is used, what is known of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from nla_lens.checkpoints.sidecar import VAR_NRM_DEFINITIONS
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.errors import NLAError

_TAGS: Final = [
    "nla-lens", "natural-language-autoencoder", "interpretability", "residual-stream",
    "activation-verbalizer",
]  # fmt: skip
_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_RULES: Final = {
    "replace": "replaces the embedding at the marker, at norm {scale:g}",
    "norm_matched_add": "is added to the output of block 1 at the marker, at the norm found there",
}


def model_card(
    spec: NLASpec,
    *,
    halves: tuple[str, ...],
    evaluation: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> str:
    """README.md with its YAML front matter, as the hub reads it.

    Args:
        spec: What is described.
        halves: "av", and "ar" where there is one.
        evaluation: Names and numbers of the evaluation table.
        name: The hub's name, for the example.

    Raises:
        NLAError: An evaluation that is no mapping of names to numbers or text.
    """
    head: dict[str, Any] = {"library_name": "nla-lens", "tags": _TAGS}
    source = spec.source_model
    # A path of this machine is nobody else's business.
    if source and _HUB_NAME.fullmatch(source):
        head |= {"base_model": source, "base_model_relation": "finetune"}
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    what = "AV (vectors to text) and AR (text to vectors)" if "ar" in halves else "AV alone"
    rule = _RULES[spec.injection].format(scale=spec.injection_scale or 0)
    template = dict(spec.chat_template_kwargs)
    facts = [
        ("halves", what),
        ("reads", f"`{head.get('base_model', 'a local model')}`"),
        ("at", f"`{spec.hook_name}` (d_model {spec.d_model})" if spec.hook_name else "not said"),
        ("a vector", rule),
        ("centred by", f"`{spec.centre_mean}`" if spec.centre_mean else ""),
        ("chat template", f"`{template}`" if template else ""),
    ]
    lines = [f"| {key} | {value} |" for key, value in facts if value]
    return "\n".join(
        [
            "---",
            front.rstrip(),
            "---",
            "",
            "# A natural language autoencoder",
            "",
            "It puts residual-stream vectors of a language model into words and, with its AR, says",
            "how much of a vector the words give back. Details it writes are often invented: read",
            "`fve_nrm` first, and compare with controls.",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
            "```python",
            "from nla_lens import NLA",
            "",
            f'nla = NLA.from_pretrained("{name or "DIRECTORY"}")',
            f"print(nla.explain(vector))  # [{spec.d_model}], from the place above",
            "```",
            "",
            "## Evaluation",
            "",
            "| | value | |",
            "|---|---|---|",
            *_evaluation(spec, evaluation),
            "",
        ]
    )


def _evaluation(spec: NLASpec, evaluation: Mapping[str, Any] | None) -> list[str]:
    rows: list[tuple[str, str, str]] = []
    if spec.var_nrm is not None:
        origin = spec.origins.get("var_nrm", "")
        meaning = f"{VAR_NRM_DEFINITIONS[spec.var_nrm_definition]}; from: {origin}"
        rows.append(("var_nrm", f"{spec.var_nrm:g}", meaning))
    given = evaluation if evaluation is not None else {}
    if not isinstance(given, Mapping):
        raise NLAError(f"evaluation={evaluation!r:.80} must be a mapping of names to numbers")
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        shown = f"{value:.4g}" if number else value
        if not isinstance(name, str) or not isinstance(shown, str):
            raise NLAError(
                f"evaluation= has {name!r:.80}: {value!r:.80}; expected a number or text"
            )
        rows.append((_cell(name), _cell(shown), "measured by whoever wrote this"))
    if "fve_nrm" not in given:
        rows.append(("fve_nrm", "not measured", "share of a vector's variance the text gives back"))
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
