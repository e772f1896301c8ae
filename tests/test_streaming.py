"""A long stream of vectors through `explain_iter`: memory, and when results and scores come."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch

from nla_lens import NLA
from nla_lens.halves.explaining import _SCORED_AT_ONCE

from .scripted import ScriptedReconstructor, ScriptedVerbalizer, ids_of, with_engines


def resident_mib() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss / 2**20)


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_vectors() -> None:
    nla = NLA.from_pretrained("tiny")
    vectors = torch.randn(10_000, nla.spec.d_model)
    seen: list[float] = []
    for n, e in enumerate(nla.explain_iter(vectors, max_new_tokens=2), start=1):
        assert e.cos is not None
        if n % 500 == 0:
            seen.append(resident_mib())
    assert len(seen) == 20
    # After the first thousand; ten thousand explanations would be far more.
    assert max(seen[2:]) - seen[1] < 8


def test_scores_come_with_the_stream(nla: NLA) -> None:
    """Not after everything has been written, and never more texts at once than that takes."""
    writer = ScriptedVerbalizer([ids_of(nla, "<explanation>a</explanation>")])
    reader = ScriptedReconstructor(torch.ones(1, nla.spec.d_model))
    mine = with_engines(nla, writer, reader)
    most_waiting = 0
    for n, e in enumerate(mine.explain_iter(torch.ones(1000, nla.spec.d_model)), start=1):
        assert e.cos == pytest.approx(1.0)
        most_waiting = max(most_waiting, len(writer.given) - n)
    assert most_waiting < _SCORED_AT_ONCE
    assert reader.calls == -(-1000 // _SCORED_AT_ONCE)
