"""Two Ray workers on two processors against one: rows per second, and their ratio.

    python benchmarks/ray_workers.py [--rows 2000] [--d-model 512]

Needs two processors that nobody else uses. A worker takes seconds to start, so the clock runs from
the first shard that is there to the last.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from nla_lens.adapters.ray_jobs import explain_corpus

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.checkpoints import build_av


def rate(pair: dict[str, str], vectors: torch.Tensor, workers: int, n_tokens: int) -> float:
    """Rows per second between the first shard and the last."""
    with tempfile.TemporaryDirectory() as folder:
        out, seen, over = Path(folder) / "store", list[tuple[float, int]](), threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                n = len(list(out.glob("rows-*")))
                if not seen or n > seen[-1][1]:
                    seen.append((time.monotonic(), n))

        watcher = threading.Thread(target=watch)
        watcher.start()
        store = explain_corpus(
            pair, vectors, out, workers=workers, max_new_tokens=n_tokens, score=False
        )
        time.sleep(0.1)
        over.set()
        watcher.join()
        first = next(one for one in seen if one[1] >= workers)
        rows = (seen[-1][1] - first[1]) * len(store) / len(store.shards)
        return rows / (seen[-1][0] - first[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    wished = parser.parse_args()
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
    with tempfile.TemporaryDirectory() as folder:
        av = build_av(Path(folder) / "av", "llama", d_model=wished.d_model)
        vectors = torch.randn(wished.rows, wished.d_model)
        loads = [os.getloadavg()[0]]
        found = []
        for workers in (1, 2):
            found.append(rate({"av": str(av)}, vectors, workers, wished.tokens))
            loads.append(os.getloadavg()[0])
            print(f"{workers} workers: {found[-1]:.1f} rows/s", flush=True)
    ray.shutdown()
    print(f"ratio {found[1] / found[0]:.2f}; load averages {[round(x, 1) for x in loads]}")


if __name__ == "__main__":
    main()
