"""How well labels of latents fit their rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LabelScores:
    """How well labels fit the rows they are for.

    Attributes:
        cos: `[n]`, cosine of AR(label) and its row.
        rank: `[n]`, how many of all rows fit AR(label) better than its own; 0 is best.
        n_rows: Among how many rows.
    """

    cos: Tensor
    rank: Tensor
    n_rows: int

    @property
    def top1(self) -> float:
        """Share of labels whose own row fits best; by chance `1 / n_rows`."""
        return float(self.rank.eq(0).float().mean())

    @property
    def mean_reciprocal_rank(self) -> float:
        """Mean of `1 / (rank + 1)`."""
        return float((1.0 / (self.rank + 1)).mean())

    def __len__(self) -> int:
        return len(self.cos)
