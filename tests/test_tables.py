"""Tables of explanations as people have them: any container, with gaps, of what is no number."""

from __future__ import annotations

import csv
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_lens import NLAError, calibrate, evaluate
from nla_lens.results.evidence import evidence

N = 24


def rows() -> list[dict[str, Any]]:
    """Of every third the quotation stands in the context; two rows a document."""
    rng = np.random.default_rng(0)
    return [
        {
            "text": f'It ends with "word{i:02}".',
            "fve_nrm": float(rng.uniform(-0.2, 1.0)),
            "context": f"a word{i:02}!" if i % 3 == 0 else "nothing",
            "document": i // 2,
        }
        for i in range(N)
    ]


MEAN = math.fsum(row["fve_nrm"] for row in rows()) / N


def _as(kind: str, folder: Path) -> Any:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    given = rows()
    frame = pandas.DataFrame(given)
    if kind == "frame of nullable columns":
        return frame.convert_dtypes()
    if kind == "frame of texts":
        return frame.astype(str)
    if kind == "frame of Arrow":
        return frame.convert_dtypes(dtype_backend="pyarrow")
    if kind == "Arrow table":
        return arrow.Table.from_pylist(given)
    if kind == "Arrow batch":
        return arrow.RecordBatch.from_pylist(given)
    if kind == "arrays":
        return {name: frame[name].to_numpy() for name in frame}
    path = folder / f"t.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            out = csv.DictWriter(file, list(given[0]), delimiter="\t" if kind == "tsv" else ",")
            out.writeheader()
            out.writerows(given)
        return str(path)
    return path


KINDS = [
    "frame of nullable columns", "frame of texts", "frame of Arrow", "Arrow table", "Arrow batch",
    "arrays", "parquet", "jsonl", "csv", "tsv",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_from_any_table(kind: str, tmp_path: Path) -> None:
    found = evaluate(table=_as(kind, tmp_path), rows=["fve_nrm", "quotes"])
    assert found["fve_nrm"].value == pytest.approx(MEAN, abs=1e-12)
    assert found["quotes"].value == pytest.approx(1 / 3, abs=1e-12)
    assert found.about["documents"] == N // 2


def _gaps(name: str) -> list[Any]:
    pandas = pytest.importorskip("pandas")
    return [None, math.nan, pandas.NA, pandas.NaT, np.float32("nan")]


def test_what_is_not_known_is_left_out_and_never_read_as_a_text() -> None:
    for gap in _gaps("context"):
        given = rows()
        # The text quotes what a gap is called: nothing may be found in it.
        given[0] |= {"context": gap, "text": f'It says "{gap}".', "fve_nrm": gap, "document": gap}
        given[1]["document"] = gap
        found = evaluate(table=given, rows=["fve_nrm", "quotes"])
        rest = [row["fve_nrm"] for row in rows()[1:]]
        assert found["fve_nrm"].value == pytest.approx(math.fsum(rest) / len(rest), abs=1e-12)
        assert found["quotes"].value == pytest.approx((N / 3 - 1) / (N - 1), abs=1e-12)
        # Two of the rows name no document, and are none together.
        assert found.about["documents"] == N // 2 + 1
    empty = evaluate(table=[{**row, "context": None} for row in rows()], rows=["quotes"])
    assert "is empty" in empty["quotes"].reason


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("fve_nrm", "good", "fve_nrm of row 3 is 'good'"),
        ("fve_nrm", [0.5], r"row 3 is \[0.5\]"),
        ("fve_nrm", True, "row 3 is True"),
        ("fve_nrm", math.inf, "row 3 is inf"),
    ],
)
def test_what_is_no_score_is_named(name: str, value: Any, said: str) -> None:
    given = rows()
    given[3][name] = value
    with pytest.raises(NLAError, match=said):
        evaluate(table=given)
    with pytest.raises(NLAError, match=said):
        calibrate([{**row, "label": i % 2} for i, row in enumerate(given)], labels="label")


def test_what_is_no_table(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows())
    (tmp_path / "short.csv").write_text("text,fve_nrm\na,0.5\nb\n", encoding="utf-8")
    for given, said in [
        (pandas.concat([frame, frame[["text"]]], axis=1), "several columns 'text'"),
        ({"text": ["a"], "score": 0.5}, "column 'score' of the table is 0.5"),
        ({"text": "ab", "score": [0.5, 0.5]}, "column 'text'"),
        (tmp_path / "none.csv", "there is no such file"),
        (tmp_path / "short.csv", "row 2 has not as many values"),
        (iter(rows()), "data frame"),
    ]:
        with pytest.raises(NLAError, match=said):
            evaluate(table=given)
    for seed in (-1, 1.5, "a", 2**32):
        with pytest.raises(NLAError, match="seed="):
            evaluate(table=frame, seed=seed)
        with pytest.raises(NLAError, match="seed="):
            calibrate(frame, labels=[True] * N, seed=seed)


def test_vectors_and_contexts_need_no_weights_for_the_ceiling() -> None:
    """The vector is the context's place in a code of its words: a read-out must find it."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(1)
    codes = rng.normal(size=(10, 16))
    given = []
    for i, words in enumerate(rng.permutation(list(combinations(range(10), 3)))):
        said = " ".join(f"w{w}" for w in words)
        vector = codes[words].sum(0).tolist()
        given.append({"text": "none", "vector": vector, "context": said, "document": i // 4})
    found = evaluate(table=given, rows=["ceiling"])["ceiling"]
    assert found.value is not None and found.value > 0.5
    assert found.control is not None and found.control < 0.2
    without = evaluate(table=[{**given[0], "vector": None}, *given[1:]], rows=["ceiling"])
    assert "not every row" in without["ceiling"].reason
    with pytest.raises(NLAError, match=r"column vector.*one width"):
        evaluate(table=[{**given[0], "vector": [1.0, 2.0]}, *given[1:]], rows=["ceiling"])


def _rated(n: int = 80) -> list[dict[str, Any]]:
    rng = np.random.default_rng(2)
    return [
        {"text": f"it is {i}", "cos": float(np.clip(right * 0.4 + rng.normal(0.3, 0.15), -1, 1)),
         "right": bool(right), "document": i // 2}
        for i, right in enumerate(rng.integers(0, 2, n))
    ]  # fmt: skip


def test_labels_as_files_and_frames_have_them(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("sklearn")
    frame = pandas.DataFrame(_rated())
    usual = calibrate(frame, labels="right")
    frame.to_csv(tmp_path / "rated.csv", index=False)
    assert calibrate(tmp_path / "rated.csv", labels="right").auroc == usual.auroc
    assert calibrate(frame.astype(str), labels="right").auroc == usual.auroc
    some = frame.assign(right=frame["right"].astype("boolean"))
    some.loc[:9, "right"] = pandas.NA
    assert calibrate(some, labels="right").fitted_on["unlabelled"] == 10
    for labels in (5, {"a": 1}, None):
        with pytest.raises(NLAError, match="labels="):
            calibrate(frame, labels=labels)
    # What a table of texts has in the place of lists tells nothing.
    beside = frame.assign(samples="[]", claims="[{}]", token_ids="[1, 2]", complete="maybe")
    assert calibrate(beside, labels="right").auroc == usual.auroc


def test_features_of_what_a_table_has() -> None:
    names = ["complete", "agreement", "tokens", "support_last"]
    assert evidence({"text": "a b.", "complete": math.nan}, names)["complete"] is None
    assert evidence({"text": "a b.", "complete": "False"}, names)["complete"] is None
    assert evidence({"text": "a b.", "complete": np.bool_(False)}, names)["complete"] == 0.0
    found = evidence({"text": "a b.", "samples": ["a b.", "a c."], "claims": ["x"]}, names)
    # Shared words over all words: {a} of {a, b., c.}.
    assert found["agreement"] == pytest.approx(1 / 3)
    assert found["support_last"] is None
