"""How fast everything is, next to what a user would do otherwise: one command, one page.

    python benchmarks/run.py                  # CPU: Qwen2 shape, d 512, 12 blocks, random weights
    python benchmarks/run.py --device cuda    # Qwen3-8B shape in bf16, fewer blocks on a small GPU
    python benchmarks/run.py --parts AV memory

Ratios are between medians of one run, in which the ways that are compared take turns. What each
column compares stands where it is measured: `verbalizing`, `reading`, `around`, `stores`, `floor`.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from around import import_rows, probe_rows, streaming_rows
from floor import Machine
from reading import extraction_rows, reconstruction_rows
from rich.console import Console
from rich.table import Table
from stores import corpus_rows, growing_rows
from subject import SHAPES, random_model
from verbalizing import Row, verbalizing_rows


def parts(args: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """What can be measured on a device, each part with a model of its own."""
    shape = SHAPES[args.device]
    if args.device == "cuda":
        shape = shape.fitting(torch.cuda.mem_get_info()[0])

    def verbalizing() -> list[Row]:
        model = random_model(shape, args.device)
        return verbalizing_rows(model, shape, args.vectors, args.repeats)

    def speeds() -> list[Row]:
        machine = Machine(random_model(shape, args.device), shape)
        numbers = {
            "GFLOP/s": f"{machine.flops_per_second / 1e9:.0f}",
            "GB/s": f"{machine.bytes_per_second / 1e9:.1f}",
        }
        return [("machine", f"{args.device}, products of the model's shapes", numbers)]

    found = {
        "machine": speeds,
        "AV": verbalizing,
        "AR": lambda: reconstruction_rows(args.repeats, shape=shape, device=args.device),
        "extraction": lambda: extraction_rows(args.repeats, shape=shape, device=args.device),
    }
    if args.device == "cpu":
        found |= {"memory": streaming_rows, "import": import_rows, "probe": probe_rows}
        found |= {"corpus": corpus_rows, "corpus grows": growing_rows}
    return found


def title(args: argparse.Namespace) -> str:
    """Commit, versions and machine."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    where = platform.processor() or platform.machine()
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    return (
        f"commit {commit}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {where}, {args.threads} thread(s), "
        f"medians of {args.repeats}"
    )


def table(rows: list[Row]) -> Table:
    """One part's rows; its columns are the names of its numbers."""
    columns = list(dict.fromkeys(name for _, _, numbers in rows for name in numbers))
    found = Table(title=rows[0][0], title_justify="left")
    found.add_column("", ratio=1)
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    for _, setting, numbers in rows:
        found.add_row(setting, *(numbers.get(column, "") for column in columns))
    return found


def main() -> None:
    """Prints the tables as they are measured, and writes them to a file if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=sorted(SHAPES))
    parser.add_argument("--vectors", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="medians of this many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="*", help="only these; default: all", metavar="PART")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    known = parts(args)
    unknown = sorted(set(args.parts or ()) - set(known))
    if unknown:
        parser.error(f"no part {', '.join(unknown)} on {args.device}: {', '.join(known)}")

    console = Console(width=120, record=True, file=sys.stdout)
    console.print(title(args))
    for name, measure in known.items():
        if not args.parts or name in args.parts:
            console.print(table(measure()))
    if args.out:
        args.out.write_text(console.export_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
