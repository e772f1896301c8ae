"""Whether a text belongs to its own vector: retrieval, vagueness, and a linear read-out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_lens.evaluation.measures.fidelity import missing
from nla_lens.evaluation.report import Measure, measured
from nla_lens.evaluation.sample import Sample
from nla_lens.results.metrics import mse_nrm
from nla_lens.stream.injection import unit


def _fits(sample: Sample, said_ND: Tensor) -> Tensor:
    """`[n, n]` cosines: how well each text fits each vector."""
    return unit(said_ND) @ unit(sample.vectors_ND).T


def _ranks(fits_NN: Tensor) -> np.ndarray[Any, Any]:
    """How many vectors fit a text better than its own; half of those that fit as well."""
    own_N1 = fits_NN.diagonal()[:, None]
    better = (fits_NN > own_N1).sum(-1).double()
    equal = (fits_NN == own_N1).sum(-1).double() - 1
    return (better + equal / 2).numpy()


def retrieval(sample: Sample) -> Measure:
    """Row 5: AR(text) finds its own vector among n."""
    n = len(sample)
    title = f"its own vector is found among {n}"
    if n < 2:
        return missing("retrieval", title, "there is one vector only")
    fits = _fits(sample, sample.said_ND)
    ranks = _ranks(fits)
    found = sample.mean(ranks < 0.5)
    permuted = sample.mean(_ranks(_fits(sample, sample.back(sample.permuted_texts))) < 0.5)
    return measured(
        "retrieval",
        title,
        found,
        control=permuted,
        control_name=f"permuted texts; chance {1 / n:.3f}",
        holds=found.low > max(permuted.high, 1 / n),
        reason="far above chance" if found.low > 10 / n else "near chance",
        public="Phi-4, 1 in 50: 0.406; correct against one wrong vector: 0.82 to 0.84",
        top5=float((ranks < 4.5).mean()),
        mrr=float((1 / (ranks + 1)).mean()),
        chance=1 / n,
        hard=_hard(sample, fits),
        against_one=float(((n - 1 - ranks) / (n - 1)).mean()),
    )


def _hard(sample: Sample, fits: Tensor) -> dict[str, float | None]:
    """Against the other vectors of the same document, and against the nearest position alone."""
    own = fits.diagonal().numpy()
    all_fits = fits.numpy()
    within, beside = [], []
    for i in range(len(sample)):
        others = np.flatnonzero(sample.documents == sample.documents[i])
        others = others[others != i]
        if len(others):
            within.append(bool((all_fits[i, others] < own[i]).all()))
            away = np.abs(sample.positions[others] - sample.positions[i])
            beside.append(bool(all_fits[i, others[away.argmin()]] < own[i]))
    return {
        "same document": float(np.mean(within)) if within else None,
        "nearest position": float(np.mean(beside)) if beside else None,
    }


def vagueness(sample: Sample) -> Measure:
    """Row 13: how many vectors an explanation fits, among all."""
    n = len(sample)
    title = "share of vectors that fit a text better than its own"
    if n < 2:
        return missing("vagueness", title, "there is one vector only")
    ranks = _ranks(_fits(sample, sample.said_ND))
    found = sample.mean(ranks / (n - 1))
    permuted = sample.mean(_ranks(_fits(sample, sample.back(sample.permuted_texts))) / (n - 1))
    mean_D = unit(sample.vectors_ND).mean(0, keepdim=True)
    mean_mse = mse_nrm(mean_D.expand_as(sample.vectors_ND), sample.vectors_ND, sample.mse_scale)
    vague = [
        float((mse_nrm(s[None].expand_as(sample.vectors_ND), sample.vectors_ND, sample.mse_scale)
               < mean_mse).float().mean()) > 0.5
        for s in sample.said_ND
    ]  # fmt: skip
    return measured(
        "vagueness",
        title,
        found,
        control=permuted,
        control_name="permuted texts; chance 0.5",
        holds=found.high < permuted.low,
        reason="texts are about their own vectors"
        if found.high < 0.1
        else "texts fit many vectors",
        fit_more_than_half=float(np.mean(vague)),
    )


def ceiling(sample: Sample) -> Measure:
    """Row 4: the context found from the vector by a ridge, beside what the text finds.

    The embedding is that of latent semantic analysis (tf-idf, truncated SVD) of the contexts;
    documents are held out in turn.
    """
    title = "contexts found from the vector by a linear read-out"
    contexts = [c or "" for c in sample.contexts]
    documents = sample.documents
    n_documents = len(set(documents.tolist()))
    if not all(contexts):
        return missing("ceiling", title, "the texts read are not known; pass context=")
    if n_documents < 5 or len(sample) < 20:
        return missing("ceiling", title, "it needs at least 5 documents and 20 vectors")
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge
        from sklearn.model_selection import GroupKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer, StandardScaler
    except ImportError:
        return missing("ceiling", title, "scikit-learn is not installed (extra `trust`)")
    # The last words are what is found or not; whole contexts of one document are nearly the same.
    recent = [" ".join(c.split()[-12:]) for c in contexts]
    words = TfidfVectorizer(token_pattern=r"\S+")
    table = words.fit_transform(recent)
    width = max(2, min(64, table.shape[1] - 1, table.shape[0] - 1))
    embed = make_pipeline(TruncatedSVD(width, random_state=sample.seed), Normalizer())
    gold = embed.fit_transform(table)
    folds = GroupKFold(min(5, n_documents))
    vectors = sample.vectors_ND.numpy()
    predicted = cross_val_predict(
        make_pipeline(StandardScaler(), Ridge(10.0)), vectors, gold, groups=documents, cv=folds
    )
    said = embed.transform(words.transform(sample.texts))
    ranks = {
        name: _ranks(torch.from_numpy(np.asarray(_cosines(rows, gold))))
        for name, rows in (("vector", predicted), ("text", said))
    }
    found, text = sample.mean(ranks["vector"] < 0.5), sample.mean(ranks["text"] < 0.5)
    return measured(
        "ceiling",
        title,
        found,
        control=text,
        control_name="by the explanation's words",
        holds=text.high >= found.low,
        reason="the text says what is there to be read" if text.high >= found.low
        else "a linear read-out finds what the text does not say",
        public="Phi-4, 1 in 50: text 0.406, linear read-out 0.83",
        chance=1 / len(sample),
        vector_mrr=float((1 / (ranks["vector"] + 1)).mean()),
        text_mrr=float((1 / (ranks["text"] + 1)).mean()),
    )  # fmt: skip


def _cosines(a: Any, b: Any) -> Any:
    a = a / np.clip(np.linalg.norm(a, axis=1, keepdims=True), 1e-12, None)
    b = b / np.clip(np.linalg.norm(b, axis=1, keepdims=True), 1e-12, None)
    return a @ b.T
