"""What is evaluated: vectors, what was said of them, and what the text alone gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_lens.evaluation.bootstrap import Interval, mean
from nla_lens.results.metrics import cosine, mse_nrm, var_nrm


class Memory:
    """Reconstructions of texts, each made once however many measures ask for it."""

    def __init__(self, reconstruct: Callable[[Sequence[str]], Tensor]) -> None:
        """Args:
        reconstruct: Texts to `[n, d]`.
        """
        self._reconstruct = reconstruct
        self._held: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """`[n, d]` float32."""
        new = [text for text in dict.fromkeys(texts) if text not in self._held]
        if new:
            self._held.update(zip(new, self._reconstruct(new), strict=True))
        return torch.stack([self._held[text] for text in texts])

    def __len__(self) -> int:
        """How many texts were reconstructed."""
        return len(self._held)


@dataclass
class Sample:
    """n vectors and their explanations.

    Attributes:
        vectors_ND: `[n, d]` float32.
        texts: What was said of each.
        documents: `[n]`, which document each is of.
        positions: `[n]`; -1 where not known.
        tokens: The text of each token; None where not known.
        contexts: The text read so far, of each; None where not known.
        mse_scale: As in the spec.
        var_nrm: The baseline of training; None where not known.
        reconstruct: Texts to vectors; None without a reconstructor.
        seed: Makes everything that is drawn repeatable.
    """

    vectors_ND: Tensor
    texts: list[str]
    documents: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    tokens: list[str | None]
    contexts: list[str | None]
    mse_scale: float | None
    var_nrm: float | None
    reconstruct: Memory | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, n: int) -> Sample:
        """The first n rows as a sample of their own."""
        if n >= len(self):
            return self
        return replace(
            self,
            vectors_ND=self.vectors_ND[:n],
            texts=self.texts[:n],
            documents=self.documents[:n],
            positions=self.positions[:n],
            tokens=self.tokens[:n],
            contexts=self.contexts[:n],
        )

    @cached_property
    def said_ND(self) -> Tensor:
        """AR(text), `[n, d]`."""
        return self.back(self.texts)

    def back(self, texts: Sequence[str]) -> Tensor:
        """AR of n other texts, `[n, d]`."""
        if self.reconstruct is None:
            raise RuntimeError("no reconstructor")
        return self.reconstruct(texts)

    @cached_property
    def baseline(self) -> float:
        """var_nrm of training, else of this sample."""
        return self.own_var if self.var_nrm is None else self.var_nrm

    @cached_property
    def own_var(self) -> float:
        """Variance of this sample's normalised vectors around their mean."""
        return var_nrm(self.vectors_ND, self.mse_scale)

    def mse(self, said_ND: Tensor) -> np.ndarray[Any, Any]:
        """`[n]` mse_nrm against the vectors."""
        return mse_nrm(said_ND, self.vectors_ND, self.mse_scale).double().numpy()

    def cos(self, said_ND: Tensor) -> np.ndarray[Any, Any]:
        """`[n]` cosines with the vectors."""
        return cosine(said_ND, self.vectors_ND).double().numpy()

    def fve(self, said_ND: Tensor) -> Interval:
        """fve_nrm of reconstructions, with its interval."""
        return self.mean(self.mse(said_ND)).map(-1 / self.baseline, 1.0)

    def fve_of(self, texts: Sequence[str]) -> Interval:
        """fve_nrm that n other texts would have."""
        return self.fve(self.back(texts))

    def mean(self, values: Any) -> Interval:
        """A mean over rows, with the interval over documents."""
        return mean(values, self.documents, seed=self.seed)

    @cached_property
    def permutation(self) -> np.ndarray[Any, Any]:
        """For each row another row of another document, as far as there is one."""
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(self))
        partner = order.copy()
        for i in range(len(self)):
            k = int(rng.integers(len(self)))
            for step in range(len(self)):
                candidate = order[(k + step) % len(self)]
                if self.documents[candidate] != self.documents[i]:
                    break
            partner[i] = candidate
        return partner

    @cached_property
    def permuted_texts(self) -> list[str]:
        """Texts of other documents."""
        return [self.texts[i] for i in self.permutation]
