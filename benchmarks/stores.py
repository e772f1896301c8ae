"""A long job: `explain_corpus` next to the bare `explain` of the same vectors, and as it grows.

On the embedded pair, whose rows are as cheap as rows get: what a job adds shows most there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import nla_lens

Row = tuple[str, str, dict[str, str]]

_SETTINGS: dict[str, dict[str, Any]] = {
    "whole texts": {},
    "8 tokens each": {"max_new_tokens": 8},
}
_TEXTS = [
    "Nora lives in Naples. The fox chased the dog out of the kennel.",
    "The chef fried the garlic in Oslo. Who took the hockey stick on Monday?",
    "It rains in Seoul, and the two governments signed a treaty.",
]
_GROWN = """
import json, resource, sys, time
import nla_lens, torch
torch.set_num_threads(1)
nla = nla_lens.NLA.from_pretrained("tiny")
def run(source, out):
    nla_lens.explain_corpus(nla, source, out, max_new_tokens=8, progress=False)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
source, small, folder = sys.argv[1:]
run(small, folder + "/first")
before = peak()
start, cpu = time.perf_counter(), time.process_time()
run(source, folder + "/store")
taken = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": taken[0], "cpu": taken[1], "peak": peak(), "before": before}))
"""


def corpus_rows(rounds: int = 5, *, n_rows: int = 512) -> list[Row]:
    """`% more` is the median of ratios within a round, in seconds of this process' own."""
    nla = nla_lens.NLA.from_pretrained("tiny")
    vectors_ND = _vectors(nla, n_rows)
    found = []
    for name, options in _SETTINGS.items():

        def bare(options: dict[str, Any] = options) -> None:
            nla.explain(vectors_ND, progress=False, **options)

        def job(options: dict[str, Any] = options) -> None:
            with tempfile.TemporaryDirectory() as folder:
                nla_lens.explain_corpus(nla, vectors_ND, folder + "/s", progress=False, **options)

        found.append((f"{n_rows} vectors, {name}", _compared(bare, job, rounds, n_rows)))
    return [("corpus", setting, numbers) for setting, numbers in found]


def growing_rows(sizes: tuple[int, ...] = (1_000, 10_000, 100_000)) -> list[Row]:
    """Each size in a process of its own; memory is beyond that of a first job of 1,000 rows."""
    nla = nla_lens.NLA.from_pretrained("tiny")
    found: list[Row] = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / "vectors.npy", Path(folder) / "small.npy"]
            for path, count in zip(paths, (n, 1000), strict=True):
                np.save(path, _vectors(nla, count).numpy())
            command = [sys.executable, "-c", _GROWN, *map(str, paths), folder]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
        said = json.loads(ran.stdout)
        numbers = {
            "s": f"{said['seconds']:.1f}",
            "per s": f"{n / said['seconds']:.0f}",
            "per CPU s": f"{n / said['cpu']:.0f}",
            "MiB more": f"{said['peak'] - said['before']:.0f}",
        }
        found.append(("corpus grows", f"{n} vectors, 8 tokens each, scored", numbers))
    return found


def _vectors(nla: nla_lens.NLA, n: int) -> torch.Tensor:
    """Residual vectors of texts of its world, over and over."""
    source = nla.spec.source_model
    read = nla_lens.extract(source, _TEXTS, nla.spec.layer)
    vectors_ND = torch.cat([residual.as_subclass(torch.Tensor) for residual in read])
    return vectors_ND.repeat(-(-n // len(vectors_ND)), 1)[:n]


def _compared(
    bare: Callable[[], None], job: Callable[[], None], rounds: int, n_rows: int
) -> dict[str, str]:
    taken: dict[str, list[tuple[float, float]]] = {"bare": [], "job": [], "again": []}
    runs = {"bare": bare, "job": job, "again": bare}
    for run in (bare, job):
        run()
    for n in range(rounds):
        order = list(runs)[n % 3 :] + list(runs)[: n % 3]
        for name in order:
            start, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            taken[name].append((time.perf_counter() - start, time.process_time() - cpu))

    def more(name: str, clock: int) -> str:
        pairs = zip(taken[name], taken["bare"], strict=True)
        return f"{100 * (median(a[clock] / b[clock] for a, b in pairs) - 1):+.1f}"

    return {
        "explain, per CPU s": f"{n_rows / median(cpu for _, cpu in taken['bare']):.0f}",
        "explain_corpus": f"{n_rows / median(cpu for _, cpu in taken['job']):.0f}",
        "% more CPU": more("job", 1),
        "% more time": more("job", 0),
        "A/A %": more("again", 1),
    }
