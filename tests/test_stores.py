"""Files that grow, files that appear whole: kills, power cuts, full disks, several writers."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nla_lens import NLAError, NLAWarning
from nla_lens.adapters.dictionaries.feature_table import FeatureExplanations, FeatureStore
from nla_lens.disk import writing
from nla_lens.disk.writing import write_whole
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations

from .killed_writer import latent

ABOUT = {"a": 1}


def stored(path: Path, n: int = 5) -> Path:
    with FeatureStore.open(path, ABOUT) as store:
        for i in range(n):
            store.append(latent(i))
    return path


def found(path: Path) -> list[int]:
    with FeatureStore.open(path, ABOUT) as store:
        return list(store.finished)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.jsonl"


# --- damage ---


@pytest.mark.parametrize(
    "tail", [b'{"index": 7', b'{"index": 7, "text": "\xc3', b"\xff", b"\0" * 99]
)
def test_a_torn_last_line_is_cut_off_in_one_call(
    tail: bytes, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stored(path).read_bytes()
    path.write_bytes(whole + tail)
    cuts: list[int] = []
    cut = os.ftruncate
    monkeypatch.setattr(os, "ftruncate", lambda file, size: (cuts.append(size), cut(file, size)))
    monkeypatch.setattr(os, "write", None)
    assert found(path) == [0, 1, 2, 3, 4]
    assert cuts == [len(whole)] and path.read_bytes() == whole


def test_a_store_cut_anywhere_keeps_all_whole_lines(path: Path) -> None:
    whole = stored(path, 2).read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    places = {*range(ends[0] + 3), *(e + d for e in ends for d in (-1, 0, 1)), ends[0] + 30}
    for length in sorted(p for p in places if p <= len(whole)):
        path.write_bytes(whole[:length])
        assert found(path) == list(range(sum(end < length for end in ends[1:]))), length
        assert [*found(stored(path, 2))] == [0, 1]


@pytest.mark.parametrize(
    "bad", [b"", b"{", b'{"index": 2}', b"\xc3\x28", b"[]", b"[" * 10**5, b"\0"]
)
def test_a_bad_line_costs_that_line(bad: bytes, path: Path) -> None:
    lines = stored(path).read_bytes().split(b"\n")
    lines[3] = bad
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.warns(NLAWarning, match="is damaged at line 4: .*left out"):
        assert found(path) == [0, 1, 3, 4]
    assert path.read_bytes() == before
    with pytest.warns(NLAWarning), FeatureStore.open(path, ABOUT) as store:
        store.append(latent(2))
    with pytest.warns(NLAWarning):
        assert [e.index for e in FeatureExplanations.load(path)] == [0, 1, 3, 4, 2]


@pytest.mark.parametrize("content", [b"hello", b'{"format": "other"', b"\xff\xfe", b"PK\3\4" * 9])
def test_another_file_is_not_written_to(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(NLAError):
        found(path)
    assert path.read_bytes() == content


# --- several writers ---


def test_a_second_writer_is_refused(path: Path, tmp_path: Path) -> None:
    stored(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    code = (
        "import sys; from pathlib import Path\n"
        "from nla_lens.adapters.dictionaries.feature_table import FeatureStore\n"
        "with FeatureStore.open(sys.argv[1], {'a': 1}): pass"
    )
    with FeatureStore.open(path, ABOUT) as store:
        for name in (path, link):
            with pytest.raises(NLAError, match="is being written by another process or thread"):
                found(name)
        run = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True
        )
        assert "is being written by another process" in run.stderr
        # Whoever only reads is let in.
        assert len(FeatureExplanations.load(path)) == 5
        store.append(latent(9))
    assert found(path) == [0, 1, 2, 3, 4, 9]


def test_savers_share_nothing(path: Path) -> None:
    made = [Explanations([Explanation(f"{n}" * 50_000, "", [], True, 1.0)]) for n in range(4)]
    threads = [threading.Thread(target=lambda e=e: [e.save(path) for _ in range(10)]) for e in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Explanations.load(path) in made
    assert os.listdir(path.parent) == [path.name]


# --- full disks ---


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 20,000 bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "save": lambda path: Explanations([Explanation("x" * 30_000, "", [], True, 1.0)]).save(path),
    "to_html": lambda path: Explanations([Explanation("x" * 30_000, "", [], True, 1.0)]).to_html(
        path
    ),
    "features": lambda path: FeatureExplanations([latent(0), latent(1)]).save(path),
    "neuronpedia": lambda path: FeatureExplanations([latent(0), latent(1)]).to_neuronpedia(
        path, model_id="a", source_id="b"
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_what_was_there(writer: str, path: Path, small_files: None) -> None:
    path.write_text("before")
    with pytest.raises(NLAError, match=r"cannot be written: .*make room"):
        WRITERS[writer](path)
    assert path.read_text() == "before" and os.listdir(path.parent) == [path.name]


def test_a_full_disk_leaves_whole_lines(path: Path, small_files: None) -> None:
    with (
        pytest.raises(NLAError, match=r"cannot be written: .*make room"),
        FeatureStore.open(path, ABOUT) as store,
    ):
        for n in range(10):
            store.append(latent(n))
    assert path.read_bytes().endswith(b"\n")
    assert found(path) == [0]


@pytest.mark.parametrize("name", ["no/such/x", "\0", "x" * 300, "", "."])
@pytest.mark.parametrize("writer", WRITERS)
def test_places_that_cannot_be_written(writer: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(NLAError, match="cannot be written"):
        WRITERS[writer](tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_writer_cleans_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "x")
    assert os.listdir(path.parent) == []


def test_links_modes_and_bytes_are_kept(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path.name)
    path.write_text("before")
    path.chmod(0o640)
    assert write_whole(link, "a\ud800é") == link
    assert link.is_symlink() and path.read_text("utf-8") == "a\\ud800é"
    assert path.stat().st_mode & 0o777 == 0o640
    assert write_whole(path, lambda file: file.write(b"\xff")).read_bytes() == b"\xff"


def test_half_of_a_surrogate_pair_comes_back(path: Path) -> None:
    odd = "a\ud800b\x9b\u202e"
    saved = Explanations([Explanation(odd, odd, [], True, 1.0, token=odd)])
    assert Explanations.load(saved.save(path)) == saved
    assert b"\xc2\x9b" not in path.read_bytes()
    assert saved.to_pandas().to_csv().encode("utf-8")
    page = saved.to_html(path.with_name("x.html")).read_bytes().decode("utf-8")
    assert "<bdi>a\\ud800b\\x9b\\u202e</bdi>" in page


# --- kills ---


def kill_soon(kind: str, path: Path, draw: random.Random) -> int:
    """The last number that a writer said was written before it was killed; -1 for none."""
    command = [sys.executable, str(Path(__file__).with_name("killed_writer.py")), kind, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.08))
        process.kill()
        said = process.stdout.read().split("\n")
    return int(said[-2]) if len(said) > 1 else -1


def check_after(kind: str, path: Path, last: int, before: int) -> int:
    if kind == "save":
        if path.exists():
            loaded = Explanations.load(path)
            assert all(e == loaded[0] for e in loaded)
        assert path.exists() or last < 0
        return last
    if kind == "append":
        with FeatureStore.open(path, ABOUT) as store:
            assert list(store.finished) == list(range(len(store.finished)))
            assert len(store.finished) > max(last, before)
            return len(store.finished) - 1
    if kind == "repair":
        assert found(path) == [0, 1, 2, 3, 4]
        return last
    # Created again and again: whatever is there can be gone on with.
    if path.exists():
        with FeatureStore.open(path, {"a": 1, "long": latent(0).text[2:]}) as store:
            assert len(store.finished) <= 1
    return last


def kills(kind: str, path: Path, n: int) -> None:
    draw, before = random.Random(0), -1
    if kind == "repair":
        stored(path)
    for _ in range(n):
        before = check_after(kind, path, kill_soon(kind, path, draw), before)


@pytest.mark.parametrize("kind", ["save", "append", "repair", "create"])
def test_a_killed_writer_loses_nothing(kind: str, path: Path) -> None:
    kills(kind, path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["save", "append", "repair", "create"])
def test_killed_writers_lose_nothing(kind: str, path: Path) -> None:
    """25 kills each in the whole check; NLA_LENS_KILLS=100 was run, and lost nothing."""
    kills(kind, path, int(os.environ.get("NLA_LENS_KILLS", "25")))


def test_the_error_numbers_of_a_full_disk() -> None:
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        with pytest.raises(NLAError, match="make room"), writing.writing("x"):
            raise OSError(number, os.strerror(number))
