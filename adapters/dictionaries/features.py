"""Decoder rows in words, and words scored against decoder rows.

A decoder row is a direction, not an activation. What follows from that:

* **Scale** does not matter. Both injection rules normalise, so a row and any positive multiple of
  it get the same text, and the row's own length is reported as `norm` and nothing else.
* **Sign** does. Latents are not negative, so the row itself is what the latent writes; `sign=-1`
  reads the opposite direction.
* **Distance.** Residuals stand around a mean, often far from zero, and rows need not. With the mean
  given, `distance` says how far off a row is and `off_distribution` flags it, and a second reading
  is made of the mean with the row added, which is closer to what the AV was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.adapters.dictionaries.dictionary import check_indices
from nla_lens.adapters.dictionaries.feature_table import (
    FeatureExplanation,
    FeatureExplanations,
    FeatureStore,
)
from nla_lens.adapters.dictionaries.labels import LabelScores
from nla_lens.adapters.dictionaries.latents import OTHER_LAYER, Latents
from nla_lens.adapters.dictionaries.loading import opened
from nla_lens.checks import is_number
from nla_lens.errors import NLAError
from nla_lens.nla import NLA
from nla_lens.progress import with_progress
from nla_lens.results.explanation import Explanation
from nla_lens.results.flags import OUTLIER_NORM
from nla_lens.results.metrics import cosine
from nla_lens.stream.explainer import check_nla
from nla_lens.stream.injection import rescale, unit
from nla_lens.stream.vectors import check_vectors

OFF_DISTRIBUTION: Final = "off_distribution"
"""The row is much farther from the mean residual than residuals are."""
_FAR: Final = 2.0
_ROWS_AT_ONCE: Final = 64
_ROWS_LOOKED_AT: Final = 1024


def explain_features(
    nla: NLA,
    sae: Any,
    indices: Sequence[int] | int | None = None,
    *,
    sign: int = 1,
    mean: Tensor | None = None,
    strength: float | None = None,
    store: str | Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> FeatureExplanations:
    """Says in words what latents of a dictionary stand for.

    Args:
        nla: The NLA.
        sae: A dictionary, as `load_dictionary` takes or gives it.
        indices: Which latents; None is all of them.
        sign: 1 reads the decoder row, -1 the opposite direction.
        mean: The mean residual `[d]`, for instance of `nla_lens.extract`: asks for `distance` and
            for the second reading.
        strength: Length at which the row is added to the mean; None is ||mean||.
        store: A file of JSON lines that results are added to as they finish; latents that are in
            it are not explained again.
        progress: As in `NLA.explain`.
        **options: Those of `NLA.explain`.

    Returns:
        One explanation a latent, in the order of `indices`.

    Raises:
        NLAError: No such latent, another width, a place outside the residual stream, an all-zero
            row, or a store made with something else.
    """
    check_nla(nla)
    latents = Latents(opened(sae))
    place_flags = latents.place_flags(nla)
    chosen = range(latents.d_sae) if indices is None else check_indices(indices, latents.d_sae)
    if sign not in (1, -1):
        raise NLAError(f"sign={sign!r} must be 1 or -1")
    shift = _Shift.of(nla, mean, strength)
    reader = _Reader(nla, latents, sign, shift, place_flags, options)
    reader.check(list(dict.fromkeys(chosen)))
    if store is None:
        found = {
            e.index: e
            for e in with_progress(
                reader.read(list(dict.fromkeys(chosen))),
                total=len(chosen),
                show=progress,
                unit="latent",
            )
        }
        return FeatureExplanations(found[i] for i in chosen)
    with FeatureStore.open(store, reader.about()) as held:
        missing = [i for i in dict.fromkeys(chosen) if i not in held.finished]
        for e in with_progress(
            reader.read(missing), total=len(missing), show=progress, unit="latent"
        ):
            held.append(e)
    return FeatureExplanations(held.finished[i] for i in chosen)


@dataclass(frozen=True)
class _Shift:
    """The second reading: where the row is added, and how long it is then."""

    mean_D: Tensor
    strength: float

    @classmethod
    def of(cls, nla: NLA, mean: Tensor | None, strength: float | None) -> _Shift | None:
        if mean is None:
            if strength is not None:
                raise NLAError(f"strength={strength!r} needs mean=, the mean residual")
            return None
        batch = check_vectors(mean, nla.spec.d_model)
        if batch.shape:
            raise NLAError(f"mean has shape {tuple(mean.shape)}, expected [{nla.spec.d_model}]")
        mean_D = batch.vectors_ND[0]
        if strength is None:
            strength = float(mean_D.norm())
        if not is_number(strength) or not 0 < strength < float("inf"):
            raise NLAError(f"strength={strength!r} must be a positive length")
        return cls(mean_D, float(strength))

    def vectors(self, rows_ND: Tensor) -> Tensor:
        return self.mean_D + rescale(rows_ND, self.strength)


@dataclass(frozen=True)
class _Reader:
    """Explains rows, some at a time."""

    nla: NLA
    latents: Latents
    sign: int
    shift: _Shift | None
    place_flags: tuple[str, ...]
    options: Mapping[str, Any]

    def about(self) -> dict[str, Any]:
        """What a store must have been made with for these results to go into it."""
        spec, latents, shift = self.nla.spec, self.latents, self.shift
        return {
            "source_model": None if spec.source_model is None else Path(spec.source_model).name,
            "nla_hook_name": spec.hook_name,
            "injection": spec.injection,
            "d_sae": latents.d_sae,
            "sae_hook_name": latents.hook_name,
            # Which dictionary it is, without reading it.
            "first_row": [round(x, 5) for x in latents.rows([0])[0, :8].tolist()],
            "sign": self.sign,
            "strength": None if shift is None else round(shift.strength, 5),
            "options": {k: v for k, v in sorted(self.options.items()) if k != "batch_size"},
        }

    def check(self, indices: Sequence[int]) -> None:
        """Looks at all rows before the first is explained.

        Raises:
            NLAError: Rows of zeros, NaN or infinity.
        """
        dead: list[int] = []
        for start in range(0, len(indices), _ROWS_LOOKED_AT):
            some = indices[start : start + _ROWS_LOOKED_AT]
            empty_N = ~self.latents.rows(some).ne(0).any(-1)
            dead += [some[n] for n in empty_N.nonzero()[:, 0].tolist()]
        if dead:
            more = f" (and {len(dead) - 1} more: {dead[1:9]})" if len(dead) > 1 else ""
            raise NLAError(
                f"the decoder row of latent {dead[0]}{more} is all zero (a dead latent): it "
                "has no direction to explain; leave it out"
            )

    def read(self, indices: Sequence[int]) -> Iterator[FeatureExplanation]:
        for start in range(0, len(indices), _ROWS_AT_ONCE):
            yield from self._read_some(indices[start : start + _ROWS_AT_ONCE])

    def _read_some(self, indices: Sequence[int]) -> Iterator[FeatureExplanation]:
        rows_ND = self.latents.rows(indices)
        signed_ND = self.sign * rows_ND
        # At the usual length, so that no row is flagged for its own.
        first = self._explain(rescale(signed_ND, self.nla.spec.usual_norm or 1.0))
        second = None if self.shift is None else self._explain(self.shift.vectors(signed_ND))
        distances = self._distances(signed_ND)
        for n, (index, e) in enumerate(zip(indices, first, strict=False)):
            shifted = None if second is None else next(second)
            distance = None if distances is None else float(distances[n])
            flags = tuple(f for f in e.flags if f not in (OUTLIER_NORM, OTHER_LAYER))
            far = (OFF_DISTRIBUTION,) if distance is not None and distance > _FAR else ()
            yield FeatureExplanation(
                index=index,
                text=e.text,
                raw_text=e.raw_text,
                token_ids=e.token_ids,
                norm=float(rows_ND[n].norm()),
                cos=e.cos,
                mse_nrm=e.mse_nrm,
                fve_nrm=e.fve_nrm,
                sign=self.sign,
                complete=e.complete,
                flags=(*flags, *far, *self.place_flags),
                distance=distance,
                shifted_text=None if shifted is None else shifted.text,
                shifted_cos=None if shifted is None else shifted.cos,
            )

    def _explain(self, vectors_ND: Tensor) -> Iterator[Explanation]:
        return self.nla.explain_iter(vectors_ND, **{"progress": False, **self.options})

    def _distances(self, rows_ND: Tensor) -> Tensor | None:
        """`||u - m||^2 / var` `[n]`: u the row at length 1, m the mean of residuals at length 1.

        var_nrm is the variance at length sqrt(d) for each of d entries, so it is that of the whole
        vector at length 1, and ||m||^2 = 1 - var_nrm. The given mean says where m points to.
        """
        var, scale = self.nla.spec.var_nrm, self.nla.spec.mse_scale
        if self.shift is None or var is None or scale is None:
            return None
        var = var * rows_ND.shape[-1] / scale**2
        if not 0 < var < 1:
            return None
        mean_D = unit(self.shift.mean_D[None])[0] * (1 - var) ** 0.5
        return (unit(rows_ND) - mean_D).square().sum(-1) / var


def label_score(
    nla: NLA,
    texts: Sequence[str],
    rows: Tensor,
    *,
    others: Tensor | None = None,
    mean: Tensor | None = None,
) -> LabelScores:
    """Scores labels from elsewhere against decoder rows by the reconstructor.

    A cosine alone says little: AR(label) always points to where residuals are. Whether the label's
    own row is found among the others cannot be had by a label that fits any of them.

    Args:
        nla: The NLA.
        texts: n labels.
        rows: Their decoder rows `[n, d]`.
        others: Further rows `[m, d]` to be told apart from.
        mean: The mean residual `[d]`, taken off AR(label) before it is compared.

    Raises:
        NLAError: Not as many labels as rows, another width, or no reconstructor.
    """
    check_nla(nla)
    batch = check_vectors(rows, nla.spec.d_model)
    rows_ND = batch.vectors_ND
    if len(texts) != len(rows_ND) or isinstance(texts, str):
        raise NLAError(f"{len(texts)} labels cannot be scored against {len(rows_ND)} rows")
    said_ND = nla.reconstruct(texts)
    if mean is not None:
        shift = _Shift.of(nla, mean, None)
        # AR gives directions: both are taken at length 1.
        said_ND = unit(said_ND) if shift is None else unit(said_ND) - unit(shift.mean_D[None])
    all_MD = rows_ND
    if others is not None:
        all_MD = torch.cat([rows_ND, check_vectors(others, nla.spec.d_model).vectors_ND])
    fit_NM = unit(said_ND) @ unit(all_MD).T
    own_N1 = fit_NM.diagonal()[:, None]
    rank_N = (fit_NM > own_N1).sum(-1)
    return LabelScores(cosine(said_ND, rows_ND), rank_N, len(all_MD))
