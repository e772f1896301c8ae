"""`nla_lens.evaluate`: every measure with its control, cheap ones first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from nla_lens.checks import check_seed
from nla_lens.disk.folder import scratch
from nla_lens.errors import NLAError
from nla_lens.evaluation.measures import fidelity, identity, wording
from nla_lens.evaluation.measures.costly import COSTLY
from nla_lens.evaluation.report import Measure, Report
from nla_lens.evaluation.sample import Sample
from nla_lens.evaluation.table import evaluate_table
from nla_lens.evaluation.taking import take
from nla_lens.stream.explainer import check_nla

_CHEAP: Final[dict[str, Callable[[Sample], Measure]]] = {
    "fve_nrm": fidelity.fve_nrm,
    "magnitude": fidelity.magnitude,
    "floor_empty": fidelity.floor_empty,
    "floor_constant": fidelity.floor_constant,
    "floor_permuted": fidelity.floor_permuted,
    "floor_last_token": fidelity.floor_last_token,
    "floor_neighbour": fidelity.floor_neighbour,
    "retrieval": identity.retrieval,
    "vagueness": identity.vagueness,
    "quotes": wording.quotations,
    "ceiling": identity.ceiling,
    "surgery": wording.surgery,
    "support": wording.support,
}
"""They need the explanations and the reconstructor."""
ROWS: Final = (
    *_CHEAP,
    *COSTLY,
)
"""The names of rows, in the order in which they are taken."""


def evaluate(
    nla: Any = None,
    texts: Any = None,
    *,
    table: Any = None,
    model: Any = None,
    positions: Any = None,
    rows: Sequence[str] | None = None,
    budget: int | None = None,
    context: Sequence[str] | None = None,
    dictionary: Any = None,
    critic: Any = None,
    drift: Any = None,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Measures an NLA so that generic text cannot pass: each measure with its control.

    Definitions are in the documentation of trust; intervals are bootstraps over documents. Nothing
    is left out silently: a row that could not be measured says why.

    Args:
        nla: The NLA; None with `table=`.
        texts: As `explain_corpus` takes them: texts, chats, files, or vectors.
        table: Instead of both: a data frame (or store, file, or list of dicts) of explanations,
            columns `text` and a score; `vector`, `context` and `document` where known.
        model: The source model; None: `spec.source_model`.
        positions: As in `explain_corpus`; None: at most 8 a document.
        rows: Names of rows (`evaluation.evaluate.ROWS`); None: all.
        budget: Most vectors.
        context: Of vectors: the text read up to each.
        dictionary: A sparse dictionary to be spliced in beside the NLA.
        critic: Another NLA, or reconstructor, trained apart: scores the same texts.
        drift: A fine-tuned source: the same measures on its residuals.
        store: A folder that keeps the explanations; the same call goes on with it.
        seed: Makes it repeatable.
        progress: As in `NLA.explain`.
        **options: Those of `NLA.explain`.

    Returns:
        The report: `report["fve_nrm"].value`, `.low`, `.high`, `.control`, `.verdict`.

    Raises:
        NLAError: Nothing to evaluate, no such row, or as `explain_corpus`.
    """
    names = _names(rows)
    check_seed(seed)
    if table is not None:
        if nla is not None or texts is not None:
            raise NLAError("table= is evaluated without an NLA; pass it alone")
        return evaluate_table(table, names, seed)
    if nla is None or texts is None:
        raise NLAError("evaluate needs an NLA and texts, or table= alone")
    check_nla(nla)
    if nla.reconstructor is None:
        raise NLAError("without a reconstructor nothing can be measured; load one with ar=")
    _check_tools(critic, dictionary)
    wishes = {"model": model, "positions": positions, "budget": budget, "seed": seed}
    with scratch() as folder:
        taken = take(
            nla,
            texts,
            folder / "store" if store is None else store,
            context=context,
            progress=progress,
            options=options,
            **wishes,
        )
    measures: dict[str, Measure] = {}
    tools = {
        "critic": critic,
        "drift": drift,
        "dictionary": dictionary,
        "options": options,
        "texts": texts,
        "taken": measures,
        **wishes,
    }
    for name in names:
        measures[name] = (
            _CHEAP[name](taken.sample) if name in _CHEAP else COSTLY[name](nla, taken, tools)
        )
    n_documents = len(set(taken.sample.documents.tolist()))
    about = {
        "source": nla.spec.source_model and Path(nla.spec.source_model).name,
        "read at": nla.spec.hook_name,
        "vectors": len(taken.sample),
        "documents": n_documents,
        "failed": taken.n_failed or None,
        "reconstructed": len(taken.sample.reconstruct or ()),
    }
    return Report(measures, about)


def _check_tools(critic: Any, dictionary: Any) -> None:
    """Looks at what is only needed when everything is explained.

    Raises:
        NLAError: It cannot do what it is there for.
    """
    needed = {
        "critic": (critic, ("reconstruct",)),
        "dictionary": (dictionary, ("encode", "decode")),
    }
    for name, (given, verbs) in needed.items():
        lacking = [verb for verb in verbs if not callable(getattr(given, verb, None))]
        if given is not None and lacking:
            raise NLAError(f"{name}={given!r:.80} has no {lacking[0]}; pass one that is loaded")
    if getattr(critic, "reconstructor", critic) is None and critic is not None:
        raise NLAError("critic= has no reconstructor; load one with ar=")


def _names(rows: Sequence[str] | None) -> list[str]:
    if rows is None:
        return list(ROWS)
    wanted = [rows] if isinstance(rows, str) else list(rows)
    unknown = [name for name in wanted if name not in ROWS]
    if unknown or not wanted:
        raise NLAError(f"rows={wanted!r}: no row {unknown[:1]}; there are {', '.join(ROWS)}")
    return [name for name in ROWS if name in wanted]
