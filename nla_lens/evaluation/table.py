"""Evaluation of a table of explanations, without any weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from nla_lens.errors import NLAError
from nla_lens.evaluation.bootstrap import mean
from nla_lens.evaluation.measures.fidelity import missing
from nla_lens.evaluation.measures.wording import quotes_measure, shares_standing
from nla_lens.evaluation.report import Measure, Report, measured

_SCORES: Final = ("fve_nrm", "score", "cos", "mse_nrm")
_WITHOUT: Final = "a table has no weights to measure it with"


def columns_of(table: Any) -> dict[str, list[Any]]:
    """A table's columns: a data frame, a store, a dict of lists, or a list of dicts.

    Raises:
        NLAError: None of these, or no column `text`.
    """
    if hasattr(table, "to_pandas") and not hasattr(table, "columns"):
        table = table.to_pandas()
    if hasattr(table, "columns") and hasattr(table, "to_dict"):
        found = {str(name): table[name].tolist() for name in table.columns}
    elif isinstance(table, Mapping):
        found = {str(name): list(values) for name, values in table.items()}
    elif isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table):
        names = dict.fromkeys(name for row in table for name in row)
        found = {str(name): [row.get(name) for row in table] for name in names}
    else:
        raise NLAError(f"table= is a data frame, a store or a list of dicts; found {type(table)}")
    if "text" not in found:
        raise NLAError(f"the table has no column 'text'; it has {', '.join(found) or 'none'}")
    lengths = {len(values) for values in found.values()}
    if lengths == {0} or len(lengths) != 1:
        raise NLAError(
            f"the table's columns have {sorted(lengths)} rows; they need the same, not 0"
        )
    found["text"] = ["" if t is None or t != t else str(t) for t in found["text"]]
    return found


def score_column(columns: Mapping[str, Sequence[Any]]) -> str | None:
    """Which column holds fidelity: the first of `fve_nrm`, `score`, `cos`, `mse_nrm`."""
    return next(
        (n for n in _SCORES if any(v is not None and v == v for v in columns.get(n, ()))), None
    )


def evaluate_table(table: Any, names: Sequence[str], seed: int = 0) -> Report:
    """The rows that a table's columns allow; the others say what they lack.

    Args:
        table: Columns `text`, and `fve_nrm`, `cos`, `mse_nrm` or `score`; `context` and `document`
            where they are known.
        names: Which rows.
        seed: Makes it repeatable.
    """
    columns = columns_of(table)
    n = len(columns["text"])
    documents = np.unique([str(d) for d in columns.get("document", range(n))], return_inverse=True)[
        1
    ]
    taken = {"fve_nrm": _fidelity, "quotes": _quotes}
    rows = {
        name: taken[name](columns, documents, seed)
        if name in taken
        else missing(name, name, _WITHOUT)
        for name in names
    }
    return Report(rows, {"table": f"{n} rows", "documents": int(documents.max()) + 1})


def _fidelity(columns: Mapping[str, Sequence[Any]], documents: Any, seed: int) -> Measure:
    name = score_column(columns)
    title = "fidelity, as the table has it"
    if name is None:
        return missing("fve_nrm", title, f"the table has none of the columns {', '.join(_SCORES)}")
    values = np.asarray([np.nan if v is None else float(v) for v in columns[name]])
    found = mean(values, documents, seed=seed)
    if name != "fve_nrm":
        reason = f"it is {name}; without var_nrm no share of variance"
        return Measure("fve_nrm", title, found.value, found.low, found.high, found.n, reason=reason)
    return measured(
        "fve_nrm",
        title,
        found,
        control=0.0,
        control_name="the mean vector",
        holds=found.low > 0,
        reason="above the mean vector" if found.low > 0 else "no better than the mean",
        public="cards of released pairs: 0.752 to 0.80",
        median=float(np.nanmedian(values)),
        share_above_half=float(np.nanmean(values > 0.5)),
    )


def _quotes(columns: Mapping[str, Sequence[Any]], documents: Any, seed: int) -> Measure:
    title = "quotations that stand in the context"
    contexts = columns.get("context")
    if contexts is None:
        return missing("quotes", title, "the table has no column context")
    texts, read = list(columns["text"]), [None if c is None else str(c) for c in contexts]
    others = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    return quotes_measure(
        title,
        shares_standing(texts, read),
        shares_standing(others, read),
        lambda shares: mean(shares, documents, seed=seed),
    )
