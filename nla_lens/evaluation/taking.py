"""Gathers what is evaluated: vectors of texts and what an NLA says of them, through a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from nla_lens.checks import is_int, is_missing, plain
from nla_lens.errors import NLAError
from nla_lens.evaluation.sample import Memory, Sample
from nla_lens.jobs.job import Job
from nla_lens.jobs.manifest import about_job
from nla_lens.jobs.plan import Prepared
from nla_lens.jobs.running import run_job
from nla_lens.nla import NLA
from nla_lens.results.store import Store

_PER_DOCUMENT: Final = 8


@dataclass
class Taken:
    """A sample, and the texts and model it came from.

    Attributes:
        sample: Vectors and explanations.
        job: The job that made them.
        rows: `[n]`: what the store holds of each.
        prompts: `[n]`: ids of each vector's text; empty where vectors were given.
        n_failed: Rows that could not be explained, which are left out.
    """

    sample: Sample
    job: Job
    rows: list[dict[str, Any]]
    prompts: list[Sequence[int]]
    n_failed: int


def take(
    nla: NLA,
    texts: Any,
    store: str | Path,
    *,
    model: Any = None,
    positions: Any = None,
    budget: int | None = None,
    context: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    score: bool = False,
    options: Mapping[str, Any],
) -> Taken:
    """Explains what is to be evaluated; a store that is there already is gone on with.

    Args:
        nla: The NLA.
        texts: As `explain_corpus` takes them.
        store: Where the explanations go.
        model: The source model.
        positions: As in `explain_corpus`; None: at most 8 a document, evenly, from the first
            position the NLA was trained on.
        budget: Most vectors.
        context: Of vectors: the text read up to each.
        seed: Makes it repeatable.
        progress: As in `NLA.explain`.
        score: Whether the rows are to hold scores; measures reconstruct for themselves.
        options: Those of `NLA.explain`.
    """
    if budget is not None and not (is_int(budget) and budget > 0):
        raise NLAError(f"budget={budget!r:.80} must be a positive number of vectors")
    if context is not None and not _are_texts(context):
        raise NLAError(
            f"context={context!r:.80} must be a list: the text read up to each vector, or None "
            "where it is not known"
        )
    if positions is None:
        positions = [f"from:{nla.spec.min_position}", f"spread:{_PER_DOCUMENT}"]
    context = None if context is None else list(plain(context))
    wished = {**options, "score": score}
    job = Job.of(
        nla,
        texts,
        positions=positions,
        model=model,
        options=wished,
        vectors=True,
        progress=progress,
    )
    if budget is not None:
        job = job.within(budget)
    found = run_job(job, store, about_job(job, positions, None, model), progress)
    return _taken(nla, job, found, context, seed)


def _are_texts(context: Any) -> bool:
    listed = plain(context)
    return isinstance(listed, (list, tuple)) and all(
        isinstance(c, str) or is_missing(c) for c in listed
    )


def _taken(nla: NLA, job: Job, store: Store, context: Sequence[str] | None, seed: int) -> Taken:
    everything, vectors = store.rows(), store.vectors()
    kept = [i for i, row in enumerate(everything) if row["error"] is None]
    if not kept:
        raise NLAError("none of the rows could be explained, so there is nothing to evaluate")
    rows = [everything[i] for i in kept]
    if context is not None and len(context) != len(everything):
        raise NLAError(f"context= has {len(context)} texts for {len(everything)} vectors")
    prepared: dict[int, Prepared] = {}
    for row in rows:
        if row["document"] not in prepared:
            prepared[row["document"]] = job.reader.prepare(job.reader.corpus[row["document"]])
    prompts = [prepared[row["document"]].ids for row in rows]
    sample = Sample(
        vectors_ND=vectors[torch.tensor(kept)],
        texts=[row["text"] for row in rows],
        documents=np.asarray([row["document"] for row in rows]),
        positions=np.asarray([-1 if row["position"] is None else row["position"] for row in rows]),
        tokens=[row["token"] for row in rows],
        contexts=[
            (None if is_missing(context[i]) else context[i])
            if context is not None
            else job.reader.read_so_far(ids, row["position"])
            for i, ids, row in zip(kept, prompts, rows, strict=True)
        ],
        mse_scale=nla.spec.mse_scale,
        var_nrm=nla.spec.var_nrm,
        reconstruct=None if nla.reconstructor is None else Memory(nla.reconstruct),
        seed=seed,
    )
    return Taken(sample, job, rows, list(prompts), len(everything) - len(kept))
