"""Jobs on a real Ray cluster of two nodes: workers, a node and the starting process are killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import torch
from click.testing import CliRunner

import nla_lens
from nla_lens import NLA, NLAError, open_store
from nla_lens.adapters import ray_jobs
from nla_lens.jobs.job import Job
from nla_lens.results.store import Store
from tests.test_jobs import same_rows

# Workers import torch, each for itself, on a machine that may be slow.
pytestmark = pytest.mark.timeout(540)

ROWS_PER_SHARD = 8
N_ROWS = 160
TEXTS = [f"Nora lives in Naples, number {i}." for i in range(N_ROWS)]
WISHED: dict[str, Any] = {"max_new_tokens": 60, "batch_size": 4}


class SmallShards:
    """So that there is something to be killed between."""

    @staticmethod
    def of(*args: Any, **options: Any) -> Job:
        return replace(Job.of(*args, **options), rows_per_shard=ROWS_PER_SHARD)


def counted(log: Path) -> Callable[[Any], list[int]]:
    """A rule for positions that notes who read which document."""

    def last(tokens: Any) -> list[int]:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {tokens.ids}\n")
        return [-1]

    return last


def done_twice(log: Path) -> int:
    """Rows that workers made more than once; the starting process only looks at each."""
    here = f"{os.getpid()} "
    made = Counter(
        line.split(" ", 1)[1] for line in log.read_text().splitlines() if not line.startswith(here)
    )
    assert len(made) <= N_ROWS
    return sum(made.values()) - len(made)


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


@pytest.fixture(scope="module")
def whole(tiny: NLA, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What one process makes without being interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return nla_lens.explain_corpus(tiny, TEXTS, folder / "s", positions="last", **WISHED)


@contextlib.contextmanager
def meanwhile(store: Path, *acts: tuple[int, Callable[[], None]]) -> Iterator[list[int]]:
    """Acts as soon as there are so many shards; gives how many there were each time."""
    over, at = threading.Event(), list[int]()

    def watch() -> None:
        for least, act in acts:
            while (n := len(list(store.glob("rows-*")))) < least:
                if over.wait(0.05):
                    return
            at.append(n)
            act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield at
    finally:
        over.set()
        thread.join()


def workers_of(node: Any) -> list[psutil.Process]:
    """The processes on a node that hold an NLA."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = []
    for process in raylet.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()) or "MapBatches" in process.name():
                found.append(process)
    return found


def test_a_worker_and_a_node_are_killed(
    cluster: Any, tiny: NLA, whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store that one process has begun. There is no room for the node's worker elsewhere: the
    other one makes what it was at."""
    log, out = tmp_path / "log", tmp_path / "s"
    rule, original = counted(log), type(tiny.verbalizer).answers

    def stopping(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        for n, answer in enumerate(original(self, *args, **options)):
            if n == 11:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tiny.verbalizer), "answers", stopping)
        nla_lens.explain_corpus(tiny, TEXTS, out, positions=rule, **WISHED)
    begun = set(open_store(out).shards)
    assert 0 < sum(map(len, begun)) <= 11
    monkeypatch.setattr(ray_jobs, "Job", SmallShards)
    second = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)

    def kill_worker() -> None:
        (process,) = workers_of(cluster.head_node)
        process.send_signal(signal.SIGKILL)

    def kill_node() -> None:
        cluster.remove_node(second, allow_graceful=False)

    n_begun = len(begun)
    with meanwhile(out, (n_begun + 2, kill_worker), (n_begun + 6, kill_node)) as at:
        store = ray_jobs.explain_corpus("tiny", TEXTS, out, workers=2, positions=rule, **WISHED)
    assert len(at) == 2 and at[1] < N_ROWS / ROWS_PER_SHARD - 2
    assert len(cluster.list_all_nodes()) == 1
    assert begun <= set(store.shards)
    same_rows(store.rows(), whole.rows())
    # The shard in flight of either, and what the node held that nobody had fetched yet.
    assert done_twice(log) <= 4 * ROWS_PER_SHARD


DRIVER = """
import sys
from dataclasses import replace
from nla_lens.adapters import ray_jobs
from tests.ray_jobs.test_ray_jobs import SmallShards, TEXTS, WISHED
ray_jobs.Job = SmallShards
ray_jobs.explain_corpus(
    "tiny", TEXTS, sys.argv[1], workers=1, address=sys.argv[2], positions="last", **WISHED)
"""


def test_the_starting_process_is_killed(
    cluster: Any, tiny: NLA, whole: Store, tmp_path: Path
) -> None:
    """The same call goes on in one process without Ray."""
    out = tmp_path / "s"
    root = str(Path(nla_lens.__file__).parents[1])
    command = [sys.executable, "-c", DRIVER, str(out), cluster.address]
    driver = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": root})
    with meanwhile(out, (3, lambda: driver.send_signal(signal.SIGKILL))):
        driver.wait()
    assert driver.returncode == -signal.SIGKILL
    begun = open_store(out)
    assert 3 * ROWS_PER_SHARD <= len(begun) < N_ROWS
    kept = {path.name: path.stat().st_mtime_ns for path in begun.shards.values()}
    store = nla_lens.explain_corpus(tiny, TEXTS, out, positions="last", **WISHED)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    same_rows(store.rows(), whole.rows())


def test_an_nla_in_memory_vectors_and_a_failure(cluster: Any, tiny: NLA, tmp_path: Path) -> None:
    """What is finished before a row that stops a strict job is in the store, with its vector."""
    vectors = torch.randn(12, 128) * 13
    vectors[8, 3] = float("nan")
    with pytest.raises(NLAError, match=r"row 8 \(document 8\).*NaN"):
        ray_jobs.explain_corpus(
            tiny, vectors, tmp_path / "s", vectors=True, strict=True, max_new_tokens=12
        )
    begun = open_store(tmp_path / "s")
    assert len(begun) == 8 and torch.equal(begun.vectors(), vectors[:8])
    assert [e.text for e in begun.explanations()] == [
        e.text for e in tiny.explain(vectors[:8], max_new_tokens=12)
    ]


def test_the_page_is_true_on_the_command_line(
    cluster: Any, tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command and its snippet, on the cluster that is there."""
    from nla_lens.cli.main import cli

    page = (Path(nla_lens.__file__).parents[1] / "docs" / "ray.md").read_text(encoding="utf-8")
    said = re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (command,) = [block for block in said if block.startswith("nla-lens")]
    (snippet,) = [block for block in said if "explain_corpus" in block]
    monkeypatch.chdir(tmp_path)
    source = Path("transcripts.jsonl")
    lines = ['{"text": "It rains in Oslo.", "id": 7}', "{broken", '{"text": "The chef.", "id": 8}']
    source.write_text("\n".join(lines))
    words = command.replace("--ray=auto", f"--ray={cluster.address}").split()[1:]
    result = CliRunner().invoke(cli, [*words, "--max-new-tokens", "12"])
    assert result.exit_code == 1 and "could not be explained" in result.output, result.output
    expected = nla_lens.explain_corpus(tiny, source, "here", max_new_tokens=12)
    found = open_store("store")
    same_rows(found.rows(), expected.rows())
    # The same as without Ray, which goes on with it.
    assert found.manifest == expected.manifest
    names: dict[str, Any] = {}
    exec(snippet.replace("workers=2", "workers=2, max_new_tokens=12"), names)
    assert names["store"].complete
    with pytest.raises(click.BadParameter, match=r"takes transcripts\.jsonl for an address"):
        cli(["explain-file", "--ray", str(source)], standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": 0}, "workers=0"),
        ({"gpus_per_worker": -1}, "gpus_per_worker=-1"),
        ({"gpus_per_worker": 4}, "no room for a worker with 1 CPU and 4 GPUs"),
    ],
)
def test_what_cannot_be_run_is_said(
    cluster: Any, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(NLAError, match=named):
        ray_jobs.explain_corpus("tiny", ["It rains."], tmp_path / "s", **options)
    assert time.monotonic() - start < 60


def test_a_checkpoint_that_is_another_one_on_a_node(tiny: NLA) -> None:
    from nla_lens.adapters.ray_workers import _difference
    from nla_lens.jobs.manifest import about_nla

    here = about_nla(tiny)
    assert _difference(about_nla(NLA.from_pretrained("tiny")), here) == ""
    assert "injection differs" in _difference(
        about_nla(NLA.from_pretrained("tiny-norm-matched")), here
    )
