"""Fits how far the embedded pairs are to be trusted, and tests it on documents of another seed.

``python calibrate.py --dir nla_lens/tiny --docs docs/trust`` writes ``nla_calibration.json`` beside
each verbalizer, and the plots and the table of ``docs/trust.md``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import corpus
import measures
import torch
from evaluate import Checkpoints, load
from facts import Facts
from vectors import collect

import nla_lens

PAIRS = {"tiny": "av", "tiny-norm-matched": "av_norm_matched"}
SEED = 20_240
FRESH_SEED = 777_001
LOG = logging.getLogger("calibrate")


def texts_of(seed: int, count: int) -> list[str]:
    """Documents of the small world that no training saw."""
    return [document.text for document in corpus.documents(seed, count)]


def all_facts(loaded: Checkpoints, texts: list[str]) -> list[list[Facts]]:
    """The facts of every position of every text."""
    return [
        collect(loaded.source, [text], loaded.tables, loaded.layer, None, 0).facts for text in texts
    ]


def gold_labels(facts: list[list[Facts]]) -> Callable[[Mapping[str, Any]], bool]:
    """Tells of a row whether its explanation is right.

    Args:
        facts: Of every position of every document.
    """

    def names_nothing_wrong(row: Mapping[str, Any]) -> bool:
        """gold facts: no wrong topic, name, place or word"""
        known = facts[row["document"]][row["position"]]
        return not measures.errors(row["text"], known, row["context"])

    return names_nothing_wrong


def main() -> None:
    """Fits, tests and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder of the exported set")
    parser.add_argument("--documents", type=int, default=800)
    parser.add_argument("--support", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(args.dir)
    texts = texts_of(SEED, args.documents)
    facts = all_facts(loaded, texts)
    for name, folder in PAIRS.items():
        nla = nla_lens.NLA.from_pretrained(name)
        found = nla_lens.calibrate(
            nla,
            texts,
            labels=gold_labels(facts),
            positions="spread:8",
            support=args.support,
            path=args.out / folder if args.out else args.dir / folder,
            progress=False,
        )
        print(name, found)


if __name__ == "__main__":
    main()
