"""Does the injection work? A wrong one still writes fluent text, so it is tested, not read.

When a vector does not reach the model, the model reads the marker character itself: every vector
gets the same text, and that text tends to be Chinese, or English about a Chinese character.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from nla_lens.checkpoints.open_block import open_block_in, warning
from nla_lens.cli.output import Finding
from nla_lens.results.explanation import Explanation
from nla_lens.results.flags import is_cjk, is_injection_suspect
from nla_lens.stream.injection import rescale, unit

if TYPE_CHECKING:
    from nla_lens.nla import NLA

_N_VECTORS: Final = 8
_MAX_NEW_TOKENS: Final = 64
_OPTIONS: Final[dict[str, Any]] = {"max_new_tokens": _MAX_NEW_TOKENS, "progress": False}


def check_injection(nla: NLA, *, n_vectors: int = _N_VECTORS, seed: int = 0) -> list[Finding]:
    """Injects vectors and looks at what comes out.

    Args:
        nla: The NLA.
        n_vectors: How many are tried.
        seed: Makes the vectors repeatable.

    Returns:
        The findings, each passed or not.
    """
    vectors_ND = _likely_vectors(nla, n_vectors, seed)
    explained = list(nla.explain_iter(vectors_ND, score=False, **_OPTIONS))
    texts = [e.text for e in explained]
    again = nla.encode(vectors_ND, **_OPTIONS)
    alone = nla.encode(vectors_ND[:1], **_OPTIONS)[0]
    findings = [
        _depends(texts),
        _repeatable(texts, again, alone),
        _not_the_marker(nla, explained),
        _not_cjk(texts),
        _outside_thought(nla),
    ]
    if nla.spec.injection == "replace":
        findings.insert(0, _embedding(nla, vectors_ND))
    if nla.reconstructor is not None:
        findings.append(_leads_back(nla, texts, vectors_ND))
    return findings


def _likely_vectors(nla: NLA, n: int, seed: int) -> Tensor:
    """Vectors like those the verbalizer was trained on, as far as a reconstructor can tell.

    Random directions are far from any residual stream, and may well all be read as the same. What
    the verbalizer says of them at temperature 1 is varied text of its own kind, and the
    reconstructor turns that into vectors.
    """
    random_ND = torch.randn(n, nla.spec.d_model, generator=torch.Generator().manual_seed(seed))
    if nla.reconstructor is None:
        return rescale(random_ND, nla.spec.usual_norm or nla.spec.d_model**0.5)
    return nla.reconstruct(nla.encode(random_ND, temperature=1.0, seed=seed, **_OPTIONS))


def _embedding(nla: NLA, vectors_ND: Tensor) -> Finding:
    """The injected row holds the rescaled vector, and every other row the prompt's own."""
    verbalizer, spec = nla.verbalizer, nla.spec
    embeds_NTD = verbalizer.prompt_embeds(vectors_ND)
    at = verbalizer.marker_position
    norms_N = embeds_NTD[:, at].norm(dim=-1)
    cos_N = torch.cosine_similarity(embeds_NTD[:, at], vectors_ND, dim=-1)
    plain_TD = verbalizer.engine.embed(verbalizer.prompt_ids)
    others = [i for i in range(len(plain_TD)) if i != at]
    held = (
        bool((cos_N > 0.9999).all())
        and bool(((norms_N / (spec.injection_scale or 1.0) - 1).abs() < 1e-3).all())
        and torch.equal(embeds_NTD[0, others], plain_TD[others])
    )
    detail = f"row {at} has norm {norms_N.mean():.4g} (injection_scale {spec.injection_scale})"
    return Finding(
        "the marker's embedding is the rescaled vector, the others untouched", held, detail
    )


def _depends(texts: list[str]) -> Finding:
    different = len(set(texts))
    return Finding(
        "texts depend on the vector",
        different > len(texts) // 2,
        f"{different} different texts for {len(texts)} vectors",
    )


def _repeatable(texts: list[str], again: list[str], alone: str) -> Finding:
    """Alone and in a batch only float32 promises the same text, so that is told and not judged."""
    batch = "as in the batch" if alone == texts[0] else "unlike in the batch (rounding)"
    return Finding(
        "the same vectors get the same texts again",
        again == texts,
        f"{sum(a == b for a, b in zip(texts, again, strict=True))} of {len(texts)}; alone {batch}",
    )


def _not_the_marker(nla: NLA, explained: list[Explanation]) -> Finding:
    """No text is the one the model writes when the marker's own embedding is left in place."""
    own = nla.verbalizer.marker_reading(_MAX_NEW_TOKENS)
    same = sum(e.text == own for e in explained)
    about = sum(is_injection_suspect(e, nla.spec) for e in explained)
    return Finding(
        "the marker's own reading does not come out",
        2 * same <= len(explained) and 2 * about <= len(explained),
        f"{same} texts equal it, {about} are about the character; left alone it reads {own[:60]!r}",
    )


def _not_cjk(texts: list[str]) -> Finding:
    cjk = sum(map(is_cjk, texts))
    return Finding(
        "texts are not all Chinese, Japanese or Korean (the symptom of a failed injection)",
        cjk < len(texts) / 2,
        f"{cjk} of {len(texts)} are",
    )


def _outside_thought(nla: NLA) -> Finding:
    """The chat template leaves the assistant to answer, and not to think."""
    verbalizer = nla.verbalizer
    rendered = verbalizer.tokenizer.decode(verbalizer.prompt_ids, skip_special_tokens=False)
    tag = open_block_in(nla.spec, rendered, verbalizer.tokenizer.chat_template)
    options = dict(nla.spec.chat_template_kwargs)
    detail = f"chat_template_kwargs {options}" if options else "nothing is opened behind the turn"
    name = "the prompt does not end inside a block of thought"
    return Finding(name, tag is None, detail if tag is None else warning(tag))


def _leads_back(nla: NLA, texts: list[str], vectors_ND: Tensor) -> Finding:
    """From its text alone, a vector is found among the others."""
    cos_NN = unit(nla.reconstruct(texts)) @ unit(vectors_ND).T
    found = int((cos_NN.argmax(-1) == torch.arange(len(texts))).sum())
    return Finding(
        "share of texts that lead back to their own vector (how good, not whether it is injected)",
        None,
        f"{found} of {len(texts)} are found among the others",
    )
