"""How good a pair is, by nla_lens itself, on vectors of sources that training never saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import describe
import torch
from residuals import Sample
from tiny import permuted, retrieval

from nla_lens import NLA
from nla_lens.results import metrics

RETRIEVED_OF = 100
MAX_NEW_TOKENS = 64


def spread(sample: Sample, count: int) -> Sample:
    """Takes vectors evenly from all documents."""
    return sample.pick(torch.linspace(0, len(sample) - 1, min(count, len(sample))).long().tolist())


def written(nla: NLA, sample: Sample) -> list[str]:
    """What the verbalizer writes, greedily."""
    made = nla.explain(sample.vectors_ND, max_new_tokens=MAX_NEW_TOKENS, score=False)
    return [each.text for each in made]


def baselines(nla: NLA, sample: Sample, mean_D: torch.Tensor) -> dict[str, float]:
    """What needs no verbalizer: the mean direction, the last token, the true descriptions.

    Args:
        nla: The pair.
        sample: Vectors of unseen sources.
        mean_D: Mean of the normalised training vectors.
    """
    n = len(sample)
    last = [describe.ending(replace(f, before="", tail=f.last)) for f in sample.facts]
    texts = {
        "gold": [describe.description(f) for f in sample.facts],
        "gold, last words alone": [describe.ending(f) for f in sample.facts],
        "true last token alone": last,
    }
    figures = {"mean direction": _fve(nla, mean_D.expand(n, -1), sample)}
    for name, own in texts.items():
        figures[name] = _fve(nla, nla.reconstruct(own), sample)
    return figures


def scores(nla: NLA, sample: Sample, texts: Sequence[str]) -> dict[str, float]:
    """The figures of what was written.

    Args:
        nla: The pair.
        sample: Vectors of unseen sources.
        texts: What was written for each.
    """
    guess_ND = nla.reconstruct(list(texts))
    figures = {
        "fve": _fve(nla, guess_ND, sample),
        "permuted": _fve(nla, permuted(guess_ND), sample),
        f"retrieval of {RETRIEVED_OF}": retrieval(guess_ND, sample.vectors_ND, RETRIEVED_OF),
    }
    pairs = list(zip(texts, sample.facts, strict=True))
    figures["last token said first"] = _share(describe.last_said(t) == f.last for t, f in pairs)
    figures["token before it"] = _share(describe.before_said(t) == f.before for t, f in pairs)
    tails = [(describe.tail_said(t).split(), f.tail.split()) for t, f in pairs]
    for back, name in ((1, "last word"), (2, "second word back"), (3, "third word back")):
        figures[name] = _share(
            said[-back:][:1] == true[-back:][:1] for said, true in tails if len(true) >= back
        )
    figures["kind"] = _share(describe.kind_said(t) == f.kind for t, f in pairs)
    topics = [
        (word in describe.content_words(prefix))
        for text, prefix in zip(texts, sample.prefixes, strict=True)
        for word in describe.topics_said(text)
    ]
    figures["topic words that are in the text"] = _share(topics)
    figures["topic words a text"] = len(topics) / len(texts)
    return figures


def _fve(nla: NLA, guess_ND: torch.Tensor, sample: Sample) -> float:
    spec = nla.spec
    found = metrics.score(
        guess_ND, sample.vectors_ND, mse_scale=spec.mse_scale, var_nrm=spec.var_nrm
    )
    return float(found.fve_nrm.mean())


def _share(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / max(1, len(listed))
