"""Picks the next token: argmax, or a draw that does not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Chooses next tokens for the rows of one batch.

    Each row draws from a generator of its own, so the same seed gives the same text in any batch.
    """

    def __init__(self, temperature: float, seeds: Sequence[int] | None) -> None:
        """Args:
        temperature: 0 is argmax.
        seeds: One per row; needed above temperature 0.
        """
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]

    def pick(self, logits_BV: Tensor, rows: Sequence[int]) -> list[int]:
        """Token ids for the rows still alive; `logits_BV` has a line for each of them."""
        if self._temperature == 0.0:
            chosen: list[int] = logits_BV.argmax(-1).tolist()
            return chosen
        probs_BV = torch.softmax(logits_BV.float() / self._temperature, -1).cpu()
        return [
            int(torch.multinomial(probs_V, 1, generator=self._generators[row]))
            for probs_V, row in zip(probs_BV, rows, strict=True)
        ]
