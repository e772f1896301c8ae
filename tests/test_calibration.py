"""Calibration: the arithmetic of trust against arithmetic of its own, files, what is held out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_lens import Calibration, calibrate

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
