"""Picks the next token: argmax, or a draw that does not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Chooses next tokens.

    Each row draws from a generator of its own, so the same seed gives the same text in any batch.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        """Args:
        temperature: 0 is argmax.
        seeds: One per row of the whole job; needed above temperature 0.
        """
        self._temperature, self._seeds = temperature, seeds
        self._generators: dict[int, torch.Generator] = {}

    def pick(self, logits_BV: Tensor, rows: Sequence[int]) -> list[int]:
        """Token ids for these rows of the job, a line of logits each."""
        if self._temperature == 0.0:
            chosen: list[int] = logits_BV.argmax(-1).tolist()
            return chosen
        # Float64 and at most 0: a tiny temperature must not make infinities.
        logits_BV = logits_BV.double().cpu()
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / self._temperature
        probs_BV = torch.softmax(logits_BV, -1)
        return [
            int(torch.multinomial(probs_V, 1, generator=self._generator(row)))
            for probs_V, row in zip(probs_BV, rows, strict=True)
        ]

    def _generator(self, row: int) -> torch.Generator:
        if row not in self._generators:
            self._generators[row] = torch.Generator().manual_seed(self._seeds[row])
        return self._generators[row]

    def forget(self, row: int) -> None:
        """Drops what is kept for a row that is over, or that will start again."""
        self._generators.pop(row, None)
