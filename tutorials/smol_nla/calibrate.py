"""Fits how far the pair "smol" is to be trusted, on documents of sources it was not trained on.

``python calibrate.py --text DIR --out nla_lens/smol/av`` writes ``nla_calibration.json`` and prints
what it measures: on held-out documents of the same kinds, and on a kind that was never trained on.
An explanation is right where the two tokens it says were just read are the text's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import describe
import numpy as np
import texts
from sklearn.metrics import roc_auc_score

import nla_lens

LABELS = "gold facts: the last token and the one before it are the text's"
SEED = 20_241
POSITIONS = ["from:10", "spread:6"]


def explained(nla: nla_lens.NLA, documents: Sequence[texts.Document]) -> Iterator[dict[str, Any]]:
    """Explanations of some positions of documents, as rows, each with whether it is right.

    Args:
        nla: The pair.
        documents: What is read.
    """
    tokenizer = nla.open_source().tokenizer
    own = [document.text for document in documents]
    read = [tokenizer(text)["input_ids"] for text in own]
    with tempfile.TemporaryDirectory() as folder:
        for row in nla_lens.explain_corpus(nla, own, folder, positions=POSITIONS).rows():
            seen = read[row["document"]][: row["position"] + 1]
            last, before = (tokenizer.decode([token]).strip() for token in (seen[-1], seen[-2]))
            said = describe.last_said(row["text"]), describe.before_said(row["text"])
            yield {**row, "right": said == (last, before)}


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How trust, and the score alone, tell right from wrong."""
    right = np.array([row["right"] for row in rows])
    trust = np.array([row["trust"] for row in rows], dtype=float)
    order = np.argsort(trust)
    return {
        "explanations": len(rows),
        "wrong": round(1 - right.mean(), 3),
        "mean trust": round(trust.mean(), 3),
        "AUROC": round(roc_auc_score(right, trust), 3),
        "AUROC of fve_nrm": round(roc_auc_score(right, [row["fve_nrm"] for row in rows]), 3),
        "AUROC of length": round(roc_auc_score(right, [len(row["text"]) for row in rows]), 3),
        "Brier": round(((trust - right) ** 2).mean(), 3),
        "wrong of the most trusted fifth": round(1 - right[order[-len(rows) // 5 :]].mean(), 3),
    }


def main() -> None:
    """Fits, writes, and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of texts, see texts.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the verbalizer")
    parser.add_argument("--documents", type=int, default=400)
    args = parser.parse_args()
    nla, documents = nla_lens.NLA.from_pretrained("smol"), texts.read(args.text)
    rows = list(explained(nla, texts.draw(documents, "held", args.documents, SEED)))
    found = nla_lens.calibrate(rows, labels="right")
    about = {**found.fitted_on, "labels": LABELS, "corpus_seed": SEED}
    # Likelier wrong than right are most: a flag on them would say nothing.
    found = replace(found, nla=nla.identity(), fitted_on=about, least=None)
    found.save(args.out)
    print(found)
    nla.calibration = found
    unseen = texts.draw(documents, "unseen", args.documents // 4, SEED)
    print(json.dumps({"a kind never trained on": figures(list(explained(nla, unseen)))}))


if __name__ == "__main__":
    main()
