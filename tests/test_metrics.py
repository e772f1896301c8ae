"""cos, mse_nrm, fve_nrm and var_nrm, against plain float64 arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nla_lens.results import metrics

from .checkpoints import vectors


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions of vectors, from nearly right to opposite, of norms of their own."""
    gold = vectors(n=8, seed=1)
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    share = torch.tensor([0.0, 1e-3, 0.1, 0.5, 1.0, 3.0, 1e3, 0.0])[:, None]
    sign = torch.tensor([1.0] * 7 + [-1.0])[:, None]
    direction = gold / gold.norm(dim=-1, keepdim=True)
    return sign * (direction + share * noise) * torch.logspace(-5, 5, 8)[:, None], gold


def by_hand(pred, gold, scale: float) -> tuple[np.ndarray, np.ndarray]:
    p, g = pred.double().numpy(), gold.double().numpy()
    p = p / np.sqrt((p**2).sum(-1, keepdims=True))
    g = g / np.sqrt((g**2).sum(-1, keepdims=True))
    return (p * g).sum(-1), ((scale * p - scale * g) ** 2).sum(-1) / p.shape[-1]


@pytest.mark.parametrize("scale", [8.0, 1.0, 59.8665])
def test_scores(pairs, scale: float) -> None:
    pred, gold = pairs
    cos, mse = by_hand(pred, gold, scale)
    got = metrics.score(pred, gold, mse_scale=scale, var_nrm=0.7335)
    np.testing.assert_allclose(got.cos, cos, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.mse_nrm, mse, rtol=1e-4, atol=1e-5 * scale**2 / 64)
    np.testing.assert_allclose(got.fve_nrm, 1 - mse / 0.7335, rtol=1e-4, atol=2e-5 * scale**2 / 64)
    assert len(got) == 8


def test_with_sqrt_d_mse_is_two_times_one_minus_cos(pairs) -> None:
    pred, gold = pairs
    got = metrics.score(pred, gold, mse_scale=math.sqrt(64), var_nrm=None)
    torch.testing.assert_close(got.mse_nrm, 2 * (1 - got.cos), rtol=1e-3, atol=2e-6)
    assert got.fve_nrm is None
    assert float(got.mse_nrm[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(got.mse_nrm[7]) == pytest.approx(4.0, abs=1e-5)


def test_raw_comparison_without_a_scale() -> None:
    pred, gold = torch.randn(5, 64), torch.randn(5, 64)
    got = metrics.mse_nrm(pred, gold, None)
    wanted = ((pred.double() - gold.double()) ** 2).mean(-1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)


def test_var_nrm_is_the_error_of_the_mean_vector() -> None:
    vec = vectors(n=50, seed=3)
    unit = vec.double() / vec.double().norm(dim=-1, keepdim=True) * 8.0
    wanted = float(((unit - unit.mean(0)) ** 2).mean())
    assert metrics.var_nrm(vec, 8.0) == pytest.approx(wanted, rel=1e-5)
    raw = vec.double()
    assert metrics.var_nrm(vec, None) == pytest.approx(
        float(((raw - raw.mean(0)) ** 2).mean()), rel=1e-5
    )


def test_fve_tells_what_cos_hides() -> None:
    """Nearly parallel vectors (Gemma): cos 0.99 for everything, and the mean vector scores 0."""
    shared = torch.zeros(64)
    shared[0] = 10.0
    gold = shared + torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * 0.17
    var = metrics.var_nrm(gold, 8.0)
    constant = metrics.score(gold.mean(0).expand(400, -1), gold, mse_scale=8.0, var_nrm=var)
    assert float(constant.cos.mean()) > 0.98
    assert float(constant.fve_nrm.mean()) == pytest.approx(0.0, abs=0.02)


def test_zero_and_extreme_reconstructions() -> None:
    gold = torch.eye(64)[:4]
    pred = gold * torch.tensor([0.0, 1e-38, 1e38, -1e30])[:, None]
    got = metrics.score(pred, gold, mse_scale=8.0, var_nrm=1.0)
    assert got.cos.tolist() == pytest.approx([0.0, 1.0, 1.0, -1.0], abs=1e-6)
    assert got.mse_nrm.tolist() == pytest.approx([1.0, 0.0, 0.0, 4.0], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    pred, gold = torch.randn(4, 64).to(dtype), torch.randn(4, 64).to(dtype)
    got = metrics.score(pred, gold, mse_scale=8.0, var_nrm=0.5)
    cos, _ = by_hand(pred, gold, 8.0)
    assert got.cos.dtype == got.mse_nrm.dtype == got.fve_nrm.dtype == torch.float32
    np.testing.assert_allclose(got.cos, cos, rtol=0, atol=1e-6)
