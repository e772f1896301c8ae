"""Optimiser, learning-rate schedule and progress lines shared by all training loops."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

LOG = logging.getLogger("tiny_nla")


class Stepper:
    """Takes optimiser steps: AdamW, clipping at 1, cosine decay after 4 % warm-up.

    With ``flat``, the rate begins to fall only after that share of the steps. Frozen weights stay
    as they are.
    """

    def __init__(self, networks: Sequence[nn.Module], rate: float, steps: int, flat: float = 0.0):
        self.parameters = [
            p for network in networks for p in network.parameters() if p.requires_grad
        ]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )
        self.rate, self.steps, self.flat, self.done = rate, max(steps, 1), flat, 0

    def step(self, loss: torch.Tensor) -> None:
        """Takes one step down the gradient of ``loss``."""
        warm_up = max(1, self.steps // 25)
        fall = max(warm_up, int(self.steps * self.flat))
        if self.done < warm_up:
            factor = (self.done + 1) / warm_up
        else:
            through = max(0, self.done - fall) / max(1, self.steps - fall)
            factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, through)))
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * factor
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1


class Progress:
    """Logs the running means of a training loop every few seconds."""

    def __init__(self, stage: str, steps: int, every: float = 10.0):
        self.stage, self.steps, self.every = stage, steps, every
        self.start = self.last = time.monotonic()
        self.sums: dict[str, float] = {}
        self.count = self.done = 0

    def update(self, **values: float) -> None:
        """Adds one step's values, and logs when it is time or the last step is done."""
        self.done += 1
        self.count += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        now = time.monotonic()
        if now - self.last < self.every and self.done < self.steps:
            return
        means = " ".join(f"{key} {value / self.count:.3f}" for key, value in self.sums.items())
        left = (now - self.start) / self.done * (self.steps - self.done)
        LOG.info("%s %d/%d %s (%.0f s left)", self.stage, self.done, self.steps, means, left)
        self.last, self.sums, self.count = now, {}, 0


def batches_by_length(lengths: Sequence[int], batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields index batches of similar lengths, in random order, every index once.

    Similar lengths waste little padding; sorting is done within large random chunks, so
    batches stay random.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator)
    lengths_t = torch.tensor(lengths)
    pieces = []
    for chunk in order.split(batch * 40):
        pieces.extend(chunk[lengths_t[chunk].argsort(stable=True)].split(batch))
    for index in torch.randperm(len(pieces), generator=generator).tolist():
        yield pieces[index]


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Right-pads lists of ids to one tensor."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows])
