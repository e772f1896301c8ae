"""What `evaluate` costs beside the explaining and reconstructing that its rows need.

`python benchmarks/evaluating.py --vectors 1000` measures both in one run, and prints the ratio.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import nla_lens
from nla_lens import NLA
from nla_lens.evaluation.evaluate import _CHEAP

ROWS = (*_CHEAP, "agreement")
"""Rows that are made of explanations and reconstructions; the others run the source model."""


def documents(count: int) -> list[str]:
    """Texts of the embedded pair's world."""
    folder = Path(__file__).parents[1] / "tutorials" / "tiny_nla"
    sys.path.insert(0, str(folder))
    corpus: Any = __import__("corpus")
    return [document.text for document in corpus.documents(31, count)]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


class Counted:
    """Counts what a pair is asked for."""

    def __init__(self, nla: NLA) -> None:
        self.texts: list[str] = []
        self.vectors: list[tuple[torch.Tensor, dict[str, Any]]] = []
        assert nla.reconstructor is not None
        reconstruct, answers = nla.reconstructor.reconstruct, nla.verbalizer.answers

        def reconstructing(texts: Sequence[str]) -> torch.Tensor:
            self.texts += texts
            return reconstruct(texts)

        def answering(vectors_ND: torch.Tensor, **options: Any) -> Any:
            self.vectors.append((vectors_ND, options))
            return answers(vectors_ND, **options)

        setattr(nla.reconstructor, "reconstruct", reconstructing)  # noqa: B010
        setattr(nla.verbalizer, "answers", answering)  # noqa: B010
        self.reconstruct, self.answers = reconstruct, answers


def measure(n_vectors: int) -> dict[str, float]:
    """Seconds of `evaluate`, of what it needs, and the ratio."""
    nla = NLA.from_pretrained("tiny")
    texts = documents(n_vectors // 4)
    nla.explain_text(texts[0], [-1])
    counted = Counted(nla)
    with tempfile.TemporaryDirectory() as store:
        whole, report = timed(
            lambda: nla_lens.evaluate(
                nla, texts, rows=ROWS, budget=n_vectors, store=Path(store) / "s", progress=False
            )
        )
    asked = list(counted.texts)
    assert len(asked) == len(set(asked)), "a text was reconstructed twice"
    explaining, _ = timed(
        lambda: [list(counted.answers(v, **how)) for v, how in list(counted.vectors)]
    )
    reconstructing, _ = timed(lambda: counted.reconstruct(asked))
    needed = explaining + reconstructing
    return {
        "vectors": report.about["vectors"],
        "texts reconstructed": len(asked),
        "evaluate, s": round(whole, 2),
        "explaining, s": round(explaining, 2),
        "reconstructing, s": round(reconstructing, 2),
        "ratio": round(whole / needed, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1000)
    torch.set_num_threads(1)
    for name, value in measure(parser.parse_args().vectors).items():
        print(f"{name:22} {value}")
