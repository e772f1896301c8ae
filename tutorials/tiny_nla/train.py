"""Trains and exports the tiny natural language autoencoder.

``python train.py --out nla_lens/tiny`` makes everything from nothing: tokenizer, source model,
two verbalizers, reconstructor. Stages run as single-thread processes, two at a time where they
do not depend on each other. ``--quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from settings import FULL, QUICK, scaled
from stages import STAGES, Run

LOG = logging.getLogger("tiny_nla")
# Each inner list runs one after the other, the lists of one step side by side.
PLAN = (
    (("source",),),
    (("av",), ("ar", "av_norm_matched")),
    (("refine", "export"),),
)


def main() -> None:
    """Runs one stage, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported set")
    parser.add_argument("--work", type=Path, help="folder for intermediate files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute or two")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on training set sizes")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.stage != "all":
        torch.set_num_threads(1)
        work = args.work or parser.error("--stage needs --work")
        settings = scaled(QUICK if args.quick else FULL, args.scale)
        STAGES[args.stage](Run(settings, args.seed, work, args.out))
        return
    with tempfile.TemporaryDirectory() as scratch:
        _run_all(args, args.work or Path(scratch))


def _run_all(args: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for step in PLAN:
        queues = [list(stages) for stages in step]
        running: list[tuple[list[str], subprocess.Popen[bytes]]] = []
        while queues or running:
            for queue in queues:
                running.append((queue, _start(args, work, queue.pop(0))))
            queues = []
            queue, process = running.pop(0)
            try:
                code = process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                running.append((queue, process))
                continue
            if code:
                for _, other in running:
                    other.terminate()
                sys.exit(f"a stage failed with status {code}")
            if queue:
                queues = [queue]
        LOG.info("done after %.1f minutes", (time.monotonic() - start) / 60)


def _start(args: argparse.Namespace, work: Path, stage: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", stage]
    command += ["--out", str(args.out), "--work", str(work)]
    command += ["--seed", str(args.seed), "--scale", str(args.scale)]
    command += ["--quick"] if args.quick else []
    # Several threads on a small busy machine are many times slower than one.
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
