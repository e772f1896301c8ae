"""Corpora into stores: what is read, which positions, and that nothing is lost or done twice."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nla_lens import NLA, NLAError, explain_corpus, extract, open_store
from nla_lens.adapters.ray_workers import packed, unpacked
from nla_lens.disk import writing
from nla_lens.jobs import job as job_module
from nla_lens.jobs import running
from nla_lens.jobs.corpus import Excerpt
from nla_lens.jobs.positions import Picker, Tokens

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [
    "Nora lives in Naples. The fox chased the dog out of the kennel.",
    "The chef fried the garlic.",
    "It rains in Oslo.",
]
SHORT: dict[str, Any] = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def same_rows(found: list[dict], expected: list[dict]) -> None:
    """Equal but for the last bits of scores: a product's rounding depends on its rows.

    Trust is a function of them, and steeper.
    """
    scores = {"cos": 1e-6, "mse_nrm": 1e-6, "fve_nrm": 1e-6, "trust": 1e-4}

    def but_scores(row: dict) -> dict:
        return {k: v for k, v in row.items() if k not in scores}

    assert list(map(but_scores, found)) == list(map(but_scores, expected))
    for name, last_bits in scores.items():
        there = [r[name] for r in expected]
        assert [r[name] for r in found] == pytest.approx(there, abs=last_bits)


# --- the rows -------------------------------------------------------------------------------------


def test_rows_are_what_explain_gives(tiny: NLA, tmp_path: Path) -> None:
    store = explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT)
    at = 0
    for document, text in enumerate(TEXTS):
        expected = tiny.explain_text(text, **SHORT)
        found = store.explanations(document=document)
        same_rows([e.to_dict() for e in found], [e.to_dict() for e in expected])
        for position, e in enumerate(expected):
            row = store.rows(row=at)[0]
            assert (row["document"], row["position"], row["token"]) == (document, position, e.token)
            assert row["fve_nrm"] == pytest.approx(e.fve_nrm) and row["error"] is None
            at += 1
    assert len(store) == at and store.complete and store.n_failed == 0


def test_vectors_are_kept_where_asked_for(tiny: NLA, tmp_path: Path) -> None:
    store = explain_corpus(tiny, TEXTS, tmp_path / "s", positions="last", vectors=True, **SHORT)
    read = extract(tiny.spec.source_model, TEXTS, tiny.spec.layer, positions=-1)
    assert torch.equal(store.vectors(), torch.cat([r.as_subclass(torch.Tensor) for r in read]))
    without = explain_corpus(tiny, TEXTS[:1], tmp_path / "t", positions="last", **SHORT)
    with pytest.raises(NLAError, match="vectors=True"):
        without.vectors()


def test_samples_are_seeded_by_row(tiny: NLA, tmp_path: Path, monkeypatch) -> None:
    """However the rows are cut into shards and calls, and with a seed nobody chose."""
    wished = {**SHORT, "temperature": 1.0, "num_samples": 2}
    whole = explain_corpus(tiny, TEXTS, tmp_path / "s", **wished)
    seed = whole.manifest["seed"]
    assert isinstance(seed, int)
    monkeypatch.setattr(running, "_ROWS_AT_ONCE", 5)
    parts = explain_corpus(tiny, TEXTS, tmp_path / "t", seed=seed, **wished)
    assert parts.rows() == whole.rows()
    vectors = torch.cat(extract(tiny.spec.source_model, TEXTS, tiny.spec.layer))
    alone = tiny.explain(vectors, seed=seed, **wished)
    assert [e.text for e in alone] == [e.text for e in whole.explanations()]
    assert [len(row["samples"]) for row in whole.rows()] == [2] * len(whole)
    assert whole.explanations()[0].samples[0].text == alone[0].samples[0].text


# --- what is read ---------------------------------------------------------------------------------


def test_jsonl_with_columns_of_all_kinds(tiny: NLA, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "d.jsonl",
        {"text": TEXTS[0], "id": 1, "score": 1, "row": "mine", "tags": ["a"], "ok": True},
        "",
        {"id": 2, "text": TEXTS[1], "score": 2.5, "row": None, "tags": {"b": 1}, "ok": None},
    )
    store = explain_corpus(tiny, path, tmp_path / "s", positions="last", **SHORT)
    assert store.manifest["columns"] == {
        "id": "int64", "score": "double", "input_row": "string", "tags": "json", "ok": "bool"
    }  # fmt: skip
    first, second = store.rows()
    assert (first["id"], first["score"], first["input_row"], first["ok"]) == (1, 1.0, "mine", True)
    assert json.loads(first["tags"]) == ["a"] and second["input_row"] is None
    assert second["text"] == tiny.explain_text(TEXTS[1], -1, **SHORT)[0].text


def test_columns_no_table_has(tiny: NLA, tmp_path: Path) -> None:
    big, odd = 10**40, "\udcff"
    records = [{"text": TEXTS[0], "n": big, "x": 1.5, odd: odd}, {"text": TEXTS[1], "x": big}]
    store = explain_corpus(tiny, records, tmp_path / odd, positions="last", **SHORT)
    first, second = open_store(tmp_path / odd).rows()
    assert store.manifest["columns"] == {"n": "json", "x": "json", "\\udcff": "string"}
    assert json.loads(first["n"]) == big and json.loads(second["x"]) == big
    assert first["\\udcff"] == "\\udcff"
    assert len(explain_corpus(tiny, records, tmp_path / odd, positions="last", **SHORT)) == 2


def test_files_from_other_systems(tiny: NLA, tmp_path: Path) -> None:
    (tmp_path / "PLAIN.TXT").write_bytes(b"\xef\xbb\xbf" + TEXTS[1].encode())
    (tmp_path / "LINES.JSONL").write_text(json.dumps({"text": TEXTS[1]}))
    wanted = explain_corpus(tiny, [TEXTS[1]], tmp_path / "s", **SHORT).rows()
    for name in ("PLAIN.TXT", "LINES.JSONL"):
        found = explain_corpus(tiny, tmp_path / name, tmp_path / f"s-{name}", **SHORT)
        assert [r["token_id"] for r in found.rows()] == [r["token_id"] for r in wanted]
        assert [r["text"] for r in found.rows()] == [r["text"] for r in wanted]


def test_every_kind_of_text_file_gives_the_same_rows(tiny: NLA, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    (folder / ".hidden.txt").write_text("not this")
    (folder / "notes.pdf").write_text("nor this")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "d.parquet", row_group_size=2)
    frame = pytest.importorskip("pandas").DataFrame({"text": TEXTS, "n": [1, 2, 3]})
    sources = [TEXTS, folder, [folder / f"{i}.txt" for i in range(3)], tmp_path / "d.parquet"]
    sources += [lines(tmp_path / "d.jsonl", *({"text": t} for t in TEXTS)), frame]
    sources += [[{"text": t} for t in TEXTS]]
    for n, source in enumerate(sources):
        store = explain_corpus(tiny, source, tmp_path / f"s{n}", positions="last", **SHORT)
        said = [e.text for e in store.explanations()]
        if n == 0:
            expected = said
        assert said == expected
    assert [row["n"] for row in open_store(tmp_path / "s5").rows()] == [1, 2, 3]


def test_every_kind_of_vectors_gives_the_same_rows(tiny: NLA, tmp_path: Path) -> None:
    vectors = torch.randn(5, 128) * 13
    np.save(tmp_path / "v.npy", vectors.numpy())
    save_file({"a": vectors[:2], "b": vectors[2:].reshape(3, 1, 128)}, tmp_path / "v.safetensors")
    column = pa.array(vectors.tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"vector": column, "name": list("abcde")}), tmp_path / "v.parquet")
    expected = [e.text for e in tiny.explain(vectors, **SHORT)]
    sources = [vectors, vectors.numpy(), [vectors[:2], vectors[2:]]]
    foreign = vectors.numpy().astype(">f4")
    np.save(tmp_path / "big-endian.npy", foreign)
    np.save(tmp_path / "long.npy", np.asfortranarray(vectors.numpy(), dtype=np.longdouble))
    fixed = vectors.numpy().copy()
    fixed.flags.writeable = False
    sources += [foreign, fixed, vectors.numpy()[::-1][::-1], list(foreign)]
    sources += [tmp_path / name for name in ("big-endian.npy", "long.npy")]
    sources += [tmp_path / name for name in ("v.npy", "v.safetensors", "v.parquet")]
    for n, source in enumerate(sources):
        store = explain_corpus(tiny, source, tmp_path / f"s{n}", vectors=True, **SHORT)
        assert [e.text for e in store.explanations()] == expected
        assert torch.equal(store.vectors(), vectors)
    assert [row["name"] for row in store.rows()] == list("abcde")


def test_others_read_the_shards(tiny: NLA, tmp_path: Path, monkeypatch) -> None:
    store = explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT)
    shards = sorted((tmp_path / "s").glob("rows-*.parquet"))
    table = pq.read_table(shards[0])
    assert table.schema.field("norm").type == pa.float32()
    assert table.column("text").to_pylist() == [e.text for e in store.explanations()]
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(
        "parquet", data_files=list(map(str, shards)), cache_dir=str(tmp_path / "cache")
    )
    assert found["train"]["text"][:] == table.column("text").to_pylist()


def test_an_excerpt_reads_as_the_whole_and_is_small(tiny: NLA) -> None:
    """What a worker elsewhere is sent: some documents and their part of the plan."""
    vectors = torch.randn(5000, 128)
    for source, rows in ((vectors, range(300, 310)), (TEXTS, range(3, 20))):
        whole = job_module.Job.of(tiny, source, options=SHORT)
        numbers = whole.plan.documents(rows)
        sent = pickle.dumps((Excerpt(whole.reader.corpus, numbers), whole.plan.of(numbers)))
        assert len(sent) < 30_000
        excerpt, plan = pickle.loads(sent)
        found = whole.reader.over(excerpt).read(rows, plan)
        for one, other in zip(found, whole.reader.read(rows, whole.plan), strict=True):
            assert (one.number, one.document) == (other.number, other.document)
            assert (one.before, one.after) == (other.before, other.after)
            assert torch.equal(one.vector, other.vector)
        assert [row.number for row in found] == list(rows)


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_worker_of_ray_sends_back(tiny: NLA, kept: bool) -> None:
    """Without Ray; on a cluster it is in `ray_jobs/`."""
    vectors = torch.randn(9, 128)
    vectors[5, 1] = float("nan")
    columns = {"id": [3, None], "say": "half \ud800 of a pair"}
    rows = [{"text": TEXTS[0], **columns}, {"text": 7, **columns}]
    for source in (vectors, rows):
        made = list(job_module.Job.of(tiny, source, options=SHORT).run(range(9)))
        sent = packed(made[:6], "it failed", made[7:], vectors=kept)
        first, failure, later = unpacked(**sent, d_model=128)
        assert failure == "it failed" and (len(first), len(later)) == (6, 2)
        for (row, values), (wanted, expected) in zip(
            [*first, *later], [*made[:6], *made[7:]], strict=True
        ):
            assert values == expected
            for name in ("number", "document", "error", "before", "after"):
                assert getattr(row, name) == getattr(wanted, name)
            assert (row.vector is not None) == (kept and wanted.vector is not None)
            assert row.vector is None or torch.equal(row.vector, wanted.vector)


# --- positions ------------------------------------------------------------------------------------

WORDS = ["a", " bb", ".", " c", " bb", "."]


@pytest.mark.parametrize(
    ("rules", "picked"),
    [
        (["all"], [0, 1, 2, 3, 4, 5]),
        (["last"], [5]),
        (["every:2"], [0, 2, 4]),
        (["from:4"], [4, 5]),
        (["from:50"], []),
        (["spread:2"], [0, 5]),
        (["spread:3"], [0, 2, 5]),
        (["spread:1"], [5]),
        (["spread:60"], [0, 1, 2, 3, 4, 5]),
        ([r"regex:\bb+$"], [1, 4]),
        ([r"regex:a:b|\."], [2, 5]),
        (["from:2", r"regex:\w", "last"], [4]),
        ([lambda tokens: [-1, 0, 0]], [0, 5]),
        ([lambda tokens: torch.tensor([3])], [3]),
    ],
)
def test_rules_pick_positions(rules: list, picked: list[int]) -> None:
    tokens = Tokens(list(range(6)), WORDS, None, None)
    assert Picker.of(rules)(tokens) == picked


@pytest.mark.parametrize(
    "given",
    [
        "",
        "al",
        "every",
        "every:0",
        "every:-1",
        "spread:0",
        "from:x",
        "regex:(",
        [],
        [3],
        3,
        "every:" + "9" * 5000,
    ],
)
def test_rules_that_are_none_are_named(given: object) -> None:
    with pytest.raises(NLAError, match="positions="):
        Picker.of(given)


def test_assistant_turns(tiny: NLA, load_pair, source_dir, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source_dir("llama"))
    chat = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "The fox."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "The dog."},
    ]
    ids = list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))
    tokens = Tokens(ids, tokenizer.convert_ids_to_tokens(ids), chat, tokenizer)
    picked = Picker.of("assistant")(tokens)
    said = tokenizer.decode([ids[i] for i in picked])
    assert "The fox." in said and "The dog." in said and "Who" not in said and "And" not in said
    with pytest.raises(NLAError, match="a text"):
        Picker.of("assistant")(Tokens([1], ["a"], None, tokenizer))


# --- bad input ------------------------------------------------------------------------------------


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (lambda d: d / "none.txt", {}, "is not there"),
        (lambda d: lines(d / "a.jsonl", {"prompt": "x"}), {}, "'text' or 'messages'.*prompt"),
        (lambda d: lines(d / "a.jsonl", {"text": "x"}), {"column": "body"}, "'body'.*text"),
        (lambda d: lines(d / "a.jsonl"), {}, "no documents"),
        (lambda d: d, {}, "holds no .txt"),
        (lambda d: [], {}, "no documents"),
        (lambda d: [1], {}, "document 0 is a int"),
        (lambda d: {"text": "x"}, {}, "dict is no corpus"),
        (lambda d: 7, {}, "int is no corpus"),
        (lambda d: torch.zeros(3, 128, dtype=torch.long), {}, "int64"),
        (lambda d: torch.randn(3, 64), {}, "width 64 instead of 128"),
        (lambda d: np.zeros(3, dtype=[("a", "f4", (128,))]), {}, "are no vectors"),
        (lambda d: d / "a\0b", {}, "is not there"),
        (lambda d: "~nosuchuser/x", {}, "is not there"),
        (lambda d: Path("/dev/zero"), {}, "no regular file"),
        (lambda d: os.mkfifo(d / "a.txt") or d / "a.txt", {}, "no regular file"),
        (lambda d: lines(d / "a.csv", "text,n"), {}, "a table.*jsonl"),
        (lambda d: [{"text": "x", "me": CYCLE}], {}, "document 0 of the list"),
        (lambda d: [{"text": "x", (1, 2): 3}], {}, "document 0 of the list"),
        (lambda d: pd.DataFrame([["a", "b"]], columns=["text", "text"]), {}, "data frame"),
        (lambda d: ["x"], {"limit": True}, "limit=True"),
        (lambda d: ["x"], {"positions": "frist"}, "positions='frist'"),
        (lambda d: ["x"], {"positions": "from:99"}, "no token is picked"),
        (lambda d: ["x"], {"limit": 0}, "limit=0"),
        (lambda d: ["x"], {"temperature": -1}, "temperature=-1"),
    ],
)
def test_bad_input_is_named_before_anything_runs(
    tiny: NLA, tmp_path: Path, make: Callable, options: dict, named: str
) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(NLAError, match=named):
        explain_corpus(tiny, make(tmp_path / "in"), tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_damaged_files_are_named(tiny: NLA, tmp_path: Path) -> None:
    for name in ("a.parquet", "a.npy", "a.safetensors", "a.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 nothing of the kind")
        with pytest.raises(NLAError, match=name):
            explain_corpus(tiny, tmp_path / name, tmp_path / "s")
    np.save(tmp_path / "o.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(NLAError, match=r"o\.npy"):
        explain_corpus(tiny, tmp_path / "o.npy", tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(NLAError, match="no store"):
        explain_corpus(tiny, ["x"], tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]


def test_what_cannot_be_explained_is_a_row_with_its_reason(tiny: NLA, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "d.jsonl", {"text": TEXTS[0]}, "{broken", {"text": 3}, {"text": TEXTS[1]}
    )
    store = explain_corpus(tiny, path, tmp_path / "s", positions="last", **SHORT)
    errors = [row["error"] for row in store.rows()]
    assert errors[0] is None and errors[3] is None and store.n_failed == 2
    assert "line 2" in errors[1] and "text is 3" in errors[2]
    assert [e.token for e in store.explanations()] == [".", "."]
    with pytest.raises(NLAError, match=r"2 of 4 documents.*line 2"):
        explain_corpus(tiny, path, tmp_path / "t", strict=True, **SHORT)
    vectors = torch.randn(4, 128)
    vectors[1, 5], vectors[2] = float("nan"), 0.0
    store = explain_corpus(tiny, vectors, tmp_path / "v", vectors=True, **SHORT)
    assert [row["error"] for row in store.rows()][1:3] == [
        "the vector holds NaN or infinity", "the vector is all zero"
    ]  # fmt: skip
    good = tiny.explain(vectors[[0, 3]], **SHORT)
    assert [e.text for e in store.explanations()] == [e.text for e in good]
    with pytest.raises(NLAError, match="row 1"):
        explain_corpus(tiny, vectors, tmp_path / "w", strict=True, **SHORT)


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, NLAError])
def test_an_interrupted_job_goes_on(
    tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type
) -> None:
    vectors = torch.randn(40, 128) * 13
    whole = explain_corpus(tiny, vectors, tmp_path / "whole", **SHORT)
    original = type(tiny.verbalizer).answers
    seen: list[int] = []

    def stopping(self: Any, *args: Any, **options: Any) -> Iterator:
        for answer in original(self, *args, **options):
            if len(seen) == 17:
                seen.append(-1)
                raise error("stop")
            seen.append(answer[0])
            yield answer

    monkeypatch.setattr(type(tiny.verbalizer), "answers", stopping)
    with pytest.raises(error):
        explain_corpus(tiny, vectors, tmp_path / "s", batch_size=8, **SHORT)
    part = open_store(tmp_path / "s")
    assert len(part) == 17 and not part.complete and "17 rows (of 40)" in repr(part)
    seen.append(-2)
    done = explain_corpus(tiny, vectors, tmp_path / "s", **SHORT)
    same_rows(done.rows(), whole.rows())
    assert len([row for row in seen if row >= 0]) == 40
    again = explain_corpus(tiny, vectors, tmp_path / "s", **SHORT)
    same_rows(again.rows(), whole.rows())
    assert len([row for row in seen if row >= 0]) == 40


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"positions": "last"}, "positions"),
        ({"max_new_tokens": 13}, "options.max_new_tokens=12, not 13"),
        ({"temperature": 1.0}, "options.temperature"),
        ({"prompt": "What is <INJECT>?"}, "options.prompt"),
        ({"score": False}, "options.score"),
        ({"limit": 2}, "input.n_documents"),
        ({"vectors": True}, "vectors"),
    ],
)
def test_other_settings_are_refused_by_name(
    tiny: NLA, tmp_path: Path, change: dict, named: str
) -> None:
    explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT)
    with pytest.raises(NLAError, match=named):
        explain_corpus(tiny, TEXTS, tmp_path / "s", **{**SHORT, **change})


def test_other_input_or_checkpoint_is_refused(tiny: NLA, tmp_path: Path) -> None:
    explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT)
    with pytest.raises(NLAError, match=r"input\.sha256"):
        explain_corpus(tiny, [*TEXTS[:2], "It rains in Rome."], tmp_path / "s", **SHORT)
    with pytest.raises(NLAError, match=r"nla\."):
        other = NLA.from_pretrained("tiny-norm-matched")
        explain_corpus(other, TEXTS, tmp_path / "s", **SHORT)


def test_other_weights_under_the_same_sidecar_are_refused(tiny: NLA, tmp_path: Path) -> None:
    """Two steps of one training say the same of themselves."""
    explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT)
    for half, names in (
        ("verbalizer", r"nla\.weights\.av"),
        ("reconstructor", r"nla\.weights\.ar"),
    ):
        later = NLA.from_pretrained("tiny")
        with torch.no_grad():
            next(getattr(later, half).engine.model.parameters()).view(-1)[0] += 1
        with pytest.raises(NLAError, match=names):
            explain_corpus(later, TEXTS, tmp_path / "s", **SHORT)


def test_a_second_job_is_refused_and_a_stale_lock_is_no_reason(tiny: NLA, tmp_path: Path) -> None:
    from nla_lens.results.growing_store import GrowingStore

    with GrowingStore.writing(tmp_path / "s"), pytest.raises(NLAError, match="being written"):
        explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT)
    assert (tmp_path / "s" / ".store.lock").exists()
    assert explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT).complete


def test_a_damaged_shard_is_named_and_made_again(tiny: NLA, tmp_path: Path) -> None:
    whole = explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT).rows()
    (shard,) = (tmp_path / "s").glob("rows-*")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(NLAError, match=r"damaged.*remove it"):
        open_store(tmp_path / "s").rows()
    shard.unlink()
    assert explain_corpus(tiny, TEXTS, tmp_path / "s", **SHORT).rows() == whole


def test_what_does_not_belong_to_a_store_is_named(tiny: NLA, tmp_path: Path) -> None:
    store = explain_corpus(tiny, TEXTS, tmp_path / "s", positions="last", vectors=True, **SHORT)
    (shard,) = store.shards.values()
    rows, content = store.rows(), shard.read_bytes()
    for name in ("rows-000000005-000000003.parquet", "other.parquet"):
        (store.path / name).write_bytes(content)
    os.mkfifo(store.path / "rows-000000007-000000007.parquet")
    assert open_store(store.path).rows() == rows and store.complete
    twice = store.path / "rows-000000000-000000001.parquet"
    twice.write_bytes(content)
    with pytest.raises(NLAError, match="hold the same rows"):
        open_store(store.path).rows()
    twice.unlink()
    pq.write_table(pq.read_table(shard).slice(1), shard)  # fewer rows than its name says
    with pytest.raises(NLAError, match=r"damaged \(2 rows"):
        open_store(store.path).to_pandas()
    shard.write_bytes(content)
    for vectors in ({"vectors": torch.ones(2, 128)}, {"others": torch.ones(3, 128)}):
        save_file(vectors, store.vectors_path(range(3)))
        with pytest.raises(NLAError, match="damaged"):
            store.vectors()
    store.texts_path(range(3)).write_text('{"row": 0, "before": 5}\n')
    with pytest.raises(NLAError, match="damaged"):
        store.page()
    for wanted in ({"document": "x"}, {"row": 10**30}, {"token_ids": [1]}):
        with pytest.raises(NLAError, match="cannot be in that column"):
            store.rows(**wanted)


@pytest.mark.parametrize(
    "manifest",
    ["", "{}", "[]", '{"format": "nla_lens.store", "version": 1}', "x" * 100, "[" * 9999],
)
def test_what_is_no_store_is_said(tmp_path: Path, manifest: str) -> None:
    with pytest.raises(NLAError, match="store"):
        open_store(tmp_path / "none")
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(NLAError, match=tmp_path.name):
        open_store(tmp_path)


# --- full disks ----------------------------------------------------------------------------------


class SmallDisk:
    """A folder in which so many bytes fit: a tmpfs where this process may mount one.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._room = path, 64 << 10
        path.mkdir()
        self._is_mounted = self._mount("size=64k")
        if not self._is_mounted:
            # Elsewhere: what writes says what a full disk says.
            original = writing._put

            def put(file: Any, content: Any) -> None:
                original(file, content)
                if sum(p.stat().st_size for p in path.rglob("*")) > self._room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(writing, "_put", put)

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def make_room(self) -> None:
        self._room = 64 << 20
        if self._is_mounted:
            assert self._mount("remount,size=64m")

    def close(self) -> None:
        if self._is_mounted:
            subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk", monkeypatch)
    yield disk
    disk.close()


def test_a_job_on_a_full_disk_goes_on_when_there_is_room(
    tiny: NLA, tmp_path: Path, small_disk: SmallDisk
) -> None:
    vectors, out = torch.randn(1024, 128) * 13, small_disk.path / "s"
    with pytest.raises(NLAError, match="make room"):
        explain_corpus(tiny, vectors, out, max_new_tokens=8)
    begun = open_store(out)
    assert 0 < len(begun) < 1024 and len(begun.rows()) == len(begun)
    assert [p.name for p in out.iterdir() if p.name.endswith(".partial")] == []
    with pytest.raises(NLAError, match="make room"):
        explain_corpus(tiny, vectors, out, max_new_tokens=8)
    kept = {path: path.stat().st_mtime_ns for path in begun.shards.values()}
    small_disk.make_room()
    done = explain_corpus(tiny, vectors, out, max_new_tokens=8)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = explain_corpus(tiny, vectors, tmp_path / "whole", max_new_tokens=8)
    same_rows(done.rows(), whole.rows())


# --- kills ----------------------------------------------------------------------------------------

KILLED = """
import sys, nla_lens, torch
from nla_lens.jobs import job, running
nla = nla_lens.NLA.from_pretrained("tiny")
vectors = torch.load(sys.argv[1], weights_only=True)
counted = open(sys.argv[3], "a", buffering=1)
original = job.Job.explain
def counting(self, read):
    for row, values in original(self, read):
        counted.write(f"{row.number}\\n")
        yield row, values
job.Job.explain = counting
running._ROWS_AT_ONCE = 64
store = nla_lens.explain_corpus(nla, vectors, sys.argv[2], max_new_tokens=12, batch_size=8)
print(len(store))
"""


def kills(tmp_path: Path, tiny: NLA, n_rows: int, n_kills: int) -> None:
    """A job killed at random moments and started again, until it is done."""
    vectors = torch.randn(n_rows, 128) * 13
    torch.save(vectors, tmp_path / "v.pt")
    counts = tmp_path / "counts"
    command = [sys.executable, "-c", KILLED, tmp_path / "v.pt", tmp_path / "s", counts]
    rng, killed = random.Random(0), 0
    while killed < n_kills:
        before = counts.stat().st_size if counts.exists() else 0
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
        while process.poll() is None and (not counts.exists() or counts.stat().st_size == before):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        if counts.exists() and open_store(tmp_path / "s").complete:
            break
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(n_rows)
    whole = explain_corpus(tiny, vectors, tmp_path / "whole", max_new_tokens=12)
    same_rows(open_store(tmp_path / "s").rows(), whole.rows())
    made = [int(line) for line in counts.read_text().split()]
    twice = len(made) - len(set(made))
    print(f"\n{killed} kills, {twice} of {n_rows} rows made twice")
    assert twice <= job_module._ROWS_PER_SHARD * killed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_killed_again_and_again_goes_on(tmp_path: Path, tiny: NLA) -> None:
    """Eight kills in the whole check; NLA_LENS_KILLS=40 is what was promised."""
    kills(tmp_path, tiny, 400, int(os.environ.get("NLA_LENS_KILLS", "8")))
