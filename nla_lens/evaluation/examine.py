"""`nla_lens.examine`: one explanation, claim by claim.

A sentence is supported as far as the reconstruction gets worse without it; a quotation stands in
the text that was read, or does not; and further samples say it again, or do not. All of this is
fidelity to the vector, never truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.halves.options import Options
from nla_lens.nla import NLA
from nla_lens.results.claim import Claim
from nla_lens.results.display import to_html, to_table
from nla_lens.results.evidence import said_again
from nla_lens.results.explanation import Explanation
from nla_lens.results.metrics import score
from nla_lens.results.sentences import quoted_spans, quotes, sentences, stands_in
from nla_lens.stream.explainer import check_nla
from nla_lens.stream.extraction import encode, pick_positions, read_prompts
from nla_lens.stream.vectors import check_vectors

_MOST_SUPPORT_ROWS: Final = 64


@dataclass(frozen=True)
class Examination:
    """What an explanation claims, and what speaks for each claim.

    Attributes:
        explanation: The explanation, with its claims.
        samples: Further texts for the same vector.
        unit: What support is measured in: "fve_nrm", or "cos" where var_nrm is not known.
    """

    explanation: Explanation
    samples: tuple[str, ...] = ()
    unit: str = "fve_nrm"

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Sentences in order, each followed by the quotations in it."""
        return self.explanation.claims

    def __iter__(self) -> Iterator[Claim]:
        return iter(self.claims)

    def __repr__(self) -> str:
        lines = [f"Examination of {self.explanation!r}:", *(f"  {c!r}" for c in self.claims)]
        return "\n".join(lines)

    def to_table(self) -> Any:
        """A table for terminals."""
        return to_table(self.claims, title=self.explanation.text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**self.explanation.to_dict(), "unit": self.unit, "samples": list(self.samples)}

    def _repr_html_(self) -> str:
        return to_html(self.claims, whole_page=False)


def examine(
    nla: NLA,
    vector_or_explanation: Any,
    *,
    vector: Any = None,
    context: str | None = None,
    position: int = -1,
    model: Any = None,
    num_samples: int = 0,
    seed: int = 0,
    **options: Any,
) -> Examination:
    """Looks at an explanation claim by claim.

    Args:
        nla: The NLA, with a reconstructor.
        vector_or_explanation: A vector `[d]`, which is explained first; an explanation; or a text,
            which the source model reads.
        vector: Of an explanation: the vector it is of; without it there is no support.
        context: The text read up to the vector; None: that of a text is known, others' quotations
            are not looked up.
        position: Of a text: which token is explained.
        model: Of a text: the source model; None: the NLA's own.
        num_samples: How many further samples are asked whether they say the same.
        seed: Of these.
        **options: Those of `NLA.explain`.

    Returns:
        Claims: sentences and quotations with `support`, `in_context` and `agreement`; what could
        not be told is None.

    Raises:
        NLAError: No vector and no explanation, or no reconstructor.
    """
    check_nla(nla)
    if nla.reconstructor is None:
        raise NLAError("without a reconstructor no sentence can be tested; load one with ar=")
    if context is not None and not isinstance(context, str):
        raise NLAError(f"context={context!r:.80} must be the text read up to the vector")
    if not is_int(num_samples) or num_samples < 0:
        raise NLAError(f"num_samples={num_samples!r:.80} must be 0 or more")
    nla.check_options(Options.of({**options, "seed": seed}))
    if isinstance(vector_or_explanation, str):
        vector_or_explanation, read = _read(nla, vector_or_explanation, position, model)
        context = read if context is None else context
    if isinstance(vector_or_explanation, Explanation):
        explanation = vector_or_explanation
    else:
        vector = vector_or_explanation
        if check_vectors(vector, nla.spec.d_model).shape:
            raise NLAError("examine looks at one vector [d]; pick one position")
        explanation = nla.explain(vector, **options)  # type: ignore[assignment]
    vector_1D = None if vector is None else _one(nla, vector)
    samples = _samples(nla, vector_1D, num_samples, seed, options)
    claims = tuple(_claims(nla, explanation.text, vector_1D, context, samples))
    unit = "fve_nrm" if nla.spec.var_nrm is not None else "cos"
    examined = explanation.with_claims(claims)
    if nla.calibration is not None:
        # It may look at the support of sentences, which is known only now.
        examined = replace(examined, trust=nla.calibration.trust(examined))
    return Examination(examined, samples, unit)


def _read(nla: NLA, text: str, position: int, model: Any) -> tuple[Tensor, str]:
    """The vector at a position of a text, and the text up to it."""
    place = nla.spec.place
    if place is None:
        raise NLAError("which layer to read is not known; pass layer= to from_pretrained")
    source = nla.open_source(model)
    ids = encode(source, text)
    picked = pick_positions([position], len(ids))
    (resid_1D,) = read_prompts(source, [ids], [picked], place)
    context = source.tokenizer.decode(ids[: picked[0] + 1], skip_special_tokens=True)
    return resid_1D[0], context


def _one(nla: NLA, vector: Any) -> Tensor:
    batch = check_vectors(vector, nla.spec.d_model)
    if len(batch) != 1:
        raise NLAError(f"examine looks at one vector [d], found {len(batch)}; pick one position")
    return batch.vectors_ND


def _samples(
    nla: NLA, vector_1D: Tensor | None, n: int, seed: int, options: dict[str, Any]
) -> tuple[str, ...]:
    if n == 0 or vector_1D is None:
        return ()
    wished = {**options, "temperature": 1.0, "seed": seed, "score": False, "progress": False}
    return tuple(e.text for e in nla.explain_iter(vector_1D.expand(n, -1), **wished))


def _claims(
    nla: NLA, text: str, vector_1D: Tensor | None, context: str | None, samples: Sequence[str]
) -> Iterator[Claim]:
    """Each sentence and its quotations."""
    parts = sentences(text)
    cuts: list[tuple[Claim, str]] = []
    for i, sentence in enumerate(parts):
        without = " ".join(parts[:i] + parts[i + 1 :])
        cuts.append((Claim(sentence, "sentence"), without))
        for (start, end), quoted in zip(quoted_spans(sentence), quotes(sentence), strict=False):
            blanked = f"{sentence[: start + 1]}{sentence[end - 1 :]}"
            cuts.append((Claim(quoted, "quote"), " ".join([*parts[:i], blanked, *parts[i + 1 :]])))
    falls = _falls(nla, text, [without for _, without in cuts], vector_1D)
    for (claim, _), fall in zip(cuts, falls, strict=True):
        yield Claim(
            claim.text,
            claim.kind,
            support=fall,
            in_context=_in_context(claim, context),
            agreement=_agreement(claim, samples),
        )


def _falls(
    nla: NLA, text: str, without: Sequence[str], vector_1D: Tensor | None
) -> list[float | None]:
    """How much fidelity each text lacks, beside the whole one."""
    if vector_1D is None or not without:
        return [None] * len(without)
    said_ND = nla.reconstruct([text, *without])
    scores = score(
        said_ND,
        vector_1D.expand(len(said_ND), -1),
        mse_scale=nla.spec.mse_scale,
        var_nrm=nla.spec.var_nrm,
        mean_D=None if nla.reconstructor is None else nla.reconstructor.mean_D,
    )
    values = scores.cos if scores.fve_nrm is None else scores.fve_nrm
    return [float(values[0] - value) for value in values[1:]]


def _in_context(claim: Claim, context: str | None) -> bool | None:
    if context is None or claim.kind != "quote":
        return None
    return stands_in(claim.text, context)


def _agreement(claim: Claim, samples: Sequence[str]) -> float | None:
    """How far samples say it too: a quotation word by word, a sentence by its words."""
    if not samples:
        return None
    if claim.kind == "quote":
        return sum(stands_in(claim.text, sample) for sample in samples) / len(samples)
    return said_again(claim.text, samples)
