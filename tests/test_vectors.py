"""What `check_vectors` makes of vectors. What it refuses is in test_explain.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nla_lens import NLAError, ResidualTensor
from nla_lens.stream.residual import Origin, locate
from nla_lens.stream.vectors import check_vectors


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4), (2, 0, 4)])
def test_one_form_for_all(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = (torch.rand(shape) + 0.5).to(dtype)
    batch = check_vectors(given, 4)
    assert batch.vectors_ND.dtype == torch.float32
    assert batch.vectors_ND.device.type == "cpu"
    assert not batch.vectors_ND.requires_grad
    assert batch.shape == shape[:-1]
    assert torch.equal(batch.vectors_ND, given.float().reshape(-1, 4))
    assert len(batch) == given.numel() // 4
    assert batch.origin is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy(dtype: type, order: str) -> None:
    given = np.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), dtype=dtype, order=order)
    batch = check_vectors(given, 4)
    np.testing.assert_array_equal(batch.vectors_ND.numpy(), given.reshape(6, 4).astype(np.float32))


def test_the_values_are_a_copy() -> None:
    given, array = torch.ones(2, 4), np.ones((2, 4), dtype=np.float32)
    batches = check_vectors(given, 4), check_vectors(array, 4)
    given.zero_()
    array[:] = 0
    for batch in batches:
        assert torch.equal(batch.vectors_ND, torch.ones(2, 4))


def test_a_graph_is_left_behind_and_not_changed() -> None:
    leaf = torch.ones(2, 4, requires_grad=True)
    batch = check_vectors(leaf * 2, 4)
    assert batch.vectors_ND.grad_fn is None and leaf.requires_grad


def test_the_origin_is_flattened_with_the_vectors() -> None:
    origin = Origin("blocks.3.hook_resid_post", locate(torch.tensor([[5, 6, 7], [8, 9, 10]])))
    resid = ResidualTensor.wrap(torch.rand(2, 3, 4) + 1, origin)
    batch = check_vectors(resid, 4)
    assert batch.origin.where_LX3.tolist() == [
        [0, 0, 5], [0, 1, 6], [0, 2, 7], [1, 0, 8], [1, 1, 9], [1, 2, 10]
    ]  # fmt: skip
    one = check_vectors(resid[1, 2], 4)
    assert one.shape == () and one.origin.where_LX3.tolist() == [[1, 2, 10]]
    assert check_vectors(resid.float().clone(), 4).origin is None


@pytest.mark.parametrize(
    ("where", "index"), [((0,), r"\(0,\)"), ((1, 2), r"\(1, 2\)"), ((1, 0, 3), r"\(1, 0, 3\)")]
)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_the_place_of_a_bad_vector_is_named(where: tuple[int, ...], index: str, bad: float) -> None:
    given = torch.ones(*(i + 2 for i in where), 4)
    given[where] = bad
    with pytest.raises(NLAError, match=f"the vector at index {index} "):
        check_vectors(given, 4)


def test_of_several_bad_vectors_the_first_is_named() -> None:
    given = torch.ones(5, 4)
    given[2, 1], given[3, 0] = torch.nan, torch.inf
    with pytest.raises(NLAError, match=r"index \(2,\) holds nan"):
        check_vectors(given, 4)


def test_one_zero_component_is_no_zero_vector() -> None:
    assert len(check_vectors(torch.eye(4), 4)) == 4


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble, np.float16])
def test_every_float_of_numpy(dtype: object) -> None:
    wanted = torch.arange(1.0, 9.0)
    batch = check_vectors(wanted.numpy().astype(dtype), 8)
    assert torch.equal(batch.vectors_ND[0], wanted)
