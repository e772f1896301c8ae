"""Evaluation: measures against arithmetic of their own, controls, NLAs broken on purpose."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nla_lens import NLA, Explanation, NLAError, evaluate, examine
from nla_lens.evaluation import bootstrap
from nla_lens.evaluation.evaluate import ROWS
from nla_lens.evaluation.sample import Memory, Sample
from nla_lens.results.sentences import quotes, sentences, stands_in

DOCUMENTS = [
    f"{name} lives in {place}. {end}"
    for (name, place), end in zip(
        itertools.product(["Nora", "Emma", "Peter", "Anna"], ["Naples", "Oslo", "Lima"]),
        itertools.cycle(
            [
                "The fox chased the dog out of the kennel.",
                "The chef fried the garlic in the pan.",
                "The storm hit the coast at night.",
            ]
        ),
        strict=False,
    )
]


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


@pytest.fixture(scope="module")
def report(tiny: NLA) -> Any:
    return evaluate(tiny, DOCUMENTS, positions=["from:4", "spread:4"])


# --- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("It says “a. b.” here. Then.", ["It says “a. b.” here.", "Then."]),
        ("It ends with “… the garlic.”. Next.", ["It ends with “… the garlic.”.", "Next."]),
        ("About 3.5 metres. No.", ["About 3.5 metres.", "No."]),
        ("no stop", ["no stop"]),
        ("a\nb", ["a", "b"]),
        ("", []),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


def test_quotes_and_contexts() -> None:
    assert quotes('It ends “… the garlic.” and "x y" «z».') == ["the garlic.", "x y", "z"]
    assert quotes("none") == []
    assert stands_in("The  Garlic", "fried the garlic in")
    assert not stands_in("the onion", "fried the garlic in")


# --- intervals ------------------------------------------------------------------------------------


def test_the_interval_is_over_documents() -> None:
    """100 copies of 10 documents say no more than the 10."""
    values = np.random.default_rng(0).normal(size=10)
    once = bootstrap.mean(values, np.arange(10))
    copied = bootstrap.mean(np.repeat(values, 100), np.repeat(np.arange(10), 100))
    assert copied.value == pytest.approx(values.mean())
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    alone = bootstrap.mean(np.repeat(values, 100), np.arange(1000))
    assert alone.high - alone.low < (copied.high - copied.low) / 5
    spread = values.std() / np.sqrt(10) * 1.96 * 2
    assert copied.high - copied.low == pytest.approx(spread, rel=0.25)


# --- a report -------------------------------------------------------------------------------------


def test_every_row_is_there_or_says_why(report: Any) -> None:
    assert list(report) == list(ROWS)
    for name, measure in report.items():
        assert measure.verdict in ("held", "fell short", "not measured") and measure.reason, name
        if measure.verdict != "not measured":
            assert measure.low <= measure.value <= measure.high and measure.n > 0, name
            assert measure.control is not None and measure.control_name, name
    assert {n for n, m in report.items() if m.verdict == "not measured"} <= {
        "critic", "drift", "ceiling"
    }  # fmt: skip


def test_controls_behave_on_the_embedded_pair(report: Any) -> None:
    assert report["fve_nrm"].low > 0.8 and report["fve_nrm"].control < 0
    assert report["floor_permuted"].value < 0
    assert report["floor_constant"].value < 0.2 and report["floor_empty"].value < 0.2
    assert report["retrieval"].value > 20 * report["retrieval"].details["chance"]
    assert report["vagueness"].value < 0.05 < 0.3 < report["vagueness"].control
    assert report["quotes"].low > report["quotes"].control
    assert report["agreement"].low > report["agreement"].control
    assert report["splice"].low > 0.5 > report["splice"].control
    assert report["steering"].value > report["steering"].control
    assert report["support"].low > 0


def test_fve_is_one_minus_mse_over_var(tiny: NLA, report: Any) -> None:
    explained = [tiny.explain_text(text, list(range(len_of(tiny, text)))[4:]) for text in DOCUMENTS]
    picked = [e for found in explained for e in _spread(list(found), 4)]
    assert report["fve_nrm"].value == pytest.approx(np.mean([e.fve_nrm for e in picked]), abs=1e-5)
    assert report["fve_nrm"].n == len(picked) == report.about["vectors"]
    assert report["fve_nrm"].details["mean_cos"] == pytest.approx(
        np.mean([e.cos for e in picked]), abs=1e-5
    )


def len_of(nla: NLA, text: str) -> int:
    return len(nla.open_source().tokenizer(text)["input_ids"])


def _spread(found: list, n: int) -> list:
    return [found[round(k * (len(found) - 1) / (n - 1))] for k in range(n)]


def test_a_report_is_shown_stored_and_drawn(report: Any, tmp_path: Path) -> None:
    assert "fve_nrm" in repr(report) and "held" in repr(report)
    kept = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert kept["rows"]["retrieval"]["value"] == report["retrieval"].value
    assert "<html" in report.to_html(tmp_path / "r.html").read_text()
    pytest.importorskip("matplotlib").use("Agg")
    drawn = report.plot(tmp_path / "plots")
    assert (tmp_path / "plots" / "measures.png") in drawn and all(p.stat().st_size for p in drawn)


def test_no_text_is_reconstructed_twice(tiny: NLA) -> None:
    asked: list[str] = []

    def counting(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return tiny.reconstruct(texts)

    memory = Memory(counting)
    first = memory(["a", "b", "a"])
    assert torch.equal(first[0], first[2]) and asked == ["a", "b"]
    memory(["b", "c"])
    assert asked == ["a", "b", "c"] and len(memory) == 3


# --- NLAs broken on purpose -----------------------------------------------------------------------

WRONG = ["fve_nrm", "retrieval", "floor_permuted", "floor_constant", "vagueness", "quotes"]


def broken(nla: NLA, **changes: Any) -> NLA:
    mine = NLA(nla.verbalizer, nla.reconstructor)
    for name, value in changes.items():
        setattr(mine, name, value)
    return mine


def test_a_verbalizer_that_writes_a_constant_is_seen(tiny: NLA, monkeypatch) -> None:
    original = type(tiny.verbalizer).answers
    text = "It reads like a story. It ends with “the dog”. Next comes a full stop."

    def constant(self: Any, *args: Any, **options: Any) -> Any:
        for row, answer in original(self, *args, **{**options, "max_new_tokens": 1}):
            yield row, dataclasses.replace(answer, text=text, complete=True)

    monkeypatch.setattr(type(tiny.verbalizer), "answers", constant)
    found = evaluate(tiny, DOCUMENTS, positions=["from:4", "spread:3"], rows=WRONG)
    assert {n for n in WRONG if found[n].verdict == "fell short"} == set(WRONG)
    assert found["retrieval"].value <= 3 / found["retrieval"].n


def test_a_vector_of_another_layer_is_seen(tiny: NLA) -> None:
    spec = dataclasses.replace(tiny.spec, layer=0)
    other = NLA.from_pretrained("tiny")
    object.__setattr__(other, "spec", spec)
    other._source._spec = spec
    found = evaluate(other, DOCUMENTS, positions=["from:4", "spread:3"], rows=["fve_nrm"])
    assert found["fve_nrm"].verdict == "fell short" or found["fve_nrm"].value < 0.5


# --- tables ---------------------------------------------------------------------------------------


def table(n: int = 60) -> list[dict]:
    rng = random.Random(0)
    words = [f"word{i} item{i}" for i in range(n)]
    return [
        {
            "text": f"It says “{words[i]}”." if i % 3 else "It says “something else”.",
            "fve_nrm": rng.gauss(0.7, 0.1),
            "context": f"Once there was {words[i]} and more",
            "document": i // 4,
        }
        for i in range(n)
    ]


def test_a_table_needs_no_weights() -> None:
    rows = table()
    found = evaluate(table=rows)
    assert found["fve_nrm"].value == pytest.approx(np.mean([r["fve_nrm"] for r in rows]))
    assert found["quotes"].value == pytest.approx(2 / 3) and found["quotes"].verdict == "held"
    assert found["retrieval"].verdict == "not measured" and "weights" in found["retrieval"].reason
    pandas = pytest.importorskip("pandas")
    assert evaluate(table=pandas.DataFrame(rows))["fve_nrm"] == found["fve_nrm"]
    plain = evaluate(table=[{"text": r["text"]} for r in rows])
    assert "none of the columns" in plain["fve_nrm"].reason
    assert "context" in plain["quotes"].reason


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"table": [{"said": "x"}]}, "no column 'text'"),
        ({"table": []}, "no column"),
        ({"table": 7}, "data frame"),
        ({"table": {"text": ["a"], "cos": []}}, "rows"),
        ({}, "needs an NLA"),
        ({"rows": ["fve"], "table": [{"text": "x"}]}, "no row"),
        ({"rows": [], "table": [{"text": "x"}]}, "no row"),
    ],
)
def test_bad_input_is_named(arguments: dict, named: str) -> None:
    with pytest.raises(NLAError, match=named):
        evaluate(**arguments)


def test_an_nla_without_a_reconstructor_is_refused(tiny: NLA) -> None:
    with pytest.raises(NLAError, match="reconstructor"):
        evaluate(NLA(tiny.verbalizer), DOCUMENTS)
    with pytest.raises(NLAError, match="reconstructor"):
        examine(NLA(tiny.verbalizer), torch.randn(128))


# --- one explanation ------------------------------------------------------------------------------


def test_examine_says_what_speaks_for_each_claim(tiny: NLA) -> None:
    text = "The chef fried the garlic in the pan."
    resid = tiny.open_source()
    vector = __import__("nla_lens").extract(tiny.spec.source_model, text, 2)[0][-1]
    found = examine(tiny, vector, context=text, num_samples=3, seed=0)
    assert [c.text for c in found.claims if c.kind == "sentence"] == sentences(
        found.explanation.text
    )
    assert [c.text for c in found.claims if c.kind == "quote"] == quotes(found.explanation.text)
    parts = sentences(found.explanation.text)
    without = " ".join(parts[1:])
    fall = tiny.score([found.explanation.text, without], torch.stack([vector, vector])).fve_nrm
    assert found.claims[0].support == pytest.approx(float(fall[0] - fall[1]), abs=1e-5)
    assert all(0 <= c.agreement <= 1 for c in found.claims)
    assert resid is not None and "Examination" in repr(found)
    loaded = Explanation.from_dict(json.loads(json.dumps(found.explanation.to_dict())))
    assert loaded.claims == found.claims


def test_a_true_and_an_invented_quotation(tiny: NLA) -> None:
    said = Explanation("It ends with “the pan”. It says “the moon”.", "", [], True, 1.0)
    found = examine(tiny, said, context="The chef fried the garlic in the pan.")
    assert [(c.text, c.in_context) for c in found.claims if c.kind == "quote"] == [
        ("the pan", True), ("the moon", False)
    ]  # fmt: skip
    assert all(c.support is None and c.agreement is None for c in found.claims)


def test_samples_have_the_size_they_say() -> None:
    part = Sample(
        torch.randn(3, 4), ["a", "b", "c"], np.arange(3), np.arange(3), [None] * 3, [None] * 3,
        2.0, 1.0,
    ).first(2)  # fmt: skip
    assert len(part) == 2 and part.vectors_ND.shape == (2, 4)
