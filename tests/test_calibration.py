"""Calibration: the arithmetic of trust against arithmetic of its own, files, what is held out."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_lens import (
    NLA,
    Calibration,
    Explanation,
    Explanations,
    NLAError,
    NLAWarning,
    calibrate,
    examine,
)

pytest.importorskip("sklearn")


def table(n: int = 600, per_document: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Explanations of which the more faithful ones are right more often, and longer ones less."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        fve, length = float(rng.normal(0.6, 0.2)), int(rng.integers(3, 20))
        odds = 8 * (fve - 0.5) - 0.15 * (length - 10)
        rows.append(
            {
                "text": " ".join(["word"] * length) + ".",
                "fve_nrm": fve,
                "document": f"d{i // per_document}",
                "label": bool(rng.random() < 1 / (1 + math.exp(-odds))),
            }
        )
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return table()


@pytest.fixture(scope="module")
def calibration(rows: list[dict[str, Any]]) -> Calibration:
    return calibrate(rows, labels="label")


# --- arithmetic -----------------------------------------------------------------------------------


def auroc(trust: list[float], right: list[bool]) -> float:
    """The share of pairs in which the right one is trusted more; half of the ties."""
    good = [t for t, r in zip(trust, right, strict=True) if r]
    bad = [t for t, r in zip(trust, right, strict=True) if not r]
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


def ece(trust: list[float], right: list[bool]) -> float:
    total = 0.0
    for k in range(10):
        inside = [
            (t, r)
            for t, r in zip(trust, right, strict=True)
            if k / 10 <= t < (k + 1) / 10 or (k == 9 and t == 1)
        ]
        if inside:
            said = sum(t for t, _ in inside) / len(inside)
            found = sum(r for _, r in inside) / len(inside)
            total += len(inside) / len(trust) * abs(said - found)
    return total


def test_auroc_ece_and_brier() -> None:
    from nla_lens.evaluation.reliability import bins, risk_coverage, scores

    rng = np.random.default_rng(3)
    trust = np.round(rng.random(400), 2)
    trust[:2] = 0.0, 1.0
    right = rng.random(400) < trust**2
    found = scores(trust, right)
    assert found["auroc"] == pytest.approx(auroc(trust.tolist(), right.tolist()), abs=1e-12)
    assert found["ece"] == pytest.approx(ece(trust.tolist(), right.tolist()), abs=1e-12)
    assert found["brier"] == pytest.approx(
        sum((t - r) ** 2 for t, r in zip(trust, right, strict=True)) / 400
    )
    assert sum(b["rows"] for b in bins(trust, right)) == 400
    curve = risk_coverage(trust, right)
    assert curve[0] == {"kept": 1.0, "wrong": pytest.approx(1 - right.mean())}
    best = sorted(zip(-trust, range(400), strict=True))[:80]
    assert curve[16]["kept"] == pytest.approx(0.2)
    assert curve[16]["wrong"] == pytest.approx(np.mean([not right[i] for _, i in best]))


def test_trust_is_the_sum_of_its_curves(
    calibration: Calibration, rows: list[dict[str, Any]]
) -> None:
    written = calibration.to_dict()
    for row, trust in list(zip(rows, calibration.trust_all(rows), strict=True))[:50]:
        known = {"fve_nrm": row["fve_nrm"], "length": len(row["text"].split())}
        odds = written["intercept"]
        for feature in written["features"]:
            at, adds, x = feature["at"], feature["adds"], known[feature["name"]]
            x = min(max(x, at[0]), at[-1])
            k = max(i for i in range(len(at) - 1) if at[i] <= x)
            share = (x - at[k]) / (at[k + 1] - at[k])
            odds += (1 - share) * adds[k] + share * adds[k + 1]
        assert trust == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-9)


def test_what_is_reported_is_of_documents_it_had_not_seen(
    calibration: Calibration, rows: list[dict[str, Any]]
) -> None:
    """Labels that say nothing are not told apart, however well a fit could remember them."""
    rng = np.random.default_rng(0)
    noise = calibrate(rows, labels=rng.random(len(rows)) < 0.5)
    assert abs(noise.auroc - 0.5) < 0.06
    assert calibration.auroc > 0.75 and calibration.ece < 0.06
    assert calibration.auroc > calibration.held_out["alone"]["fve_nrm"]["auroc"] > 0.7
    assert calibration.brier < calibration.held_out["brier_of_the_share_alone"]
    low, high = calibration.held_out["intervals"]["auroc"]
    assert low < calibration.auroc < high


def test_no_document_is_on_both_sides(rows: list[dict[str, Any]]) -> None:
    from nla_lens.evaluation.fitting import folds

    documents = np.asarray([row["document"] for row in rows])
    right = np.asarray([row["label"] for row in rows])
    tested = []
    for fitted, held in folds(right, documents, seed=0):
        assert not set(documents[fitted]) & set(documents[held])
        tested += held.tolist()
    assert sorted(tested) == list(range(len(rows)))


def test_a_document_that_gives_its_label_away_does_not_help() -> None:
    """Rows of a document are alike in score and label: only a split by documents shows it."""
    rng = np.random.default_rng(1)
    rows = []
    for d in range(60):
        fve, label = float(rng.random()), bool(rng.random() < 0.5)
        rows += [
            {"text": "a b", "fve_nrm": fve + 1e-6 * k, "document": d, "label": label}
            for k in range(10)
        ]
    assert calibrate(rows, labels="label").auroc < 0.65


# --- files ----------------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_measured(
    calibration: Calibration, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = calibration.save(tmp_path)
    assert path.name == "nla_calibration.json"
    loaded = Calibration.load(tmp_path)
    assert loaded == calibration == Calibration.load(path)
    assert loaded.to_dict() == calibration.to_dict() == json.loads(path.read_text())
    assert loaded.trust_all(rows) == calibration.trust_all(rows)
    assert calibrate(rows, labels="label", path=tmp_path / "again.json") == loaded
    assert Calibration.load(tmp_path / "again.json").features == ("fve_nrm", "length")


@pytest.fixture
def written(calibration: Calibration) -> dict[str, Any]:
    return json.loads(json.dumps(calibration.to_dict()))


def changed(name: str, value: Any) -> Any:
    """A change of one place of a file, as `features.0.at`."""

    def change(values: dict[str, Any]) -> None:
        *way, last = name.split(".")
        part: Any = values
        for key in way:
            part = part[int(key) if key.isdigit() else key]
        part[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed("format", "something else"), "nla_lens.calibration version 1"),
        (changed("version", 2), "nla_lens.calibration version 1"),
        (changed("features", []), "features"),
        (changed("features", {"fve_nrm": 1}), "features"),
        (changed("features.0", 7), "feature"),
        (changed("features.0.name", "mood"), "'mood' is not known"),
        (changed("features.0.name", ["fve_nrm"]), "not known"),
        (changed("features.0.at", [0.1]), "at least|2 to"),
        (changed("features.0.at", [0.0] * 5000), "2 to"),
        (changed("features.0.at", [1.0, 0.0]), "rise"),
        (changed("features.0.at", [0.0, 1.0]), "as long as"),
        (changed("features.0.at.0", "0"), "finite number"),
        (changed("features.0.adds.0", True), "finite number"),
        (changed("features.0.adds.0", 1e300), "finite number"),
        (changed("features.0.unknown", None), "finite number"),
        (changed("features.1.name", "fve_nrm"), "each once"),
        (changed("features.0.name", "names"), "one of fve_nrm"),
        (changed("intercept", [1]), "intercept"),
        (changed("held_out", None), "held_out"),
        (changed("held_out.auroc", 1.2), "auroc"),
        (changed("held_out.ece", "0.01"), "ece"),
        (changed("fitted_on", [1]), "fitted_on"),
        (changed("low_fidelity", {"score": "norm", "below": 1}), "low_fidelity"),
        (changed("low_fidelity", {"score": "fve_nrm", "below": "x"}), "low_fidelity"),
        (changed("nla", "tiny"), "nla"),
        (changed("nla", {"d_model": 10**400}), "300 digits"),
        (changed("fitted_on.wrong", 10**400), "300 digits"),
        (changed("held_out.intervals", {"auroc": [10**40, 1]}), "held_out"),
    ],
)
def test_a_file_that_is_not_right_is_refused(
    written: dict[str, Any], change: Any, named: str, tmp_path: Path
) -> None:
    change(written)
    path = tmp_path / "nla_calibration.json"
    path.write_text(json.dumps(written))
    with pytest.raises(NLAError, match=named) as raised:
        Calibration.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{" * 5000, b'{"a": NaN}', b"\xff\xfe", b"null"])
def test_a_file_that_is_no_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "nla_calibration.json").write_bytes(content)
    with pytest.raises(NLAError, match=r"nla_calibration\.json"):
        Calibration.load(tmp_path)
    with pytest.raises(NLAError, match="cannot be read"):
        Calibration.load(tmp_path / "none")


def test_foreign_words_of_a_file_steer_nothing(written: dict[str, Any], tmp_path: Path) -> None:
    written["fitted_on"]["labels"] = "<script>x</script>\x1b[2J"
    written["held_out"]["alone"] = {"\x1b[31m<b>": {"auroc": 0.5}, "cos": None}
    written["held_out"]["reliability"] = [{"trust": "<i>"}, {"trust": 0.5, "right": 0.5, "rows": 3}]
    hostile = Calibration.from_dict(written)
    page = hostile.to_html(tmp_path / "page.html").read_text()
    assert "<script>" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in repr(hostile)


def test_it_is_shown_and_drawn(calibration: Calibration, tmp_path: Path) -> None:
    said = repr(calibration)
    assert f"auroc {calibration.auroc:.3f}" in said and "fve_nrm, length" in said
    assert "without the least trusted 20%" in said and "label" in said
    page = calibration.to_html(tmp_path / "page.html").read_text()
    assert page.count("<circle") == len(calibration.held_out["reliability"])
    pytest.importorskip("matplotlib").use("Agg")
    drawn = calibration.plot(tmp_path / "plots")
    assert [p.name for p in drawn] == ["reliability.png", "risk_coverage.png"]
    assert all(p.stat().st_size > 1000 for p in drawn)


def test_without_scikit_learn_a_calibration_is_used_and_none_is_fitted(
    calibration: Calibration, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    path = calibration.save(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert Calibration.load(path).trust_all(rows[:1]) == calibration.trust_all(rows[:1])
    assert NLA.from_pretrained("tiny").calibration is not None
    with pytest.raises(NLAError, match=r"nla-lens\[trust\]"):
        calibrate(rows, labels="label")


# --- what it is fitted on -------------------------------------------------------------------------


def test_tables_of_every_kind(
    calibration: Calibration, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    same = [columns, *([pandas.DataFrame(rows)] if (pandas := _pandas()) else [])]
    for kind in same:
        assert calibrate(kind, labels="label").to_dict() == calibration.to_dict()
    labels = columns["label"]
    by_hand = [np.asarray(labels), [float(x) for x in labels], lambda row: row["label"]]
    for given in by_hand:
        assert calibrate(rows, labels=given).curves == calibration.curves
    explained = Explanations(
        Explanation(r["text"], "", [], True, 1.0, fve_nrm=r["fve_nrm"]) for r in rows
    )
    alone = calibrate(explained, labels=labels)
    assert alone.features == ("fve_nrm", "length")
    assert alone.fitted_on["documents"] == len(rows)
    unknown = [{**row, "document": None} for row in rows]
    assert calibrate(unknown, labels="label").fitted_on["documents"] == len(rows)
    assert alone.fitted_on["without"] == ["norm", "complete", "quotations", "names"]


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        return None
    return pandas


def test_rows_without_a_label_are_left_out(rows: list[dict[str, Any]]) -> None:
    half = [{**row, "label": None if i % 2 else row["label"]} for i, row in enumerate(rows)]
    found = calibrate(half, labels="label")
    assert found.fitted_on["rows"] == found.fitted_on["unlabelled"] == len(rows) // 2
    assert found.curves == calibrate(half[::2], labels="label").curves


def test_quotations_are_looked_up() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(80):
        right = bool(rng.random() < 0.5)
        rows.append(
            {
                "text": "It says “the  Red dog”." if right else "It says “a cat”, “the red dog”.",
                "context": "There was the red DOG.",
                "cos": float(rng.random() + right),
                "document": i,
            }
        )
    rows.append({"text": "It quotes nothing.", "context": "x", "cos": 0.5, "document": 80})
    found = calibrate(rows)
    assert found.fitted_on["rows"] == 80 and found.fitted_on["labels"] == (
        "quotations stand in the text"
    )
    right = sum("cat" not in row["text"] for row in rows[:80])
    assert found.fitted_on["wrong"] == pytest.approx(1 - right / 80)
    assert found.auroc > 0.9


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"labels": "gold"}, "no such column; there are text"),
        ({"labels": [True]}, "1 values for 600"),
        ({"labels": ["yes"] * 600}, "row 0 is 'yes'"),
        ({"labels": [2] * 600}, "expected true or 1"),
        ({"labels": [True] * 600}, "600 explanations are right and 0 wrong"),
        ({}, "context"),
        ({"labels": "label", "features": ["mood"]}, "no feature 'mood'"),
        ({"labels": "label", "features": ["length"]}, "none of fve_nrm"),
        ({"labels": "label", "texts": ["a"]}, "calibrated alone"),
    ],
)
def test_bad_input_is_named(rows: list[dict[str, Any]], arguments: dict, named: str) -> None:
    with pytest.raises(NLAError, match=named):
        calibrate(rows, **arguments)


def test_documents_that_cannot_be_held_out(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(NLAError, match="one document"):
        calibrate([{**row, "document": "d"} for row in rows], labels="label")
    with pytest.raises(NLAError, match="same score"):
        calibrate([{**row, "fve_nrm": 0.5} for row in rows], labels="label")


def test_what_is_not_known_is_no_number(rows: list[dict[str, Any]]) -> None:
    """A feature that some rows lack has a weight of its own there; without the score: no trust."""
    holes = [{**row, "norm": None if i % 3 else row["fve_nrm"] * 10} for i, row in enumerate(rows)]
    found = calibrate(holes, labels="label")
    (norm,) = [curve for curve in found.curves if curve.name == "norm"]
    known, unknown = found.trust_all([{**rows[0], "norm": 5.0}, rows[0]])
    assert known is not None and unknown is not None and known != unknown
    odds = math.log(known / (1 - known)) - math.log(unknown / (1 - unknown))
    assert odds == pytest.approx(float(norm(np.asarray([5.0]))[0]) - norm.unknown, abs=1e-6)
    assert found.trust_all([{"text": "a", "fve_nrm": None}, {"text": "a"}]) == [None, None]


def test_where_few_were_seen_trust_is_that_of_the_nearest() -> None:
    """Scores far below the others, of which next to nothing was seen, are not trusted more."""
    rows = table(1200)
    rows += [{**row, "fve_nrm": -1.0 - i} for i, row in enumerate(rows[:2])]
    curve = next(c for c in calibrate(rows, labels="label").curves if c.name == "fve_nrm")
    far, near, middle = curve(np.asarray([-2.0, 0.3, 0.6]))
    assert far < near + 0.5 < middle


def test_where_low_fidelity_begins() -> None:
    rows = [
        {"text": "a b c", "fve_nrm": i / 200, "document": i, "label": i >= 80} for i in range(200)
    ]
    found = calibrate(rows, labels="label")
    assert found.least == ("fve_nrm", pytest.approx((79 / 200 + 80 / 200) / 2))
    assert calibrate(rows, labels=[i % 5 > 0 for i in range(200)]).least is None


# --- an NLA that has one --------------------------------------------------------------------------

SENTENCE = "Nora lives in Naples. The fox chased the dog out of the kennel."


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


@pytest.fixture(scope="module")
def explained(tiny: NLA) -> Explanations:
    return tiny.explain_text(SENTENCE)


def test_every_explanation_says_how_far_to_trust_it(tiny: NLA, explained: Explanations) -> None:
    assert all(0 <= e.trust <= 1 for e in explained)
    assert [e.trust for e in explained] == [tiny.calibration.trust(e) for e in explained]
    assert f"trust={explained[-1].trust:.3f}" in repr(explained[-1])
    vector = __import__("nla_lens").extract(tiny.spec.source_model, SENTENCE, 2)[0][-1]
    assert tiny.explain(vector).trust == pytest.approx(explained[-1].trust, abs=1e-5)
    unscored = tiny.explain(vector, score=False)
    assert unscored.trust is None
    nowhere = tiny.explain(vector.as_ordinary())
    assert nowhere.position is None and 0 <= nowhere.trust <= 1
    several = tiny.explain(vector, temperature=1.0, num_samples=3, seed=0)
    assert several.trust == several.samples[0].trust
    assert all(0 <= sample.trust <= 1 for sample in several.samples)


def test_it_travels(explained: Explanations, tiny: NLA, tmp_path: Path) -> None:
    for name in ("e.jsonl", "e.parquet"):
        assert Explanations.load(explained.save(tmp_path / name)) == explained
    if _pandas():
        assert explained.to_pandas()["trust"].tolist() == [e.trust for e in explained]
    page = explained.to_html(tmp_path / "e.html").read_text()
    assert f'"u":{round(explained[-1].trust, 4)}' in page
    from nla_lens import explain_corpus, open_store

    explain_corpus(tiny, [SENTENCE], tmp_path / "store", positions="last")
    (stored,) = open_store(tmp_path / "store").explanations()
    assert stored.trust == tiny.calibration.trust(stored)
    assert stored.trust == pytest.approx(explained[-1].trust, abs=1e-5)
    told = Explanation.from_dict({**explained[-1].to_dict(), "trust": None})
    assert told.trust is None
    with pytest.raises(NLAError, match=r"trust is 1\.5"):
        Explanation.from_dict({**explained[-1].to_dict(), "trust": 1.5})


def test_files_of_earlier_versions_are_read(explained: Explanations, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from nla_lens.results.store import open_store

    path = explained.save(tmp_path / "e.jsonl")
    header, *lines = path.read_text().splitlines()
    bare = [{k: v for k, v in json.loads(line).items() if k != "trust"} for line in lines]
    path.write_text("\n".join([header, *map(json.dumps, bare)]) + "\n")
    assert [e.trust for e in Explanations.load(path)] == [None] * len(lines)
    manifest: dict[str, Any] = {
        "format": "nla_lens.store",
        "version": 1,
        "n_rows": 1,
        "n_documents": 1,
    }
    (tmp_path / "manifest.json").write_text(
        json.dumps({**manifest, "columns": {"trust": "string"}})
    )
    import pyarrow as pa

    from nla_lens.results.rows import schema, to_row

    row = to_row(explained[-1], document=0, row=0)
    old = pa.schema(list(schema({"trust": "string"})))
    table = pa.Table.from_pylist([{**row, "trust": "mine"}], schema=old)
    pq.write_table(table, tmp_path / "rows-000000000-000000000.parquet")
    store = open_store(tmp_path)
    assert store.rows()[0]["trust"] == "mine"
    (found,) = store.explanations()
    assert found.trust is None and found.text == explained[-1].text
    assert store.to_html(tmp_path / "page.html").stat().st_size > 0


def test_without_a_calibration_there_is_no_trust(tiny: NLA, nla: NLA) -> None:
    import torch

    assert nla.calibration is None
    assert nla.explain(torch.randn(nla.spec.d_model), max_new_tokens=5).trust is None
    alone = NLA(tiny.verbalizer, tiny.reconstructor)
    found = alone.explain_text(SENTENCE, [-1])
    assert found[0].trust is None
    assert NLA.from_pretrained(av=tiny_dir() / "av").calibration is None


def tiny_dir() -> Path:
    from nla_lens.checkpoints.releases import TINY_DIR

    return TINY_DIR


def test_the_calibrations_threshold_is_the_flags(tiny: NLA) -> None:
    mine = NLA(tiny.verbalizer, tiny.reconstructor)
    mine.calibration = dataclasses.replace(tiny.calibration, least=("fve_nrm", 0.9999))
    assert mine.explain_text(SENTENCE, [-1])[0].flags == ("low_fidelity",)
    mine.calibration = None
    assert mine.explain_text(SENTENCE, [-1])[0].flags == ()


def test_it_is_saved_with_the_pair(tiny: NLA, explained: Explanations, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "pair")
    again = NLA.from_pretrained(tmp_path / "pair")
    assert again.calibration == tiny.calibration
    assert again.explain_text(SENTENCE) == explained
    # One above serves, too; and half precision is no other checkpoint.
    (tmp_path / "pair" / "av" / "nla_calibration.json").rename(
        tmp_path / "pair" / "nla_calibration.json"
    )
    half = NLA.from_pretrained(tmp_path / "pair", dtype="bfloat16")
    assert half.calibration == tiny.calibration


def test_one_of_another_checkpoint_is_not_used(tiny: NLA, nla: NLA, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "pair")
    path = tmp_path / "pair" / "av" / "nla_calibration.json"
    with pytest.raises(NLAError, match="another NLA: d_model is 128 there"):
        nla.calibration = tiny.calibration
    written = json.loads(path.read_text())
    other = {**written, "nla": {**written["nla"], "value_head": [1.0] * 8}}
    unknown = {**written, "features": [{**written["features"][0], "name": "mood"}]}
    for content, named in (
        (json.dumps(other), "another NLA: value_head"),
        (json.dumps(unknown), "'mood' is not known here"),
        ("{", "cannot be read as JSON"),
    ):
        path.write_text(content)
        with pytest.warns(NLAWarning, match=f"{named}.*there is no trust"):
            loaded = NLA.from_pretrained(tmp_path / "pair")
        assert loaded.calibration is None and loaded.explain_text(SENTENCE, [-1])[0].trust is None


# --- of an NLA ------------------------------------------------------------------------------------

TEXTS = [
    f"{name} lives in {place}. The {thing} was in the {where}."
    for name in ("Nora", "Emma", "Peter")
    for place in ("Naples", "Oslo", "Lima")
    for thing, where in (("fox", "kennel"), ("zorg", "blim"), ("garlic", "pan"))
]


def test_an_nla_is_calibrated_on_texts(tiny: NLA, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "pair")
    mine = NLA.from_pretrained(tmp_path / "pair")
    seen: list[dict[str, Any]] = []

    def right(row: Any) -> bool:
        """the score is high"""
        seen.append(row)
        return row["fve_nrm"] > 0.97

    before = (tmp_path / "pair" / "av" / "nla_calibration.json").read_text()
    found = calibrate(mine, TEXTS, labels=right, positions="spread:6", support=True)
    assert found.fitted_on["rows"] == len(seen) == 6 * len(TEXTS)
    assert found.fitted_on["documents"] == len(TEXTS)
    assert found.fitted_on["labels"] == "the score is high"
    assert {"support_least", "support_last", "position"} <= set(found.features)
    assert all(row["context"].strip() in TEXTS[row["document"]] for row in seen)
    # Written beside the checkpoint, and used from now on.
    after = (tmp_path / "pair" / "av" / "nla_calibration.json").read_text()
    assert after != before and json.loads(after) == found.to_dict()
    assert mine.calibration is found
    (one,) = mine.explain_text(TEXTS[0], [-1])
    assert one.trust == found.trust(one)
    vector = __import__("nla_lens").extract(tiny.spec.source_model, TEXTS[0], 2)[0][-1]
    looked = examine(mine, one, vector=vector).explanation
    assert looked.claims and looked.trust == found.trust(looked) != one.trust


def test_an_embedded_pair_is_not_written_to(tiny: NLA, tmp_path: Path) -> None:
    path = tiny_dir() / "av" / "nla_calibration.json"
    before = path.read_bytes()
    mine = NLA.from_pretrained("tiny")
    with pytest.raises(NLAError, match="needs texts="):
        calibrate(mine, labels="label")
    found = calibrate(
        mine, TEXTS, labels=lambda row: row["fve_nrm"] > 0.99, positions="spread:4", budget=60,
        path=tmp_path / "made.json",
    )  # fmt: skip
    assert path.read_bytes() == before and Calibration.load(tmp_path / "made.json") == found
    with pytest.raises(NLAError, match="at least 10 of each") as raised:
        calibrate(mine, TEXTS[:2], labels=lambda row: True, positions="spread:4")
    assert len(raised.value.explanations) == 8 and raised.value.explanations[0].cos is not None
    with pytest.raises(NLAError, match="reconstructor"):
        calibrate(NLA(tiny.verbalizer), TEXTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(NLAError, match="cannot be written") as raised:
        calibrate(table(120), labels="label", path=tmp_path / "file" / "x.json")
    assert isinstance(raised.value.calibration, Calibration)


# --- the embedded pairs ---------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[1] / "tutorials" / "tiny_nla" / "calibrate.py"


@pytest.mark.slow
def test_the_embedded_pairs_know_how_far_to_trust_them() -> None:
    """Gold facts of documents of another seed, in a process with no scikit-learn in sight."""
    code = (
        "import sys, runpy; sys.modules['sklearn'] = None; "
        f"sys.path.insert(0, {str(SCRIPT.parent)!r}); "
        f"sys.argv = ['calibrate.py', '--dir', {str(tiny_dir())!r}, '--test', '100']; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [pair["pair"] for pair in found] == ["tiny", "tiny-norm-matched"]
    for pair in found:
        trust, right, fve, cos, length = map(list, zip(*pair["rows"], strict=True))
        assert len(right) > 700 and right.count(False) > 20, pair["errors"]
        assert auroc(trust, right) >= 0.9
        assert ece(trust, right) <= 0.05
        for alone in (fve, cos, [-n for n in length]):
            assert auroc(trust, right) > auroc(alone, right)


@pytest.mark.parametrize("folder", ["av", "av_norm_matched"])
def test_what_is_shipped_is_what_the_page_says(folder: str) -> None:
    name = {"av": "tiny", "av_norm_matched": "tiny-norm-matched"}[folder]
    shipped = Calibration.load(tiny_dir() / folder)
    page = (SCRIPT.parents[2] / "docs" / "trust.md").read_text(encoding="utf-8")
    tested, alone = shipped.held_out, shipped.held_out["alone"]
    numbers = [
        f"{100 * tested['wrong']:.1f} %",
        *(f"{tested[m]:.3f}" for m in ("auroc", "ece", "brier", "brier_of_the_share_alone")),
        *(f"{alone[feature]['auroc']:.3f}" for feature in ("fve_nrm", "cos", "length")),
    ]
    assert f"| `{name}` | {' | '.join(numbers)} |" in page
    if folder == "av":
        kept = [p for p in tested["risk_coverage"] if abs(p["kept"] - 0.8) < 1e-3]
        share = f"{100 * kept[0]['wrong']:.1f} % instead of {100 * tested['wrong']:.1f} % are wrong"
        assert share in page
    assert shipped.auroc >= 0.9 and shipped.ece <= 0.05
    assert all(shipped.auroc > scores["auroc"] for scores in alone.values())
    assert (SCRIPT.parents[2] / "docs" / "trust" / "reliability.png").stat().st_size > 5000


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Any:
    from click.testing import CliRunner

    from nla_lens.cli.main import cli

    return CliRunner().invoke(cli, ["calibrate", *map(str, arguments)])


def test_the_command_on_a_table(
    calibration: Calibration, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    ran = run("--table", path, "--label", "label", "--out", tmp_path)
    assert ran.exit_code == 0, ran.output
    assert f"auroc {calibration.auroc:.3f}" in ran.output
    assert str(tmp_path / "nla_calibration.json") in ran.output
    assert Calibration.load(tmp_path) == calibration
    ran = run("--table", path, "--label", "label", "--json", "--html", tmp_path / "page.html")
    assert json.loads(ran.stdout) == calibration.to_dict()
    assert "<svg" in (tmp_path / "page.html").read_text()
    for arguments, named in (
        ((), "name FILES"),
        (("--table", path, "x.txt"), "leave FILES out"),
        (("--table", path, "--label", "gold"), "no such column"),
        (("--table", path), "context"),
        (("--table", tmp_path / "none"), "no such file"),
    ):
        ran = run(*arguments)
        assert ran.exit_code != 0 and isinstance(ran.exception, NLAError), ran.output
        assert named in str(ran.exception)


def test_the_command_on_texts(tmp_path: Path) -> None:
    texts = [
        f"{name} lives in {place}. The {thing} was in the house."
        for name in ("Nora", "Emma", "Peter", "Anna")
        for place in ("Naples", "Oslo", "Lima")
        for thing in ("fox", "blorpsnark", "zwirk grumpf")
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    ran = run(tmp_path / "texts.jsonl", "--out", tmp_path / "made", "--positions", "spread:10")
    assert ran.exit_code == 0, (ran.output, ran.exception)
    made = Calibration.load(tmp_path / "made")
    assert made.fitted_on["labels"] == "quotations stand in the text"
    assert made.fitted_on["documents"] == len(texts)
