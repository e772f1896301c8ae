"""How well a reconstruction fits its vector: cos, mse_nrm and fve_nrm.

Both sides are scaled to norm `mse_scale` (sqrt(d) unless a checkpoint says otherwise) before they
are compared, so only directions count: with sqrt(d), `mse_nrm = 2 (1 - cos)`, in [0, 4].
`fve_nrm = 1 - mse_nrm / var_nrm` is the fraction of variance explained; `var_nrm` is the variance
of the normalised vectors around their mean over the training set. cos alone misleads: where vectors
are nearly parallel (Gemma 3 12B: var_nrm 0.03) cos 0.99 is mediocre.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nla_lens.models.ambient import undisturbed
from nla_lens.stream.injection import rescale, unit


@dataclass(frozen=True)
class Scores:
    """Scores of n reconstructions, one entry each.

    Attributes:
        cos: `[n]` float32, cosine of reconstruction and vector.
        mse_nrm: `[n]` float32, mean squared difference after scaling both to `mse_scale`.
        fve_nrm: `[n]` float32, `1 - mse_nrm / var_nrm`; None where var_nrm is not known.
    """

    cos: Tensor
    mse_nrm: Tensor
    fve_nrm: Tensor | None

    def __len__(self) -> int:
        return len(self.cos)


def cosine(pred_ND: Tensor, gold_ND: Tensor) -> Tensor:
    """Cosine `[n]`, float32; 0 where either side is zero."""
    return (unit(pred_ND) * unit(gold_ND)).sum(-1).clamp(-1.0, 1.0)


def mse_nrm(pred_ND: Tensor, gold_ND: Tensor, mse_scale: float | None) -> Tensor:
    """Mean squared difference `[n]` of both sides scaled to `mse_scale`; None compares raw."""
    if mse_scale is None:
        return (pred_ND.float() - gold_ND.float()).square().mean(-1)
    return (rescale(pred_ND, mse_scale) - rescale(gold_ND, mse_scale)).square().mean(-1)


def var_nrm(vec_ND: Tensor, mse_scale: float | None) -> float:
    """Variance of the normalised vectors around their mean: the baseline of `fve_nrm`."""
    scaled_ND = vec_ND.float() if mse_scale is None else rescale(vec_ND, mse_scale)
    return float((scaled_ND - scaled_ND.mean(0)).square().mean())


@undisturbed()
def score(
    pred_ND: Tensor,
    gold_ND: Tensor,
    *,
    mse_scale: float | None,
    var_nrm: float | None,
    mean_D: Tensor | None = None,
) -> Scores:
    """All three scores of reconstructions `[n, d]` against vectors `[n, d]`.

    Args:
        pred_ND: The reconstructions.
        gold_ND: The vectors.
        mse_scale: Norm both sides are given; None compares them raw.
        var_nrm: Baseline of fve_nrm.
        mean_D: Taken from both sides first, where an NLA was trained on centred vectors.
    """
    gold_ND = gold_ND.to("cpu", torch.float32)
    pred_ND = pred_ND.to("cpu", torch.float32)
    if mean_D is not None:
        gold_ND, pred_ND = gold_ND - mean_D, pred_ND - mean_D
    mse = mse_nrm(pred_ND, gold_ND, mse_scale)
    return Scores(
        cos=cosine(pred_ND, gold_ND),
        mse_nrm=mse,
        fve_nrm=None if var_nrm is None else 1.0 - mse / var_nrm,
    )
