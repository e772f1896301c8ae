"""What changes under a job, in the middle of it or between two runs: inputs, stores, NLAs."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nla_lens import NLA, NLAError, explain_corpus, open_store
from nla_lens.jobs import job as job_module
from nla_lens.jobs import reading, running

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
pq = pytest.importorskip("pyarrow.parquet")

TEXT = "Nora lives in Naples."
SHORT: dict[str, Any] = {"max_new_tokens": 2, "score": False}
LAST: dict[str, Any] = {"positions": "last", **SHORT}


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


@pytest.fixture
def after_the_first(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """`after_the_first(change)`: 8 rows at once, and a change when the first of them are read."""
    monkeypatch.setattr(running, "_ROWS_AT_ONCE", 8)
    original = reading.Reader.read

    def begin(change: Callable[[], object]) -> None:
        done: list[int] = []

        def read(self: Any, *args: Any) -> Any:
            found = original(self, *args)
            if not done:
                done.append(1)
                change()
            return found

        monkeypatch.setattr(reading.Reader, "read", read)

    return begin


def records(first: int, n: int = 20, **more: Any) -> str:
    return "".join(
        json.dumps({"text": f"{TEXT} {first + i:04d}", "id": i, **more}) + "\n" for i in range(n)
    )


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["texts", "columns", "cut", "replaced"])
def test_a_file_that_is_written_to_stops_its_job(
    what: str, tiny: NLA, tmp_path: Path, after_the_first: Callable
) -> None:
    """Each document keeps its one row: nothing but the content tells."""
    path = tmp_path / "d.jsonl"
    path.write_text(records(1000))
    whole = explain_corpus(tiny, path, tmp_path / "whole", **LAST).rows()

    def change() -> None:
        new = {
            "texts": records(2000),
            "columns": records(1000).replace('"id": 1', '"id": 7'),
            "cut": records(1000, 5),
            "replaced": records(2000),
        }[what]
        if what == "replaced":
            (tmp_path / "new").write_text(new)
            os.replace(tmp_path / "new", path)
        else:
            path.write_text(new)

    after_the_first(change)
    with pytest.raises(NLAError, match=r"document \d+ has changed since the job began"):
        explain_corpus(tiny, path, tmp_path / "s", **LAST)
    kept = open_store(tmp_path / "s")
    assert 8 <= len(kept) < 20 and kept.rows() == whole[: len(kept)]
    with pytest.raises(NLAError, match=r"made with input\."):
        explain_corpus(tiny, path, tmp_path / "s", **LAST)
    path.write_text(records(1000))
    assert explain_corpus(tiny, path, tmp_path / "s", **LAST).rows() == whole


def test_a_file_that_only_grows_is_no_other(
    tiny: NLA, tmp_path: Path, after_the_first: Callable
) -> None:
    """A log that is being written: the documents that were there are explained."""
    path = tmp_path / "d.jsonl"
    path.write_text(records(1000))
    after_the_first(lambda: path.write_text(records(1000) + records(5000)))
    store = explain_corpus(tiny, path, tmp_path / "s", **LAST)
    assert store.complete and [row["id"] for row in store.rows()] == list(range(20))


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_a_file_of_vectors_that_is_written_to_stops_its_job(
    kind: str, tiny: NLA, tmp_path: Path, after_the_first: Callable
) -> None:
    from safetensors.torch import save_file

    path, vectors = tmp_path / f"v.{kind}", torch.randn(20, 128)

    def write(vectors_ND: torch.Tensor) -> None:
        if kind == "npy":
            np.save(path, vectors_ND.numpy())
        elif kind == "safetensors":
            save_file({"v": vectors_ND}, path)
        else:
            table = {"vector": vectors_ND.tolist()}
            pq.write_table(pa.table(table), path, row_group_size=4)

    write(vectors)
    after_the_first(lambda: write(-vectors))
    with pytest.raises(NLAError, match="has changed since the job began"):
        explain_corpus(tiny, path, tmp_path / "s", vectors=True, **SHORT)
    kept = open_store(tmp_path / "s")
    assert len(kept) == 8 and torch.equal(kept.vectors(), vectors[:8])


def test_a_file_that_goes_away_costs_no_row_that_was_made(
    tiny: NLA, tmp_path: Path, after_the_first: Callable
) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"{TEXT} {i}")
    after_the_first((tmp_path / "15.txt").unlink)
    files = sorted(tmp_path.glob("*.txt"))
    with pytest.raises(NLAError, match=r"15\.txt cannot be read"):
        explain_corpus(tiny, files, tmp_path / "s", **LAST)
    assert len(open_store(tmp_path / "s")) == 8


def test_a_function_that_picks_others_is_another_job(tiny: NLA, tmp_path: Path) -> None:
    """Its name says nothing; so does that of a tokenizer."""

    def picking(position: int) -> Callable:
        return lambda tokens: [position]

    explain_corpus(tiny, [TEXT], tmp_path / "s", positions=picking(0), **SHORT)
    with pytest.raises(NLAError, match="was made with tokens="):
        explain_corpus(tiny, [TEXT], tmp_path / "s", positions=picking(3), **SHORT)
    turn = itertools.count()
    with pytest.raises(NLAError, match="document 0 has changed"):
        explain_corpus(tiny, [TEXT], tmp_path / "t", positions=lambda tokens: [next(turn)], **SHORT)


def test_what_comes_one_by_one_is_taken_as_far_as_asked(tiny: NLA, tmp_path: Path) -> None:
    endless = (f"{TEXT} {i}" for i in itertools.count())
    store = explain_corpus(tiny, endless, tmp_path / "s", limit=3, **LAST)
    assert len(store) == 3 and next(endless) == f"{TEXT} 3"

    def failing() -> Iterator[str]:
        yield TEXT
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        explain_corpus(tiny, failing(), tmp_path / "t", **LAST)
    assert not (tmp_path / "t").exists()


def test_numbers_of_a_frame_come_back_as_they_are(tiny: NLA, tmp_path: Path) -> None:
    numbers = [0.1234567890123456, 1e-300, 1 / 3]
    large = [2**53 + 1, 2**62 + 1, 5]
    frame = pd.DataFrame({"text": [TEXT] * 3, "x": numbers, "id": large, "few": [1, None, 3]})
    rows = explain_corpus(tiny, frame, tmp_path / "s", **LAST).rows()
    assert [row["x"] for row in rows] == numbers and [row["id"] for row in rows] == large
    assert [row["few"] for row in rows] == [1.0, None, 3.0]
    chats = [[{"role": "user", "content": TEXT}]]
    path = tmp_path / "f.parquet"
    pd.DataFrame({"text": chats, "n": [np.int64(3)]}).to_parquet(path)
    again = explain_corpus(tiny, pd.read_parquet(path), tmp_path / "t", **LAST)
    assert again.n_failed == 0 and again.rows()[0]["n"] == 3


def test_ids_of_mixed_types_are_not_rounded(tiny: NLA, tmp_path: Path) -> None:
    ids: list[Any] = [2**53 + 1, 1.5, None, "a", float("nan"), "a"]
    given = [{"text": TEXT, "id": i, "n": np.int32(4)} for i in ids] + [{"text": TEXT}]
    store = explain_corpus(tiny, given, tmp_path / "s", **LAST)
    assert [row["id"] for row in store.rows()] == [
        "9007199254740993", "1.5", None, '"a"', "NaN", '"a"', None
    ]  # fmt: skip
    assert store.manifest["columns"] == {"id": "json", "n": "int64"}
    numbers = explain_corpus(tiny, given[:2], tmp_path / "t", **LAST)
    assert [row["id"] for row in numbers.rows()] == ["9007199254740993", "1.5"]


# --- what ends a job ------------------------------------------------------------------------------


def test_an_error_that_is_nobodys_costs_no_row(
    tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_ROWS_AT_ONCE", 8)
    original, calls = reading.Reader.read, itertools.count()

    def read(self: Any, *args: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return original(self, *args)

    monkeypatch.setattr(reading.Reader, "read", read)
    with pytest.raises(RuntimeError, match="CUDA error"):
        explain_corpus(tiny, torch.randn(40, 128), tmp_path / "s", **SHORT)
    assert len(open_store(tmp_path / "s")) == 16


def test_ctrl_c_does_not_wait_for_what_is_being_read(
    tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_ROWS_AT_ONCE", 8)
    written, calls = threading.Event(), itertools.count()
    original_read, original_explain = reading.Reader.read, job_module.Job.explain

    def read(self: Any, *args: Any) -> Any:
        if next(calls) == 1:
            assert written.wait(20)
        return original_read(self, *args)

    def explain(self: Any, rows: Any) -> Iterator:
        for i, made in enumerate(original_explain(self, rows)):
            if i == 5:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(reading.Reader, "read", read)
    monkeypatch.setattr(job_module.Job, "explain", explain)
    with pytest.raises(KeyboardInterrupt):
        explain_corpus(tiny, torch.randn(40, 128), tmp_path / "s", **SHORT)
    assert len(open_store(tmp_path / "s")) == 5 and not written.is_set()
    written.set()


# --- other NLAs -----------------------------------------------------------------------------------


def test_another_precision_is_another_job(tiny: NLA, tmp_path: Path) -> None:
    """Also where the weights are the same numbers in both."""
    vectors, single = torch.randn(2, 128), NLA.from_pretrained("tiny", dtype=torch.bfloat16)
    explain_corpus(single, vectors, tmp_path / "s", **SHORT)
    for half in (single.verbalizer, single.reconstructor):
        half.engine.model.float()  # type: ignore[union-attr]
    with pytest.raises(NLAError, match=r"nla\.dtypes\.a[rv]='bfloat16', not 'float32'"):
        explain_corpus(single, vectors, tmp_path / "s", **SHORT)


def test_another_source_under_the_same_name_is_another_job(tiny: NLA, tmp_path: Path) -> None:
    model: Any = tiny.open_source(None, whole=True)
    explain_corpus(tiny, [TEXT], tmp_path / "s", **LAST)
    # The same, with all its blocks.
    explain_corpus(tiny, [TEXT], tmp_path / "s", model=model.model, **LAST)
    later = copy.deepcopy(model.model)
    with torch.no_grad():
        next(later.model.layers[0].parameters()).view(-1)[0] += 1
    with pytest.raises(NLAError, match="was made with source_weights="):
        explain_corpus(tiny, [TEXT], tmp_path / "s", model=later, **LAST)


# --- stores ---------------------------------------------------------------------------------------


def test_shards_of_another_store_are_named(tiny: NLA, tmp_path: Path) -> None:
    """The same name, the same number of rows: only what is written in them tells."""
    vectors = torch.randn(5, 128)
    ours = explain_corpus(tiny, vectors, tmp_path / "a", vectors=True, **SHORT)
    theirs = explain_corpus(tiny, vectors + 1, tmp_path / "b", vectors=True, **SHORT)
    rows, kept = ours.rows(), ours.vectors()
    for path in (ours.shards[range(5)], ours.vectors_path(range(5))):
        content = path.read_bytes()
        path.write_bytes((theirs.path / path.name).read_bytes())
        with pytest.raises(NLAError, match=rf"{path.name}.*another store"):
            (ours.vectors if path.suffix == ".safetensors" else ours.rows)()
        path.write_bytes(content)
    assert ours.rows() == rows and torch.equal(ours.vectors(), kept)
    # What an earlier version wrote says nothing of it.
    shard = ours.shards[range(5)]
    pq.write_table(pq.read_table(shard).replace_schema_metadata(None), shard)
    assert ours.rows() == rows


def test_shards_in_another_order_or_beyond_the_end_are_named(tiny: NLA, tmp_path: Path) -> None:
    store = explain_corpus(tiny, torch.randn(5, 128), tmp_path / "s", **SHORT)
    shard = store.shards[range(5)]
    content, table = shard.read_bytes(), pq.read_table(shard)
    pq.write_table(table.take([1, 0, 2, 3, 4]), shard)
    with pytest.raises(NLAError, match="in another order"):
        store.rows()
    shard.write_bytes(content)
    twice = store.path / "rows-000000005-000000009.parquet"
    twice.write_bytes(content)
    for look in (store.rows, store.missing, lambda: len(store)):
        with pytest.raises(NLAError, match="rows beyond the 5 of this store"):
            look()


def test_what_would_be_taken_for_done_is_looked_at(tiny: NLA, tmp_path: Path) -> None:
    """By the command that goes on, and not only by who reads the rows afterwards."""
    vectors = torch.randn(300, 128)

    def go_on() -> Any:
        return explain_corpus(tiny, vectors, tmp_path / "s", vectors=True, **SHORT)

    rows = go_on().rows()
    shard = open_store(tmp_path / "s").shards[range(256)]
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(NLAError, match=f"{shard.name} is damaged.*remove it"):
        go_on()
    shard.unlink()
    assert go_on().rows() == rows
    open_store(tmp_path / "s").vectors_path(range(256)).unlink()
    with pytest.raises(NLAError, match=f"is not there: remove {shard.name}"):
        go_on()
    shard.unlink()
    assert torch.equal(go_on().vectors(), vectors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": {"id": "string"}}, r"columns\.id='string', not 'int64'"),
        ({"n_rows": 2}, "n_rows=2, not 3"),
        ({"version": 2}, "version 2: it needs a newer nla-lens"),
        ({"seed": 7}, "seed=7"),
    ],
)
def test_an_edited_manifest_is_no_ground_to_go_on(
    change: dict[str, Any], said: str, tiny: NLA, tmp_path: Path
) -> None:
    given = [{"text": TEXT, "id": 1}] * 3
    path = explain_corpus(tiny, given, tmp_path / "s", **LAST).path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(NLAError, match=said):
        explain_corpus(tiny, given, tmp_path / "s", **LAST)
    with pytest.raises(NLAError):
        open_store(tmp_path / "s").rows()


def test_a_store_of_an_earlier_version_is_gone_on_with(tiny: NLA, tmp_path: Path) -> None:
    store = explain_corpus(tiny, [TEXT] * 3, tmp_path / "s", **LAST)
    manifest = {k: v for k, v in store.manifest.items() if k not in ("tokens", "source_weights")}
    manifest["nla"] = {k: v for k, v in manifest["nla"].items() if k != "dtypes"}
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    next(iter(store.shards.values())).unlink()
    assert explain_corpus(tiny, [TEXT] * 3, tmp_path / "s", **LAST).complete


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(
    code: int, tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(NLAError, match="locks no files: name a place on another"):
        explain_corpus(tiny, torch.randn(2, 128), tmp_path / "s", **SHORT)
