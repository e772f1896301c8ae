"""`nla_lens.calibrate`: the probability that an explanation is right, from ones that are known."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from nla_lens.checks import check_seed
from nla_lens.disk.folder import scratch
from nla_lens.errors import NLAError
from nla_lens.evaluation import fitting
from nla_lens.evaluation.examine import examine
from nla_lens.evaluation.labels import QUOTES, Row, labels_of, told
from nla_lens.evaluation.reliability import measure, scores
from nla_lens.evaluation.table import columns_of, documents_of, read_table
from nla_lens.evaluation.taking import take
from nla_lens.jobs.manifest import versions
from nla_lens.nla import NLA
from nla_lens.results.calibration import Calibration
from nla_lens.results.evidence import FEATURES, SCORES, evidence
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations
from nla_lens.results.rows import to_explanation

_ALONE: Final = ("length", "cos", "fve_nrm")
"""Each of these is fitted by itself, to be seen beside the whole."""


def calibrate(
    nla_or_table: Any,
    texts: Any = None,
    *,
    labels: Any = QUOTES,
    path: str | Path | None = None,
    features: Sequence[str] | None = None,
    support: bool = False,
    model: Any = None,
    positions: Any = None,
    budget: int | None = None,
    context: Sequence[str] | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Calibration:
    """Learns how often explanations like one are right, from explanations of which that is known.

    What is reported (`.auroc`, `.ece`, `.brier`, risk and coverage) is measured on documents that
    the calibration had not seen, in turns; what is returned is fitted on all of them.

    >>> cal = nla_lens.calibrate(nla, texts)           # are quotations invented?
    >>> cal = nla_lens.calibrate(frame, labels="label", path="my-checkpoint")
    >>> nla.explain(vector).trust

    Args:
        nla_or_table: An NLA, which explains `texts` and has the calibration from then on; or a
            table of explanations (data frame, store, file, `Explanations`, list of dicts): `text`,
            a score (`fve_nrm`, `cos`, `mse_nrm` or `score`), and `document`, `context` and others
            where they are known. A table needs no weights.
        texts: With an NLA: as `explain_corpus` takes them.
        labels: Which explanations are right: the name of a column, or one value a row (true or 1:
            right, false or 0: wrong, None: not known); a function of a row (its fields, and
            `context`); or "quotes": one is right if all it quotes stands in the text read so far.
        path: Where `nla_calibration.json` is written: a checkpoint's folder, or a `.json` file.
            None: beside the checkpoint the NLA was loaded from, where that is a folder of yours;
            of embedded pairs and of what the hub keeps nothing is changed.
        features: Names of `results.evidence.FEATURES`; None: all that are known.
        support: Also test each sentence by leaving it out, as `examine` does: one more pass of the
            reconstructor a sentence. Explanations that were examined are then trusted by it, too.
        model: The source model; None: `spec.source_model`.
        positions: As in `explain_corpus`; None: at most 8 a document.
        budget: Most vectors.
        context: Of vectors: the text read up to each.
        store: A folder that keeps the explanations; the same call goes on with it.
        seed: Makes it repeatable.
        progress: As in `NLA.explain`.
        **options: Those of `NLA.explain`.

    Returns:
        The calibration; its repr says how good it is, and beside it length, cos and fve_nrm alone.

    Raises:
        NLAError: scikit-learn (extra `trust`) is missing; no labels, too few right or wrong ones,
            or no documents to hold out: what an NLA explained is then in `error.explanations`. If
            it cannot be written, `error.calibration` holds it.
    """
    fitting.import_sklearn()
    check_seed(seed)
    nla = nla_or_table if isinstance(nla_or_table, NLA) else None
    if nla is None:
        if texts is not None:
            raise NLAError("texts= are explained by an NLA; a table is calibrated alone")
        rows = _rows_of(nla_or_table)
    else:
        if texts is None:
            raise NLAError("calibrate needs texts= to explain, or a table instead of the NLA")
        if nla.reconstructor is None:
            raise NLAError("without a reconstructor there are no scores; load one with ar=")
        wishes = {"model": model, "positions": positions, "budget": budget, "context": context}
        wishes |= {"seed": seed, "progress": progress, "options": options}
        rows = _explained(nla, texts, store, support, wishes)
    try:
        right = labels_of(rows, labels)
        found = _fitted(rows, right, features, seed)
    except NLAError as error:
        if nla is not None:
            names = [f.name for f in fields(Explanation)]
            found_so_far = (Explanation(**{name: row[name] for name in names}) for row in rows)
            error.explanations = Explanations(found_so_far)
        raise
    found = replace(
        found,
        nla=None if nla is None else nla.identity(),
        fitted_on={**found.fitted_on, "labels": told(labels), "unlabelled": right.count(None)},
    )
    _keep(found, nla, path)
    return found


def _rows_of(table: Any) -> list[Row]:
    if isinstance(table, (str, os.PathLike)):
        table = read_table(table)
    if isinstance(table, Explanations):
        return [vars(explanation) for explanation in table.flat]
    columns = columns_of(table)
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    # A store's rows that could not be explained.
    return [row for row in rows if not isinstance(row.get("error"), str)]


def _explained(
    nla: NLA, texts: Any, store: Any, support: bool, wishes: Mapping[str, Any]
) -> list[Row]:
    with scratch() as folder:
        where = folder / "store" if store is None else store
        taken = take(nla, texts, where, score=True, **wishes)
    rows: list[Row] = []
    for i, row in enumerate(taken.rows):
        explanation = to_explanation(row)
        if support:
            vector_D = taken.sample.vectors_ND[i]
            explanation = examine(nla, explanation, vector=vector_D).explanation
        said = vars(explanation)
        rows.append({**row, **said, "context": taken.sample.contexts[i]})
    return rows


def _fitted(
    everything: Sequence[Row], right: Sequence[bool | None], features: Any, seed: int
) -> Calibration:
    known = [i for i, label in enumerate(right) if label is not None]
    rows, right_N = [everything[i] for i in known], np.asarray([bool(right[i]) for i in known])
    n_right = int(right_N.sum()) if len(rows) else 0
    if min(n_right, len(rows) - n_right) < fitting.LEAST_OF_EACH:
        raise NLAError(
            f"{n_right} explanations are right and {len(rows) - n_right} wrong; at least "
            f"{fitting.LEAST_OF_EACH} of each are needed to learn what tells them apart"
        )
    columns = _columns(rows, features)
    documents_N = documents_of(rows)
    whole = fitting.held_out(columns, right_N, documents_N, seed)
    alone = {
        name: scores(fitting.held_out({name: columns[name]}, right_N, documents_N, seed), right_N)
        for name in _ALONE
        if name in columns
    }
    made = fitting.fit(columns, right_N)
    if not set(made.features) & set(SCORES):
        raise NLAError("every explanation has the same score: it tells nothing apart")
    return replace(
        made,
        least=fitting.least_score(columns, right_N),
        fitted_on={
            "rows": len(rows),
            "documents": int(documents_N.max()) + 1,
            "wrong": float(1 - right_N.mean()),
            "without": [name for name in columns if name not in made.features],
            "seed": seed,
            "versions": {**versions(), "scikit-learn": version("scikit-learn")},
        },
        held_out={**measure(whole, right_N, documents_N, seed), "alone": alone},
    )


def _columns(rows: Sequence[Row], features: Sequence[str] | None) -> dict[str, Any]:
    names = list(FEATURES) if features is None else list(features)
    unknown = [name for name in names if name not in FEATURES]
    if unknown:
        raise NLAError(f"no feature {unknown[0]!r}; there are {', '.join(FEATURES)}")
    found = [evidence(row, names) for row in rows]
    columns = {name: np.asarray([f[name] for f in found], dtype=float) for name in names}
    columns = {name: c for name, c in columns.items() if not np.isnan(c).all()}
    there = [name for name in SCORES if name in columns]
    if not there:
        raise NLAError(f"none of {', '.join(SCORES)} is known of any explanation")
    if features is None and len(there) > 1:
        # The same as the others, said otherwise.
        columns.pop("mse_nrm", None)
    return columns


def _keep(found: Calibration, nla: NLA | None, path: str | Path | None) -> None:
    try:
        if nla is not None:
            nla.calibration = found
        where = path if path is not None or nla is None else nla.home
        if where is not None:
            found.save(where)
    except NLAError as error:
        error.calibration = found  # type: ignore[attr-defined]
        raise
