"""Fits how far the embedded pairs are to be trusted; tests it on documents of another seed.

``python calibrate.py --dir nla_lens/tiny --plots docs/trust`` writes ``nla_calibration.json``
beside each verbalizer and draws that of ``tiny``. ``--test 200`` measures what is there on 200
documents that it was not fitted on, and prints a line of JSON for each pair.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
LABELS = "gold facts: it names no wrong topic, name, place or word"
GREEDY = {"positions": "spread:8"}
SAMPLED = {"positions": "spread:4", "temperature": 1.0, "num_samples": 4, "seed": 1}
SAMPLED_SHARE = 0.5

Known = list[list[tuple[Facts, str]]]
"""Of every document, at every position: the facts and the text up to there."""


def known_of(loaded: Checkpoints, texts: list[str]) -> Known:
    """What is certain at every position of every text."""
    samples = (
        collect(loaded.source, [text], loaded.tables, loaded.layer, None, 0) for text in texts
    )
    return [list(zip(sample.facts, sample.prefixes, strict=True)) for sample in samples]


def explained(
    nla: nla_lens.NLA, texts: list[str], known: Known, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Explanations of positions of texts, as rows, each with its errors.

    Args:
        nla: The pair.
        texts: Documents.
        known: What is certain of them.
        options: Those of ``explain_corpus``.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = nla_lens.explain_corpus(nla, texts, folder, progress=False, **options)
        for row in store.rows():
            errors = measures.errors(row["text"], *known[row["document"]][row["position"]])
            yield {**row, "errors": sorted(errors), "right": not errors}


def fitted(nla: nla_lens.NLA, texts: list[str], known: Known) -> nla_lens.Calibration:
    """A calibration of greedy explanations and, of fewer documents, of the best of four samples."""
    rows = list(explained(nla, texts, known, GREEDY))
    rows += explained(nla, texts[: int(SAMPLED_SHARE * len(texts))], known, SAMPLED)
    found = nla_lens.calibrate(rows, labels="right")
    about = {**found.fitted_on, "labels": LABELS, "corpus_seed": SEED}
    return replace(found, nla=nla.identity(), fitted_on=about)


def tested(nla: nla_lens.NLA, texts: list[str], known: Known, options: Any) -> dict[str, Any]:
    """Trust and truth of documents the calibration was not fitted on."""
    rows = list(explained(nla, texts, known, options))
    return {
        "documents": len(texts),
        "errors": Counter(error for row in rows for error in row["errors"]),
        "rows": [
            [row["trust"], row["right"], row["fve_nrm"], row["cos"], len(row["text"].split())]
            for row in rows
        ],
    }


def main() -> None:
    """Fits and writes, or tests and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder of the exported set")
    parser.add_argument("--documents", type=int, default=800)
    parser.add_argument("--out", type=Path, help="where calibrations go instead of --dir")
    parser.add_argument("--plots", type=Path, help="folder for the plots of the first pair")
    parser.add_argument("--test", type=int, help="test on so many documents instead of fitting")
    parser.add_argument("--sampled", action="store_true", help="test the best of four samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(args.dir)
    seed, count = (SEED, args.documents) if args.test is None else (FRESH_SEED, args.test)
    texts = [document.text for document in corpus.documents(seed, count)]
    known = known_of(loaded, texts)
    for name, folder in PAIRS.items():
        nla = nla_lens.NLA.from_pretrained(av=args.dir / folder, ar=args.dir / "ar")
        if args.test is not None:
            wishes = SAMPLED if args.sampled else GREEDY
            print(json.dumps({"pair": name, **tested(nla, texts, known, wishes)}))
            continue
        calibration = fitted(nla, texts, known)
        calibration.save((args.out or args.dir) / folder)
        print(calibration)
        if args.plots and name == "tiny":
            calibration.plot(args.plots)


if __name__ == "__main__":
    main()
