"""Measures that run a model again: other texts, samples, another source, the source itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nla_lens.disk.folder import scratch
from nla_lens.errors import NLAError
from nla_lens.evaluation.measures import causal, fidelity, identity, wording
from nla_lens.evaluation.measures import steering as steered
from nla_lens.evaluation.measures.fidelity import missing
from nla_lens.evaluation.report import Measure, measured
from nla_lens.evaluation.taking import Taken, take
from nla_lens.nla import NLA
from nla_lens.results.metrics import cosine
from nla_lens.stream.extraction import encode
from nla_lens.stream.patching import logits

_MOST_SAMPLED: Final = 64
_SAMPLES: Final = 4
_MOST_DESCRIBED: Final = 64
_DESCRIBE: Final = (
    "Here is the beginning of a text. In two or three short sentences: what kind of text is it and "
    "about what, what are its last words, and what comes next?\n\n{text}"
)
_DESCRIPTION_TOKENS: Final = 96


def words_alone(nla: NLA, taken: Taken, tools: Mapping[str, Any]) -> Measure:
    """Row 3: the source model's own description of the words alone, through the same AR."""
    title = "fve_nrm of the source model's description of the words alone"
    sample = taken.sample
    if any(context is None for context in sample.contexts):
        return missing("floor_words_alone", title, "the texts read are not known; pass context=")
    try:
        source = nla.open_source(tools.get("model"), whole=True)
        texts = []
        for context in sample.contexts[:_MOST_DESCRIBED]:
            asked = [{"role": "user", "content": _DESCRIBE.replace("{text}", str(context))}]
            ids = encode(source, asked, for_answer=True)
            written = source.go_on(ids, _DESCRIPTION_TOKENS)
            texts.append(source.tokenizer.decode(written, skip_special_tokens=True))
    except NLAError as error:
        return missing(
            "floor_words_alone", title, f"the source model writes no description: {error}"
        )
    part = sample.first(len(texts))
    return fidelity.floor(part, "floor_words_alone", title, texts, example=texts[0][:200])


def privilege(nla: NLA, taken: Taken, tools: Mapping[str, Any]) -> Measure:
    """Row 12: what the vector gives beyond the words that were read."""
    title = "fve_nrm beyond that of the words alone"
    alone: Measure = tools["taken"].get("floor_words_alone") or words_alone(nla, taken, tools)
    if alone.value is None or alone.control is None:
        return missing("privilege", title, alone.reason)
    gap = alone.details["gap"]
    return measured(
        "privilege",
        title,
        gap,
        control=alone.value,
        control_name="the words alone",
        holds=gap.low > 0,
        reason="the vector says more than the words" if gap.low > 0 else "the words say as much",
        share=alone.value / alone.control if alone.control else None,
    )


def critic(nla: NLA, taken: Taken, tools: Mapping[str, Any]) -> Measure:
    """Row 6: the same texts scored by a reconstructor trained apart."""
    title, other = "fve_nrm by an independent reconstructor", tools.get("critic")
    if other is None:
        return missing("critic", title, "no other reconstructor was given (critic=)")
    sample = taken.sample
    found = sample.fve(other.reconstruct(sample.texts))
    permuted = sample.fve(other.reconstruct(sample.permuted_texts))
    return measured(
        "critic",
        title,
        found,
        control=permuted,
        control_name="permuted texts",
        holds=found.low > max(permuted.high, 0.0),
        reason="another reads the same in it" if found.low > 0 else "only its own AR reads it",
        public="another model's AR through a ridge: 0.592",
        own=sample.fve(sample.said_ND).value,
    )


def agreement(nla: NLA, taken: Taken, tools: Mapping[str, Any]) -> Measure:
    """Row 10: see `wording.agreement`."""
    sample = taken.sample
    wished = {**tools["options"], "score": False, "progress": False}
    wished |= {"temperature": 1.0, "num_samples": _SAMPLES, "seed": sample.seed}
    explained = nla.explain_iter(sample.vectors_ND[:_MOST_SAMPLED], **wished)
    return wording.agreement(sample, [[s.text for s in e.samples] for e in explained])


def _causal(nla: NLA, taken: Taken, tools: Mapping[str, Any]) -> causal.Causal | str:
    """The source model for causal measures, or why there is none."""
    place, sample = nla.spec.place, taken.sample
    if place is None or not all(map(len, taken.prompts)):
        return "the texts the vectors come from are not known"
    try:
        source: Any = nla.open_source(tools.get("model"), whole=True)
    except NLAError as error:
        return str(error)
    model = getattr(source, "model", None)
    if model is None:
        return f"a {type(source).__name__} cannot be changed on the way"
    return causal.Causal(
        lambda ids_BT, edit: logits(model, ids_BT, place, edit),
        place,
        taken.prompts,
        sample.positions.tolist(),
        source.tokenizer,
    )


def splice(nla: NLA, taken: Taken, tools: Mapping[str, Any]) -> Measure:
    """Row 11: see `causal.splice`."""
    found = _causal(nla, taken, tools)
    if isinstance(found, str):
        return missing("splice", "loss recovered by AR(text) in the vector's place", found)
    return causal.splice(taken.sample, found, tools.get("dictionary"))


def steering(nla: NLA, taken: Taken, tools: Mapping[str, Any]) -> Measure:
    """Row 15: see `steering.steering`."""
    found = _causal(nla, taken, tools)
    if isinstance(found, str):
        return missing("steering", "edits that move the next token", found)
    return steered.steering(taken.sample, found)


def drift(nla: NLA, taken: Taken, tools: Mapping[str, Any]) -> Measure:
    """Row 14: fidelity on the residuals of a fine-tuned source, beside those of its own."""
    title, tuned = "fve_nrm on a fine-tuned source", tools.get("drift")
    if tuned is None:
        return missing("drift", title, "no fine-tuned source was given (drift=)")
    sample = taken.sample
    with scratch() as folder:
        there = take(
            nla,
            tools["texts"],
            folder / "store",
            model=tuned,
            positions=tools["positions"],
            budget=tools["budget"],
            seed=sample.seed,
            options=tools["options"],
        ).sample
    there.reconstruct = sample.reconstruct
    found, own = there.fve(there.said_ND), sample.fve(sample.said_ND)
    again, before = identity.retrieval(there), identity.retrieval(sample)
    same = len(there) == len(sample)
    cos = float(cosine(there.vectors_ND, sample.vectors_ND).mean()) if same else None
    holds = found.low > 0
    return measured(
        "drift",
        title,
        found,
        control=own,
        control_name="its own source",
        holds=holds,
        reason="still above the mean vector" if holds else "no better than the mean vector",
        public="residuals at cos 0.975 to the base's: fve 0.42",
        cos_of_residuals=cos,
        retrieval={"fine-tuned": again.value, "own": before.value},
    )


COSTLY: Final = {
    "floor_words_alone": words_alone,
    "privilege": privilege,
    "critic": critic,
    "agreement": agreement,
    "splice": splice,
    "steering": steering,
    "drift": drift,
}
