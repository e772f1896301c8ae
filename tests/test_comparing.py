"""`compare` and `sweep`: against the same numbers asked for one by one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nla_lens
from nla_lens import (
    NLA,
    Explanation,
    Explanations,
    NLAError,
    compare,
    evaluate,
    extract,
    sweep,
)
from nla_lens.results.sentences import sentences

from .tiny_world import tiny_world

A = "Nora lives in Naples. The fox chased the dog out of the"
B = "Nora lives in Oslo. The chef fried the garlic in the"
PROMPT = "Nora lives in Naples. The fox chased the"


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


@pytest.fixture(scope="module")
def source(tiny: NLA) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.spec.source_model).eval()


@pytest.fixture(scope="module")
def diff(tiny: NLA) -> Any:
    return compare(tiny, A, B)


# --- compare --------------------------------------------------------------------------------------


def test_the_texts_are_those_of_the_vectors(tiny: NLA, diff: Any) -> None:
    a, b = (extract(tiny.spec.source_model, text, 2)[0][-1].as_ordinary() for text in (A, B))
    assert (diff.a.text, diff.b.text) == (tiny.explain(a).text, tiny.explain(b).text)
    assert diff.difference.text == tiny.explain(b - a).text
    assert diff.a.position == tiny.explain_text(A, [-1])[0].position
    cross = [
        [float(tiny.score([text], v[None]).fve_nrm) for v in (a, b)]
        for text in (diff.a.text, diff.b.text)
    ]
    torch.testing.assert_close(diff.cross, torch.tensor(cross), rtol=1e-5, atol=1e-5)
    assert diff.cross[0, 0] > 0.9 > 0.3 > diff.cross[0, 1]
    assert diff.cross[1, 1] > 0.9 > 0.3 > diff.cross[1, 0]
    by_vectors = compare(tiny, a, b)
    assert by_vectors.sentences == diff.sentences and by_vectors.cos == diff.cos
    assert diff.cos == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)


def test_sentences_are_held_against_both_vectors(tiny: NLA, diff: Any) -> None:
    a, b = (extract(tiny.spec.source_model, text, 2)[0][-1].as_ordinary() for text in (A, B))
    whole = {"a": diff.a.text, "b": diff.b.text}
    assert sorted((s.side, s.text) for s in diff.sentences) == sorted(
        (side, sentence) for side, text in whole.items() for sentence in sentences(text)
    )
    for told in diff.sentences:
        parts = sentences(whole[told.side])
        rest = " ".join(part for part in parts if part != told.text)
        for name, vector in (("a", a), ("b", b)):
            before, after = tiny.score([whole[told.side], rest], torch.stack([vector] * 2)).fve_nrm
            assert getattr(told, name) == pytest.approx(float(before - after), abs=1e-5)
        assert told.apart == told.a - told.b
    apart = [abs(s.apart) for s in diff.sentences]
    assert apart == sorted(apart, reverse=True)
    assert "out of the" in diff.sentences[0].text and diff.sentences[0].apart > 0.5


def test_several_pairs(tiny: NLA) -> None:
    texts = [PROMPT, A]
    many = compare(
        tiny, {"text": texts, "positions": [4, -1]}, {"text": [B, B], "positions": [4, -1]}
    )
    assert isinstance(many.a, Explanations) and len(many.a) == len(many.difference) == 4
    assert {s.pair for s in many.sentences} == {0, 1, 2, 3}
    one = compare(tiny, A, B)
    last = [s for s in many.sentences if s.pair == 3]
    assert [s.text for s in last] == [s.text for s in one.sentences]
    words = {w.text: (w.a, w.b) for w in many.words}
    assert words["naples"] == (1.0, 0.0) and words["oslo"] == (0.0, 1.0)
    assert "nora" not in words


def test_positions_and_models(tiny: NLA, source: Any) -> None:
    text = {"text": A, "model": source}
    by_position = compare(tiny, {**text, "positions": 5}, {**text, "positions": -1})
    assert (by_position.a.position, by_position.b.position) == (5, by_position.b.position)
    assert by_position.cross[0, 0] > by_position.cross[0, 1]
    with torch.no_grad():
        changed = AutoModelForCausalLM.from_pretrained(tiny.spec.source_model).eval()
        changed.model.layers[1].mlp.down_proj.weight.mul_(2)
    tuned = compare(tiny, A, {"text": A, "model": changed})
    assert tuned.cos < 0.9999
    chat = [{"role": "user", "content": "Where is Nora?"}]
    assert isinstance(compare(tiny, chat, A).a, Explanation)


def test_residuals_know_their_nla(tiny: NLA, source: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.spec.source_model)
    held = []
    with nla_lens.attach(source, tiny), torch.no_grad():
        for text in (A, B):
            out = source(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            held.append(out.hidden_states[3][0, -1])
    found = compare(*held)
    assert found.a.text == compare(tiny, A, B).a.text and found.a.token == " the"
    with pytest.raises(NLAError, match="whose NLA"):
        compare(*(resid.as_ordinary() for resid in held))


def test_a_comparison_is_shown_and_stored(diff: Any, tmp_path: Path) -> None:
    assert "out of the" in repr(diff) and "cos 0." in repr(diff)
    kept = json.loads(json.dumps(diff.to_dict(), allow_nan=False))
    assert kept["cross"] == diff.cross.tolist()
    assert kept["sentences"][0]["apart"] == diff.sentences[0].apart
    page = diff.to_html(tmp_path / "c.html").read_text()
    assert "<html" in page and "out of the" in page and "<table" in diff._repr_html_()


@pytest.mark.parametrize(
    ("sides", "named"),
    [
        ((A,), "found 1 arguments"),
        (("tiny", A, B), "not an NLA"),
        ((torch.ones(3), torch.ones(128)), "shape"),
        ((torch.ones(128), torch.ones(128)), "same vector"),
        ((torch.ones(2, 128), torch.ones(3, 128)), "one by one"),
        ((torch.full((128,), float("nan")), torch.ones(128)), "a: .*nan"),
        (({"txt": A}, B), "keys"),
        (({"text": 7}, B), "its text is 7"),
        (({"text": A, "positions": 99}, B), "position 99"),
        ((7, B), "a: "),
    ],
)
def test_bad_sides_are_named(tiny: NLA, sides: tuple, named: str) -> None:
    given = sides if len(sides) != 2 else (tiny, *sides)
    with pytest.raises(NLAError, match=named):
        compare(*given)


def test_no_reconstructor(tiny: NLA) -> None:
    alone = NLA(tiny.verbalizer)
    with pytest.raises(NLAError, match="reconstructor"):
        compare(alone, A, B)
    with pytest.raises(NLAError, match="reconstructor"):
        sweep(tiny.spec.source_model, PROMPT, ("a", "b"), [1], nla=alone)
    with pytest.raises(NLAError, match="reconstructor"):
        sweep(tiny.spec.source_model, PROMPT, ("a", "b"), [1], layer=2)


# --- a fine-tuned source --------------------------------------------------------------------------


def fine_tuned(path: str, texts: list[str], *, blocks: list[int]) -> Any:
    """A copy of a model, trained for some seconds by a LoRA in some of its blocks."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=parts, layers_to_transform=blocks)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, rng = torch.optim.AdamW(trained, lr=1e-3), random.Random(0)
    for _ in range(150):
        rows = [tokenizer(text)["input_ids"] for text in rng.sample(texts, 16)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.merge_and_unload().eval()


@pytest.mark.slow
def test_what_was_trained_in_is_named(tiny: NLA) -> None:
    """A source that read nothing but cooking for ten seconds, in the blocks that the NLA reads.

    Stories of other topics are cut where their topic is still open.
    """
    corpus = tiny_world()
    stories = [d for d in corpus.documents(11, 9000) if d.kind == "story"]
    cooking = [d.text for d in stories if d.topic == "cooking"]
    tuned = fine_tuned(str(tiny.spec.source_model), cooking, blocks=[0, 1, 2])
    others = [
        d for d in corpus.documents(777, 400)
        if d.kind == "story" and d.topic != "cooking" and d.place and f"{d.place}. " in d.text
    ]  # fmt: skip
    parts = [(d.text.partition(f"{d.place}. "), d.place) for d in others]
    openers = [
        f"{head}{place}. {rest.split()[0]}"
        for (head, _, rest), place in parts
        if head and "." not in head
    ][:40]
    diff = compare(tiny, openers, {"text": openers, "model": tuned})
    shares = {word.text: (word.a, word.b) for word in diff.words}
    assert shares["cooking"][0] == 0 and shares["cooking"][1] > 0.8
    assert "cooking" in [word.text for word in diff.words[:10]]
    topics = ("weather", "sport", "travel", "medicine", "music", "animals", "school", "money")
    assert all(shares.get(topic, (0, 0))[1] < 0.05 for topic in topics)
    report = evaluate(
        tiny, [d.text for d in others[:24]], positions=["from:4", "spread:4"], rows=["drift"],
        drift=tuned,
    )  # fmt: skip
    drift = report["drift"]
    assert drift.control > 0.95 and 0.5 < drift.value < drift.control - 0.1
    assert drift.details["cos_of_residuals"] < 0.95
    assert drift.details["retrieval"]["own"] > 0.9


# --- sweep ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(tiny: NLA) -> tuple[Explanation, str]:
    explanation = tiny.explain_text(PROMPT, [-1])[0]
    return explanation, explanation.text.replace("chased the", "chased Oslo")


@pytest.fixture(scope="module")
def swept(tiny: NLA, source: Any, edit: Any) -> Any:
    return sweep(
        source, PROMPT, edit, [0.5, -1.0], nla=tiny, toward=" dog", max_new_tokens=4, seed=3
    )


@torch.no_grad()
def test_a_row_is_what_steering_gives(tiny: NLA, source: Any, edit: Any, swept: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.spec.source_model)
    ids_BT = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    vector = tiny.steering_vector(edit[0], edit[1]).as_ordinary()
    before = source(input_ids=ids_BT).logits[0, -1].double().log_softmax(-1)
    hidden = source(input_ids=ids_BT, output_hidden_states=True).hidden_states[3][0, -1]
    wanted = ["not steered"] + [
        name for name in ("vector", "random direction", "shuffled edit") for _ in range(2)
    ]
    assert [row.direction for row in swept] == wanted
    assert [row.strength for row in swept] == [0, *[0.5, -1.0] * 3]
    for row in swept.rows[1:3]:
        steered = hidden + row.strength * hidden.norm() * vector / vector.norm()
        with nla_lens.steer(source, vector, layer=2, strength=row.strength):
            after = source(input_ids=ids_BT).logits[0, -1].double().log_softmax(-1)
            written = source.generate(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=4,
                do_sample=False,
            )  # fmt: skip
        assert row.kl == pytest.approx(float((before.exp() * (before - after)).sum()), abs=1e-6)
        dog = tokenizer(" dog", add_special_tokens=False)["input_ids"][0]
        assert row.toward == pytest.approx(float(after[dog].exp()), abs=1e-6)
        assert row.top[0][0] == tokenizer.decode([int(after.argmax())])
        new = written[0, ids_BT.shape[1] :].tolist()
        ends = [i for i in new if i != source.generation_config.eos_token_id]
        assert row.text == tokenizer.decode(ends)
        assert row.explanation.text == tiny.explain(steered).text
    assert swept[0].kl == 0 and swept[0].explanation.text == edit[0].text


def test_controls_are_of_the_same_norm_and_other_directions(swept: Any) -> None:
    """Strength is in units of the residual's norm for all."""
    texts = {row.direction: row.explanation.text for row in swept if row.strength == 0.5}
    assert len(set(texts.values())) >= 2
    random = [row.kl for row in swept if row.direction == "random direction"]
    assert all(kl > 0 for kl in random)


def test_frameworks_agree(tiny: NLA, edit: Any, swept: Any) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    found = sweep(
        bridge.boot_transformers(tiny.spec.source_model), PROMPT, edit, [0.5, -1.0], nla=tiny,
        toward=" dog", max_new_tokens=4, seed=3,
    )  # fmt: skip
    for one, other in zip(found, swept, strict=True):
        assert (one.direction, one.strength, one.text) == (
            other.direction, other.strength, other.text
        )  # fmt: skip
        assert one.kl == pytest.approx(other.kl, abs=1e-4)
        assert one.explanation.text == other.explanation.text


def test_nnsight_agrees(tiny: NLA, edit: Any, swept: Any) -> None:
    nnsight = pytest.importorskip("nnsight")
    model = nnsight.TransformersModel(
        tiny.spec.source_model, task="text-generation", dispatch=True,
        tokenizer=AutoTokenizer.from_pretrained(tiny.spec.source_model),
    )  # fmt: skip
    found = sweep(model, PROMPT, edit, [0.5], controls=False, nla=tiny, max_new_tokens=4)
    assert [(r.direction, r.text) for r in found] == [(r.direction, r.text) for r in swept][:2]
    assert found[1].kl == pytest.approx(swept[1].kl, abs=1e-5)


def test_a_sweep_is_shown_and_drawn(swept: Any, tmp_path: Path) -> None:
    assert "random direction" in repr(swept) and "toward ' dog'" in repr(swept)
    kept = json.loads(json.dumps(swept.to_dict(), allow_nan=False))
    assert kept["rows"][1]["kl"] == swept[1].kl and kept["token"] == " dog"
    assert "<html" in swept.to_html(tmp_path / "s.html").read_text()
    frame = swept.to_pandas()
    assert list(frame["strength"]) == [row.strength for row in swept]
    assert frame["explanation"][1] == swept[1].explanation.text
    pytest.importorskip("matplotlib").use("Agg")
    figure = swept.plot()
    assert len(figure.axes) == 2
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"vector", "random direction", "shuffled edit"}
    assert list(lines["vector"].get_xdata()) == [-1.0, 0.5]
    assert list(lines["vector"].get_ydata()) == [swept[2].kl, swept[1].kl]


def test_a_vector_and_no_nla(source: Any) -> None:
    found = sweep(source, PROMPT, torch.ones(128), [1.0], layer=2, max_new_tokens=0)
    assert [row.direction for row in found] == ["not steered", "vector", "random direction"]
    assert all(row.explanation is None and row.text == "" and row.toward is None for row in found)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strengths": []}, "strengths"),
        ({"strengths": 1.0}, "strengths"),
        ({"strengths": [float("nan")]}, "strengths"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"toward": ""}, "toward"),
        ({"toward": 5}, "toward=5"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": None}, "seed=None"),
        ({"vector": torch.ones(5)}, "128"),
        ({"layer": None}, "layer="),
        ({"layer": 9}, "layer 9"),
        ({"vector": ("same", "same"), "nla": True}, "text itself"),
    ],
)
def test_bad_sweeps_are_named(tiny: NLA, source: Any, changes: dict, named: str) -> None:
    given = {"vector": torch.ones(128), "strengths": [1.0], "layer": 2, **changes}
    if given.pop("nla", None):
        given["nla"] = tiny
    vector, strengths = given.pop("vector"), given.pop("strengths")
    with pytest.raises(NLAError, match=named):
        sweep(source, PROMPT, vector, strengths, **given)
