"""`nla_lens.compare`: two residuals in words, and which sentences tell them apart.

>>> diff = nla_lens.compare(nla, "Nora lives in Naples.", "Nora lives in Oslo.")
>>> diff.a.text, diff.b.text, diff.difference.text
>>> diff.sentences[0]

Two prompts, positions, layers, or a model and what was made of it by fine-tuning. A sentence tells
them apart as far as it is missed by the one vector's score and not by the other's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.evaluation.comparison import Comparison, Explained, Separating, Word
from nla_lens.evaluation.sample import Memory
from nla_lens.halves.options import Options
from nla_lens.models.ambient import undisturbed
from nla_lens.nla import NLA
from nla_lens.results import metrics
from nla_lens.results.explanation import Explanation
from nla_lens.results.sentences import sentences
from nla_lens.stream.explainer import check_nla
from nla_lens.stream.extraction import Positions, encode, pick_positions, read_prompts
from nla_lens.stream.residual import ResidualTensor
from nla_lens.stream.vectors import VectorBatch, check_vectors

_WORD: Final = re.compile(r"\w+")
_FORMS: Final = (
    "a side of a comparison is vectors [d] or [n, d], a text, a list of texts, or "
    '{"text": ..., "positions": -1, "model": ...}'
)


@undisturbed()
def compare(
    *sides: Any,
    positions: Positions = -1,
    model: Any = None,
    seed: int | None = None,
    **options: Any,
) -> Comparison:
    """Says what two residuals hold, and what tells them apart.

    Called as `compare(nla, a, b)`; as `compare(a, b)` where a probe's NLA is known to the tensors.

    Args:
        *sides: The NLA, a and b. Each side: vectors `[d]` or `[n, d]`; a text, chat messages or a
            list of texts, read by the source model; or a mapping of `text`, `positions` and `model`
            (a fine-tuned one, say), each in place of what is said for both.
        positions: Of texts: which tokens are read.
        model: The source model; None: the NLA's own.
        seed: As in `NLA.explain`.
        **options: Those of `NLA.explain`.

    Returns:
        `.a`, `.b`, `.difference`, `.cross`, `.sentences`.

    Raises:
        NLAError: Not as many vectors in b as in a, the same vector twice, no reconstructor, or no
            NLA to be found.
    """
    nla, *given = _sides(sides)
    if nla.reconstructor is None:
        raise NLAError("without a reconstructor no text can be scored; load one with ar=")
    wished: dict[str, Any] = {**options, "seed": seed}
    nla.check_options(Options.of(wished))
    a, b = (_vectors(nla, side, positions, model) for side in given)
    batch_a, batch_b = (_checked(nla, side, name) for side, name in ((a, "a"), (b, "b")))
    difference_ND = _differences(batch_a, batch_b)
    whole = difference_ND if batch_a.shape else difference_ND[0]
    of_a, of_b, between = (nla.explain(side, **wished) for side in (a, b, whole))
    texts = [[e.text for e in _listed(side)] for side in (of_a, of_b)]
    told, cross_22 = _scored(nla, texts, (batch_a.vectors_ND, batch_b.vectors_ND))
    return Comparison(
        of_a,
        of_b,
        between,
        cross=cross_22,
        sentences=told,
        words=_words(*texts),
        cos=float(metrics.cosine(batch_a.vectors_ND, batch_b.vectors_ND).mean()),
        unit="fve_nrm" if nla.spec.var_nrm is not None else "cos",
    )


def _listed(explained: Explained) -> list[Explanation]:
    return [explained] if isinstance(explained, Explanation) else list(explained.flat)


def _sides(sides: Sequence[Any]) -> tuple[NLA, Any, Any]:
    if len(sides) == 3:
        nla, a, b = sides
        check_nla(nla)
        return nla, a, b
    if len(sides) != 2:
        raise NLAError(f"compare takes an NLA and two sides, found {len(sides)} arguments")
    for side in sides:
        if isinstance(side, ResidualTensor) and side.known_origin() is not None:
            for recording in side.origin.used():
                if isinstance(recording.nla, NLA):
                    return recording.nla, *sides
    raise NLAError(
        "whose NLA is to compare them is not known from these; say compare(nla, a, b), or attach "
        "one before the run"
    )


def _vectors(nla: NLA, side: Any, positions: Positions, model: Any) -> Any:
    """The vectors of a side, texts read by the source model."""
    if isinstance(side, Mapping):
        unknown = sorted(set(side) - {"text", "positions", "model"})
        if unknown or "text" not in side:
            raise NLAError(f"{_FORMS}; found the keys {sorted(side)!r:.80}")
        positions, model = side.get("positions", positions), side.get("model", model)
        side = side["text"]
        if not _is_text(side) and not _are_texts(side):
            raise NLAError(f"{_FORMS}; its text is {side!r:.80}")
    if not _is_text(side) and not _are_texts(side):
        return side
    place = nla.spec.place
    if place is None:
        raise NLAError("which layer to read is not known; pass layer= to from_pretrained")
    source = nla.open_source(model)
    prompts = [encode(source, text) for text in ([side] if _is_text(side) else side)]
    picked = [pick_positions(positions, len(ids)) for ids in prompts]
    read = read_prompts(source, prompts, picked, place)
    if not _is_text(side):
        return torch.cat(list(read))
    return read[0][0] if isinstance(positions, int) else read[0]


def _is_text(side: Any) -> bool:
    chat = isinstance(side, Sequence) and side and all(isinstance(turn, Mapping) for turn in side)
    return isinstance(side, str) or bool(chat)


def _are_texts(side: Any) -> bool:
    return isinstance(side, (list, tuple)) and bool(side) and all(map(_is_text, side))


def _checked(nla: NLA, side: Any, name: str) -> VectorBatch:
    try:
        batch = check_vectors(side, nla.spec.d_model)
    except NLAError as error:
        raise NLAError(f"{name}: {error}") from error
    if not len(batch):
        raise NLAError(f"{name} is empty: {_FORMS}")
    return batch


def _differences(a: VectorBatch, b: VectorBatch) -> Tensor:
    """`b - a`, `[n, d]`."""
    if a.shape != b.shape:
        raise NLAError(
            f"a has vectors of shape {a.shape}, b of {b.shape}; they are compared one by one"
        )
    difference_ND = b.vectors_ND - a.vectors_ND
    same = (~difference_ND.ne(0).any(-1)).nonzero()
    if len(same):
        raise NLAError(
            f"a and b are the same vector{f' in pair {int(same[0])}' if a.shape else ''}: there is "
            "nothing to compare"
        )
    return difference_ND


def _scored(
    nla: NLA, texts: Sequence[Sequence[str]], vectors: tuple[Tensor, Tensor]
) -> tuple[tuple[Separating, ...], Tensor]:
    """What each sentence does for both sides, and the crosswise scores."""
    parts = [[sentences(text) for text in side] for side in texts]
    cuts = [
        (side, pair, i)
        for side in (0, 1)
        for pair in range(len(texts[side]))
        for i in range(len(parts[side][pair]))
    ]
    without = [
        " ".join(parts[side][pair][:i] + parts[side][pair][i + 1 :]) for side, pair, i in cuts
    ]
    n = len(texts[0])
    pairs = [*range(n), *range(n), *(pair for _, pair, _ in cuts)]
    scores_N2 = _against_both(nla, [*texts[0], *texts[1], *without], pairs, vectors)
    cross_22 = torch.stack([scores_N2[:n].mean(0), scores_N2[n : 2 * n].mean(0)])
    told = []
    for (side, pair, i), left_2 in zip(cuts, scores_N2[2 * n :], strict=True):
        a, b = (scores_N2[side * n + pair] - left_2).tolist()
        told.append(Separating("ab"[side], parts[side][pair][i], a, b, pair))
    return tuple(sorted(told, key=lambda sentence: -abs(sentence.apart))), cross_22


def _against_both(
    nla: NLA, texts: Sequence[str], pairs: Sequence[int], vectors: tuple[Tensor, Tensor]
) -> Tensor:
    """`[N, 2]`: scores of texts against a's vector and b's of their pairs; each is made once."""
    said_ND, rows, found = Memory(nla.reconstruct)(texts), torch.tensor(pairs), []
    for vectors_ND in vectors:
        scores = metrics.score(
            said_ND,
            vectors_ND[rows],
            mse_scale=nla.spec.mse_scale,
            var_nrm=nla.spec.var_nrm,
            mean_D=None if nla.reconstructor is None else nla.reconstructor.mean_D,
        )
        found.append(scores.cos if scores.fve_nrm is None else scores.fve_nrm)
    return torch.stack(found, dim=1)


def _words(of_a: Sequence[str], of_b: Sequence[str]) -> tuple[Word, ...]:
    """Words by how much more often one side's texts have them."""
    shares = []
    for texts in (of_a, of_b):
        counts = Counter(word for text in texts for word in set(_WORD.findall(text.casefold())))
        shares.append({word: n / len(texts) for word, n in counts.items()})
    found = [
        Word(word, shares[0].get(word, 0.0), shares[1].get(word, 0.0))
        for word in sorted(shares[0].keys() | shares[1].keys())
    ]
    apart = [word for word in found if word.a != word.b]
    return tuple(sorted(apart, key=lambda word: -abs(word.apart)))
