"""The arithmetic of the two rules, and finding the one place they act on."""

from __future__ import annotations

import pytest
import torch

from nla_lens import NLAError, ResidPost
from nla_lens.stream.injection import (
    NORM_MATCHED_ADD_AT,
    find_marker,
    norm_matched_add,
    norms,
    replace,
    rescale,
    unit,
)
from nla_lens.stream.template import fill

from .checkpoints import vectors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def embed_BTD() -> torch.Tensor:
    return torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(1))


def test_rescale_gives_the_norm_and_keeps_the_direction() -> None:
    vec_ND = vectors()
    scaled = rescale(vec_ND, 150.0).double()
    torch.testing.assert_close(
        scaled.norm(dim=-1), torch.full((6,), 150.0).double(), rtol=1e-6, atol=0
    )
    by_hand = vec_ND.double() * (150.0 / vec_ND.double().norm(dim=-1, keepdim=True))
    assert float(((scaled - by_hand).norm(dim=-1) / 150.0).max()) < 5e-7


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e38])
def test_rescale_where_squares_leave_float32(size: float) -> None:
    vec_ND = unit(vectors()) * size
    assert vec_ND.isfinite().all()
    scaled = rescale(vec_ND, 30.0).double()
    torch.testing.assert_close(
        scaled.norm(dim=-1), torch.full((6,), 30.0).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        norms(vec_ND)[:, 0].double() / size, torch.ones(6).double(), rtol=1e-5, atol=0
    )


def test_a_zero_vector_stays_zero() -> None:
    zero = torch.zeros(2, 64)
    assert torch.equal(rescale(zero, 30.0), zero)
    assert torch.equal(unit(zero), zero)
    assert torch.equal(norms(zero), torch.zeros(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_taken_in_float32(dtype: torch.dtype) -> None:
    """The norm of the very numbers that are given; a norm in bf16 would be off by up to 0.4 %."""
    vec_ND = vectors(n=64, seed=4).clamp(-1e3, 1e3).to(dtype)
    vec_ND = vec_ND[vec_ND.ne(0).any(-1)]
    wanted = vec_ND.double().norm(dim=-1)
    torch.testing.assert_close(norms(vec_ND)[:, 0].double(), wanted, rtol=1e-6, atol=0)
    scaled = rescale(vec_ND, 30.0)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(
        scaled.double().norm(dim=-1), torch.full_like(wanted, 30.0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_replace(embed_BTD: torch.Tensor, dtype: torch.dtype) -> None:
    embed_BTD, before = embed_BTD.to(dtype), embed_BTD.to(dtype)
    scaled = rescale(vectors(), 30.0)
    out_BTD = replace(embed_BTD, scaled, 3)
    assert out_BTD.dtype == dtype
    assert torch.equal(embed_BTD, before)  # a copy
    assert torch.equal(out_BTD[:, 3], scaled.to(dtype))
    others = [0, 1, 2, 4]
    assert torch.equal(out_BTD[:, others], before[:, others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_matched_add(embed_BTD: torch.Tensor, dtype: torch.dtype) -> None:
    resid_BTD, before = embed_BTD.to(dtype), embed_BTD.to(dtype)
    out_BTD = norm_matched_add(resid_BTD, vectors(), 3)
    assert out_BTD.dtype == dtype
    assert torch.equal(resid_BTD, before)
    h_BD, v_BD = before[:, 3].double(), vectors().double()
    by_hand = h_BD + h_BD.norm(dim=-1, keepdim=True) * v_BD / v_BD.norm(dim=-1, keepdim=True)
    error = (out_BTD[:, 3].double() - by_hand).norm(dim=-1) / by_hand.norm(dim=-1)
    assert float(error.max()) < {torch.float32: 1e-6}.get(dtype, 4e-3)
    others = [0, 1, 2, 4]
    assert torch.equal(out_BTD[:, others], before[:, others])


def test_norm_matched_add_depends_on_the_direction_alone(embed_BTD: torch.Tensor) -> None:
    once = norm_matched_add(embed_BTD, vectors(), 2)
    torch.testing.assert_close(norm_matched_add(embed_BTD, vectors() * 1e3, 2), once)
    assert (once[:, 2] - embed_BTD[:, 2]).norm(dim=-1) == pytest.approx(
        embed_BTD[:, 2].norm(dim=-1).tolist(), rel=1e-5
    )


def test_norm_matched_add_of_nothing_adds_nothing(embed_BTD: torch.Tensor) -> None:
    assert torch.equal(norm_matched_add(embed_BTD, torch.zeros(6, 64), 2), embed_BTD)


def test_norm_matched_add_acts_at_the_output_of_block_1() -> None:
    assert ResidPost(1) == NORM_MATCHED_ADD_AT
    assert NORM_MATCHED_ADD_AT.name == "blocks.1.hook_resid_post"


# --- the marker -----------------------------------------------------------------------------------

M, L, R = 7, 5, 9


@pytest.mark.parametrize(
    ("ids", "sides", "at"),
    [
        ([1, L, M, R, 2], (L, R), 2),
        ([1, L, M, R, 2], (None, None), 2),
        ([L, M, R], (L, R), 1),
        ([M, 1, L, M, R, M], (L, R), 3),
        ([1, M, R, L, M, R], (L, R), 4),
        ([1, L, M, 4, L, M, R], (None, R), 5),
    ],
)
def test_the_marker_is_found_by_its_neighbours(ids: list[int], sides, at: int) -> None:
    assert find_marker(ids, M, *sides) == at


@pytest.mark.parametrize(
    ("ids", "sides", "names"),
    [
        ([1, L, 2, R], (L, R), r"prompt of 4 tokens has 0 injection sites \(marker token 7\)"),
        ([], (L, R), "prompt of 0 tokens has 0"),
        ([L, M, R, L, M, R], (L, R), "has 2 injection sites"),
        ([1, M, 2, M, 3], (None, None), "has 2 injection sites"),
        ([1, 2, M, R], (L, R), r"stands in the prompt as \[\(2, 7, 9\)\].*neighbours are 5 and 9"),
        ([1, L, M, 2], (L, R), r"\[\(5, 7, 2\)\]"),
        ([M, R, 1], (None, R), r"\[\(7, 9\)\]"),
        ([1, L, M], (L, None), r"\[\(5, 7\)\]"),
    ],
)
def test_no_site_or_two_are_never_guessed_at(ids: list[int], sides, names: str) -> None:
    with pytest.raises(NLAError, match=names):
        find_marker(ids, M, *sides)


# --- templates ------------------------------------------------------------------------------------


def test_fill_puts_the_value_in_as_it_is() -> None:
    value = "{x} {explanation} {0.__class__} %s $x \\n "
    assert fill("a {explanation} b", "{explanation}", value) == f"a {value} b"


def test_fill_never_formats() -> None:
    """A template comes from a stranger's file: a format field could read attributes."""
    template = "{x.__class__.__init__.__globals__} {explanation!r} {explanation} {"
    assert fill(template, "{explanation}", "v") == template.replace("{explanation}", "v")


@pytest.mark.parametrize(("template", "count"), [("", 0), ("{x}", 0), ("{x}{e}{e}", 2)])
def test_fill_wants_one_placeholder(template: str, count: int) -> None:
    with pytest.raises(NLAError, match=rf"\{{e\}} exactly once, found {count}"):
        fill(template, "{e}", "v")
