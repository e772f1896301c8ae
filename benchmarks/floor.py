"""The least time that explaining can take on this machine, in two readings.

What must be computed: the prefix once, every vector's suffix, every answer's tokens but the last;
in each pass all matrix products, and the keys and values of each row read once. Norms, activations
and the softmax are left out.

* `floor`: the products of each pass timed alone, at its number of rows, with the fastest kernel
  that torch has for weights as they lie in the checkpoint; keys and values at the measured bytes/s.
* `roofline`: the products at the highest FLOP/s measured at any number of rows, or, where that
  takes longer, their weights at the measured bytes/s; keys and values likewise. Nothing reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from statistics import median

import torch
from subject import MARKER, PROMPT_TOKENS, Shape, timed
from torch import Tensor

from nla_lens.models.onednn import linear

_MANY_ROWS = 2048

Products = Callable[..., float]
"""`(rows, head=)` -> seconds."""


class Machine:
    """Speeds, measured on the weights of one model.

    Attributes:
        flops_per_second: The most that was seen.
        bytes_per_second: Of reading a large tensor.
    """

    def __init__(self, model: torch.nn.Module, shape: Shape) -> None:
        self._head = model.get_output_embeddings().weight  # type: ignore[operator]
        self._body = [
            module.weight
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module.weight is not self._head
        ]
        self._shape, self._device = shape, self._head.device
        self._itemsize = self._head.dtype.itemsize
        self.bytes_per_second = self._read_speed()
        flops = 2.0 * _MANY_ROWS * sum(w.numel() for w in self._body)
        self.flops_per_second = flops / self.products(_MANY_ROWS, head=False)

    def floor(self, lengths: Sequence[int]) -> float:
        """Seconds for answers of these lengths, all rows at once."""
        return self._total(lengths, self.products)

    def roofline(self, lengths: Sequence[int]) -> float:
        """As `floor`, by the peaks."""
        return self._total(lengths, self._products_at_peak)

    def _total(self, lengths: Sequence[int], products: Products) -> float:
        n, n_suffix = len(lengths), PROMPT_TOKENS - MARKER
        seconds = products(MARKER, head=False) + products(n * n_suffix, head=False)
        seconds += products(n, head=True) - products(n, head=False)
        for step in range(1, max(lengths)):
            rows = sum(length > step for length in lengths)
            columns = MARKER + rows * (n_suffix + step)
            cached = columns * self._shape.key_value_bytes(self._itemsize)
            seconds += products(rows, head=True) + cached / self.bytes_per_second
        return seconds

    @cache  # noqa: B019
    def products(self, rows: int, *, head: bool) -> float:
        """Seconds of all matrix products of a pass over this many tokens."""
        weights = [*self._body, *([self._head] if head else [])]
        inputs = {
            w.shape[1]: torch.randn(rows, w.shape[1], device=w.device, dtype=w.dtype)
            for w in weights
        }
        with torch.inference_mode():
            return median(timed(lambda: _multiply(weights, inputs)) for _ in range(3))

    def _products_at_peak(self, rows: int, *, head: bool) -> float:
        numel = sum(w.numel() for w in self._body) + head * self._head.numel()
        computing = 2.0 * rows * numel / self.flops_per_second
        return max(computing, numel * self._itemsize / self.bytes_per_second)

    def _read_speed(self) -> float:
        large = torch.ones(2**27, device=self._device)
        return 4 * large.numel() / median(timed(large.sum) for _ in range(5))


def _multiply(weights: Sequence[Tensor], inputs: dict[int, Tensor]) -> None:
    for weight in weights:
        linear(inputs[weight.shape[1]], weight)
