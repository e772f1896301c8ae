"""How much of a vector its text gives back: fve_nrm, magnitude, and the floors below them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import numpy as np

from nla_lens.evaluation.bootstrap import ratio
from nla_lens.evaluation.report import Measure, measured
from nla_lens.evaluation.sample import Sample
from nla_lens.results.metrics import cosine
from nla_lens.stream.injection import rescale

_CARDS: Final = "cards of released pairs: 0.752 to 0.80"


def fve_nrm(sample: Sample) -> Measure:
    """Row 1: `1 - mean(mse_nrm) / var_nrm`, by the training variance and by the sample's own."""
    found = sample.fve(sample.said_ND)
    each = 1 - sample.mse(sample.said_ND) / sample.baseline
    control = sample.fve_of(sample.permuted_texts)
    return measured(
        "fve_nrm",
        "variance of the vectors that the text gives back",
        found,
        control=control,
        control_name="texts of other documents",
        holds=found.low > max(control.high, 0.0),
        reason="above 0 and above permuted texts" if found.low > 0 else "no better than the mean",
        public=_CARDS,
        own_variance=float(1 - sample.mse(sample.said_ND).mean() / sample.own_var),
        var_nrm=sample.baseline,
        own_var_nrm=sample.own_var,
        median=float(np.median(each)),
        share_above_half=float((each > 0.5).mean()),
        mean_cos=float(sample.cos(sample.said_ND).mean()),
        by_position=by_position(sample, each),
    )


def by_position(sample: Sample, values: np.ndarray) -> dict[str, float]:
    """Means in bands of positions."""
    edges = [0, 5, 10, 20, 50, 100, 500, 10**9]
    bands = {}
    for low, high in pairwise(edges):
        there = (sample.positions >= low) & (sample.positions < high)
        if there.any():
            name = f"{low}-{high - 1}" if high < 10**9 else f"{low}+"
            bands[name] = float(np.nanmean(values[there]))
    return bands


def magnitude(sample: Sample) -> Measure:
    """Row 2: centred raw R2 against the mean vector, and the ratio of norms."""
    vectors, said = sample.vectors_ND.double(), sample.said_ND.double()
    missed = (vectors - said).square().sum(-1).numpy()
    spread = (vectors - vectors.mean(0)).square().sum(-1).numpy()
    if not spread.sum() > 0:
        return missing(
            "magnitude",
            "raw R2 against the mean vector",
            "the vectors do not differ from their mean",
        )
    found = ratio(missed, spread, sample.documents, seed=sample.seed).map(-1.0, 1.0)
    ratios = said.norm(dim=-1) / vectors.norm(dim=-1).clamp_min(1e-12)
    scaled = rescale(sample.said_ND, 1.0).double() * vectors.norm(dim=-1, keepdim=True)
    right_length = (vectors - scaled).square().sum(-1).numpy()
    return measured(
        "magnitude",
        "raw R2 against the mean vector: direction and length together",
        found,
        control=0.0,
        control_name="the mean vector",
        holds=found.low > 0,
        reason="better than the mean vector" if found.low > 0 else "the lengths are not its own",
        public="one public pair: cos 0.86 and raw R2 -0.20",
        norm_ratio=float(ratios.mean()),
        at_the_right_length=float(1 - right_length.sum() / spread.sum()),
    )


def floor_empty(sample: Sample) -> Measure:
    """Row 3: the empty text."""
    return floor(sample, "floor_empty", "the empty text", [""] * len(sample))


def floor_constant(sample: Sample) -> Measure:
    """Row 3: one text for all, the one of this sample that fits them best.

    `best_direction` is what no constant can exceed, as only directions count: that of the mean. By
    the sample's own variance it is -(1 - m) / (1 + m), with m the length of the mean of the unit
    vectors: about 0 where one direction is in all of them, below where they point apart.
    `at_its_best_length` is this text's, were its length free as the mean vector's is: 0 for the
    direction of the mean, by the sample's own variance, and below it for any other.
    """
    mean_ND = rescale(sample.vectors_ND, 1.0).mean(0, keepdim=True).expand_as(sample.vectors_ND)
    text = sample.texts[int(cosine(sample.said_ND, mean_ND).argmax())]
    texts = [text] * len(sample)
    said_ND = sample.back(texts)
    # For units |x - u|^2 is 2 (1 - cos) on average; of all lengths s, |x - s u|^2 is least at
    # s = cos: 1 - cos^2.
    cos = sample.cos(said_ND).mean()
    least = sample.mse(said_ND).mean() * (1 + cos) / 2
    return floor(
        sample,
        "floor_constant",
        "one constant text",
        texts,
        text=text[:200],
        best_direction=sample.fve(mean_ND).value,
        at_its_best_length=float(1 - least / sample.baseline),
    )


def floor_permuted(sample: Sample) -> Measure:
    """Row 3: texts permuted among documents."""
    return floor(sample, "floor_permuted", "texts of other documents", sample.permuted_texts)


def floor_last_token(sample: Sample) -> Measure:
    """Row 3: the token a vector stands at, as its text."""
    if any(token is None for token in sample.tokens):
        return missing("floor_last_token", "the last token alone", "the tokens are not known")
    return floor(
        sample, "floor_last_token", "the last token alone", [str(t) for t in sample.tokens]
    )


def floor_neighbour(sample: Sample) -> Measure:
    """Row 3: the text of the nearest vector among other documents."""
    title = "text of the nearest vector of another document"
    if len(set(sample.documents.tolist())) < 2:
        return missing("floor_neighbour", title, "there is one document only")
    units = rescale(sample.vectors_ND, 1.0)
    near = units @ units.T
    same = sample.documents[:, None] == sample.documents[None]
    near[np.asarray(same)] = -2.0
    nearest = near.argmax(-1).tolist()
    return floor(sample, "floor_neighbour", title, [sample.texts[i] for i in nearest])


def floor(sample: Sample, name: str, title: str, texts: list[str], **details: Any) -> Measure:
    """What other texts give back, below the explanations over the same documents."""
    found, own = sample.fve_of(texts), sample.fve(sample.said_ND)
    # Both over the same documents, so that what they share does not blur the difference.
    gap = sample.mean(sample.mse(sample.back(texts)) - sample.mse(sample.said_ND))
    gap = gap.map(1 / sample.baseline, 0.0)
    holds = gap.low > 0
    return measured(
        name,
        title if title.startswith("fve_nrm") else f"fve_nrm of {title}",
        found,
        control=own,
        control_name="the explanation",
        holds=holds,
        reason="the explanation is above it" if holds else "it does as well as the explanation",
        gap=gap,
        **details,
    )


def missing(name: str, title: str, reason: str) -> Measure:
    """A measure that could not be taken, and why."""
    return Measure(name, title, reason=reason)
