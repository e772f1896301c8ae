"""The decode loop that local engines share.

Our own loop instead of `generate`: a checkpoint's generation_config (repetition penalty, do_sample)
leaks into `generate` even where it is told to be greedy, sampled rows there depend on what else is
in the batch, and Gemma 3's wrapper refuses embeddings. All rows share one prompt, so nothing is
ever padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nla_lens.engines import Job
from nla_lens.sampling import Sampler


class Forward(Protocol):
    """The two passes a local engine must be able to make.

    Attributes:
        eos_ids: Ids that end an answer.
    """

    eos_ids: frozenset[int]

    def prefill(self, ids: Sequence[int], injected_BD: Tensor, marker: int) -> tuple[Tensor, Any]:
        """Runs the prompt once per row with the vectors injected; last logits `[B, V]`, cache."""
        ...

    def step(self, ids_B1: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Runs one more token per row, injecting nothing; last logits `[B, V]` and the cache."""
        ...


def decode(forward: Forward, job: Job, batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Yields (row, generated ids), batch by batch, each row as soon as it is over."""
    for start in range(0, len(job.injected_ND), batch_size):
        rows = range(start, min(start + batch_size, len(job.injected_ND)))
        yield from _decode_batch(forward, job, rows)


@torch.inference_mode()
def _decode_batch(forward: Forward, job: Job, rows: range) -> Iterator[tuple[int, list[int]]]:
    sampler = Sampler(job.temperature, [job.seeds[row] for row in rows] if job.seeds else None)
    generated: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    vectors_BD = job.injected_ND[rows.start : rows.stop]
    logits_BV, cache = forward.prefill(job.prompt_ids, vectors_BD, job.marker)
    while True:
        keep = []
        for k, (i, token) in enumerate(zip(alive, sampler.pick(logits_BV, alive), strict=True)):
            generated[i].append(token)
            if _is_over(generated[i], job, forward):
                yield rows[i], generated[i]
            else:
                keep.append(k)
        if not keep:
            return
        if len(keep) < len(alive):
            cache.batch_select_indices(torch.tensor(keep, device=logits_BV.device))
            alive = [alive[k] for k in keep]
        last_B1 = torch.tensor([generated[i][-1:] for i in alive], device=logits_BV.device)
        logits_BV, cache = forward.step(last_B1, cache)


def _is_over(ids: Sequence[int], job: Job, forward: Forward) -> bool:
    return ids[-1] in forward.eos_ids or len(ids) >= job.max_new_tokens or job.is_finished(ids)
