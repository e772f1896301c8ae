"""What an NLA does with texts: vectors of them, and how well they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.halves.reconstructor import Reconstructor, check_texts
from nla_lens.results import metrics
from nla_lens.stream.vectors import VectorsLike, check_vectors

if TYPE_CHECKING:
    from nla_lens.checkpoints.spec import NLASpec


class Reconstructing:
    """The side of an `NLA` that reads texts.

    Attributes:
        spec: What was loaded.
        reconstructor: The AR, where there is one.
    """

    spec: NLASpec
    reconstructor: Reconstructor | None

    def reconstruct(self, texts: Sequence[str]) -> Tensor:
        """The vectors that texts stand for.

        Args:
            texts: n explanations, without tags.

        Returns:
            `[n, d]` float32 on the CPU, not normalised.

        Raises:
            NLAError: No reconstructor was loaded.
        """
        return self._need_reconstructor().reconstruct(texts)

    def _need_reconstructor(self) -> Reconstructor:
        if self.reconstructor is None:
            raise NLAError("this NLA has no reconstructor; load one with ar=")
        return self.reconstructor

    def score(self, texts: Sequence[str], vectors: VectorsLike) -> metrics.Scores:
        """How well texts reconstruct vectors.

        Args:
            texts: n explanations, without tags.
            vectors: `[n, d]`, in the same order.

        Returns:
            `.cos`, `.mse_nrm`, `.fve_nrm`, each `[n]`; fve_nrm is None without var_nrm.

        Raises:
            NLAError: Not as many texts as vectors, or no reconstructor.
        """
        batch = check_vectors(vectors, self.spec.d_model)
        listed = check_texts([texts] if isinstance(texts, str) and not batch.shape else texts)
        if len(listed) != len(batch):
            raise NLAError(f"{len(listed)} texts cannot be scored against {len(batch)} vectors")
        return metrics.score(
            self.reconstruct(listed),
            batch.vectors_ND,
            mse_scale=self.spec.mse_scale,
            var_nrm=self.spec.var_nrm,
            mean_D=self._need_reconstructor().mean_D,
        )

    def decode(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts, `[n, d]`: the SAE verb for `reconstruct`."""
        return self.reconstruct(texts)
