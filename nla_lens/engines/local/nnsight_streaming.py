"""Tokens of an nnsight run while it goes on.

transformers' `generate` runs to its end, so it does so in a thread of its own, and says after each
step what it wrote. Not by a greenlet, as nnsight itself does: modes of torch that are on inside
belong to a thread, and would be on between the steps, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from nla_lens.engines import Job, Unfinished
from nla_lens.models.ambient import undisturbed


def streamed(
    job: Job, rows: range, eos_ids: frozenset[int], generate: Callable[..., Any]
) -> Iterator[tuple[int, list[int]]]:
    """Yields (row, ids) as rows are over, and what there is of watched ones after each step.

    Args:
        job: What is asked.
        rows: Of the job, in the order of the batch.
        eos_ids: Ids that end an answer.
        generate: Runs the batch; takes more arguments of transformers' `generate`.
    """
    steps: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
    left = threading.Event()

    def after_a_step(ids_BT: Tensor, *_: object, **__: object) -> Tensor:
        steps.put(ids_BT[:, -1].tolist())
        return torch.full((len(ids_BT),), left.is_set(), device=ids_BT.device)

    def run() -> None:
        try:
            with undisturbed():
                generate(stopping_criteria=[after_a_step])
            steps.put(None)
        except BaseException as error:
            steps.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    written: list[list[int]] = [[] for _ in rows]
    over = [False] * len(rows)
    try:
        while (step := steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            for i, token in enumerate(step):
                if over[i]:
                    continue
                written[i].append(token)
                over[i] = job.is_over(written[i], eos_ids)
                if over[i]:
                    yield rows[i], written[i]
                elif job.watched is not None and job.watched(rows[i]):
                    yield rows[i], Unfinished(written[i])
        for i, row in enumerate(rows):
            if not over[i]:
                yield row, written[i]
    finally:
        left.set()
        thread.join()
