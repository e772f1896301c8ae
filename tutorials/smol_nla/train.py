"""Trains an NLA of a small real language model, one stage at a time.

``python train.py --source DIR --text DIR --work DIR`` runs every stage that is not done yet:
vectors, ar, av, score, refine, score_refined. A stage that was ended goes on where it last saved.
``torchrun --nproc-per-node 2 train.py ... --stage av`` (or ``ar``) shares its batches out.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from sizes import Settings, scaled
from stages import STAGES, Run


def main() -> None:
    """Runs one stage, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the source model")
    parser.add_argument("--text", type=Path, required=True, help="folder of texts, see texts.py")
    parser.add_argument("--work", type=Path, required=True, help="folder of what is made")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all sizes")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of sizes.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--resume-from", type=Path, help="folder with av and ar to begin with")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.device == "cpu":
        torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        if args.device != "cpu" or args.stage not in ("ar", "av"):
            sys.exit("torchrun is for --stage ar and --stage av on processors")
        torch.distributed.init_process_group("gloo")
        is_first = torch.distributed.get_rank() == 0
        logging.getLogger().setLevel(logging.INFO if is_first else logging.WARNING)
    args.work.mkdir(parents=True, exist_ok=True)
    given = {name: type(getattr(Settings, name))(value) for name, value in map(_pair, args.set)}
    settings = replace(scaled(Settings(), args.scale), **given)
    run = Run(
        settings=settings,
        seed=args.seed,
        source=args.source,
        text=args.text,
        work=args.work,
        device=torch.device(args.device),
        bf16=args.bf16,
        start=args.resume_from,
    )
    for name in STAGES if args.stage == "all" else [args.stage]:
        STAGES[name](run)


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if name not in Settings.__dataclass_fields__:
        sys.exit(f"--set {text}: sizes.py has no {name!r}")
    return name, value


if __name__ == "__main__":
    main()
