"""Evaluation of a table of explanations, without any weights."""

from __future__ import annotations

import contextlib
import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from nla_lens.checks import is_missing, is_number, naming, to_path
from nla_lens.errors import NLAError
from nla_lens.evaluation.bootstrap import mean
from nla_lens.evaluation.measures.fidelity import missing
from nla_lens.evaluation.measures.identity import ceiling
from nla_lens.evaluation.measures.wording import quotes_measure, shares_standing
from nla_lens.evaluation.report import Measure, Report, measured
from nla_lens.evaluation.sample import Sample
from nla_lens.jobs.files import read_records
from nla_lens.results.explanations import Explanations
from nla_lens.results.store import open_store
from nla_lens.stream.vectors import check_vectors

_SCORES: Final = ("fve_nrm", "score", "cos", "mse_nrm")
_NUMBERS: Final = {*_SCORES, "norm", "position"}
_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_WITHOUT: Final = "a table has no weights to measure it with"


def read_table(path: str | os.PathLike[str]) -> Any:
    """A store, what `Explanations.save` wrote, or rows of parquet, JSON lines or CSV.

    Raises:
        NLAError: It cannot be read.
    """
    path = to_path(path)
    if path.is_dir():
        return open_store(path)
    if not path.is_file():
        raise NLAError(f"{path}: there is no such file")
    if path.suffix in _DELIMITERS:
        return _read_csv(path)
    rows = read_records(path)
    is_ours = bool(rows) and rows[0].get("format") == Explanations.LINES.name
    return Explanations.load(path) if is_ours else rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of texts; what is empty is not known."""
    try:
        # utf-8-sig: spreadsheets write a BOM.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=_DELIMITERS[path.suffix], strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise NLAError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise NLAError(f"{path}, row {number} has not as many values as there are columns")
    return [{name: value or None for name, value in row.items()} for row in rows]


def columns_of(table: Any) -> dict[str, list[Any]]:
    """A table's columns: a data frame, a store, a file, a dict of lists, or a list of dicts.

    What is not known is None, whatever the table has for it; scores, norms and positions are
    numbers.

    Raises:
        NLAError: None of these, no column `text`, or a score that is none; names the row.
    """
    if isinstance(table, (str, os.PathLike)):
        table = read_table(table)
    found = _columns(table)
    if "text" not in found:
        raise NLAError(f"the table has no column 'text'; it has {', '.join(found) or 'none'}")
    lengths = {len(values) for values in found.values()}
    if lengths == {0} or len(lengths) != 1:
        raise NLAError(
            f"the table's columns have {sorted(lengths)} rows; they need the same, not 0"
        )
    found = {
        name: [None if is_missing(value) else value for value in values]
        for name, values in found.items()
    }
    for name in _NUMBERS & set(found):
        found[name] = [_number(name, i, value) for i, value in enumerate(found[name])]
    found["text"] = ["" if t is None else str(t) for t in found["text"]]
    return found


def _columns(table: Any) -> dict[str, list[Any]]:
    if hasattr(table, "to_pandas") and not hasattr(table, "columns"):
        table = table.to_pandas()
    if hasattr(table, "columns") and hasattr(table, "column_names"):
        # Arrow's tables and batches, and what `datasets` makes of them.
        names, values = list(table.column_names), [list(table[n]) for n in table.column_names]
    elif hasattr(table, "columns") and hasattr(table, "to_dict"):
        names = list(table.columns)
        values = [list(table[name]) for name in names] if len(set(names)) == len(names) else []
    elif isinstance(table, Mapping):
        names, values = list(table), [_listed(name, column) for name, column in table.items()]
    elif isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table):
        names = list(dict.fromkeys(name for row in table for name in row))
        values = [[row.get(name) for row in table] for name in names]
    else:
        raise NLAError(
            "a table is a data frame, a store, a file or a list of dicts; found "
            f"{table!r:.80} ({type(table).__name__})"
        )
    texts = list(map(str, names))
    twice = next((name for name in texts if texts.count(name) > 1), None)
    if twice is not None:
        raise NLAError(f"the table has several columns {twice!r:.80}; keep one")
    return {
        name: [v.as_py() if hasattr(v, "as_py") else v for v in column]
        for name, column in zip(texts, values, strict=True)
    }


def _listed(name: Any, column: Any) -> list[Any]:
    if isinstance(column, (str, bytes)) or not isinstance(column, Iterable):
        raise NLAError(f"column {name!r:.80} of the table is {column!r:.80}; expected a list")
    return list(column)


def _number(name: str, row: int, value: Any) -> float | None:
    """A number, as files without types also have it."""
    if value is None:
        return None
    number = math.nan
    if is_number(value) or isinstance(value, str):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise NLAError(
            f"{name} of row {row} is {value!r:.80}; expected a finite number, or nothing"
        )
    return number


def documents_of(rows: Iterable[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
    """`[n]`: the number of each row's document; one that names none is a document of its own."""
    named = [
        f"row {i}" if is_missing(found := row.get("document")) else f"document {found}"
        for i, row in enumerate(rows)
    ]
    return np.asarray(np.unique(named, return_inverse=True)[1])


def score_column(columns: Mapping[str, Sequence[Any]]) -> str | None:
    """Which column holds fidelity: the first of `fve_nrm`, `score`, `cos`, `mse_nrm`."""
    return next((n for n in _SCORES if any(v is not None for v in columns.get(n, ()))), None)


def evaluate_table(table: Any, names: Sequence[str], seed: int = 0) -> Report:
    """The rows that a table's columns allow; the others say what they lack.

    Args:
        table: Columns `text`, and `fve_nrm`, `cos`, `mse_nrm` or `score`; `vector`, `context` and
            `document` where they are known.
        names: Which rows.
        seed: Makes it repeatable.
    """
    columns = columns_of(table)
    n = len(columns["text"])
    documents = documents_of({"document": d} for d in columns.get("document", [None] * n))
    taken = {"fve_nrm": _fidelity, "quotes": _quotes, "ceiling": _ceiling}
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
    if not any(c is not None for c in contexts):
        return missing("quotes", title, "the table's column context is empty")
    texts, read = list(columns["text"]), [None if c is None else str(c) for c in contexts]
    others = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    return quotes_measure(
        title,
        shares_standing(texts, read),
        shares_standing(others, read),
        lambda shares: mean(shares, documents, seed=seed),
    )


def _ceiling(columns: Mapping[str, Sequence[Any]], documents: Any, seed: int) -> Measure:
    title, vectors = "contexts found from the vector", columns.get("vector")
    if vectors is None or "context" not in columns:
        return missing("ceiling", title, "the table has not both columns vector and context")
    if any(v is None for v in vectors):
        return missing("ceiling", title, "not every row of the table has a vector")
    with naming("column vector"):
        vectors_ND = check_vectors(list(vectors), _width(vectors[0])).vectors_ND
    n = len(vectors)
    return ceiling(
        Sample(
            vectors_ND=vectors_ND,
            texts=list(columns["text"]),
            documents=documents,
            positions=np.full(n, -1),
            tokens=[None] * n,
            contexts=[None if c is None else str(c) for c in columns["context"]],
            mse_scale=None,
            var_nrm=None,
            seed=seed,
        )
    )


def _width(vector: Any) -> int:
    return len(vector) if hasattr(vector, "__len__") else 0
