"""What `check_vectors` makes of vectors. What it refuses is in test_explain.py."""

from __future__ import annotations

import array
import collections
import decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch._subclasses import FakeTensorMode

from nla_lens import NLAError, ResidualTensor
from nla_lens.stream.origin import UNKNOWN
from nla_lens.stream.residual import Origin, locate
from nla_lens.stream.vectors import check_vectors


def objects(parts: list) -> np.ndarray:
    """An array of objects: older versions of numpy look into tensors to make one."""
    held = np.empty(len(parts), dtype=object)
    for n, part in enumerate(parts):
        held[n] = part
    return held


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
    assert check_vectors(resid.float().clone(), 4).origin.hook_name == "blocks.3.hook_resid_post"
    assert check_vectors(resid * 1, 4).origin is None


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


# What people hand over


class Exported:
    """An array of a framework that is not here: JAX, CuPy, ..."""

    def __init__(self, tensor: torch.Tensor, error: Exception | None = None) -> None:
        self.tensor, self.error = tensor, error

    def __dlpack__(self, **options: Any) -> Any:
        if self.error:
            raise self.error
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


class ActivationCache:
    """Has keys and members and is no mapping, as TransformerLens'."""

    def keys(self) -> list[str]:
        return ["blocks.0.hook_resid_post"]

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.ones(4)

    def __iter__(self) -> Any:
        return iter(self.keys())


V = [[1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 2.0, 8.0]]
T2 = torch.tensor(V)
FORMS: dict[str, tuple[Any, list[Any]]] = {
    "floats": (V[0], V[0]),
    "a tuple of floats": (tuple(V[0]), V[0]),
    "numpy's floats": ([np.float32(x) for x in V[0]], V[0]),
    "torch's floats": ([torch.tensor(x) for x in V[0]], V[0]),
    "lists of floats": (V, V),
    "lists of lists": ([V, V, V], [V, V, V]),
    "a list of bfloat16": ([t.bfloat16() for t in T2], V),
    "a list of float8": ([t.to(torch.float8_e5m2) for t in T2], V),
    "a list of several dtypes": ([T2[0].double(), T2[1].half()], V),
    "a list of all kinds": ([T2[0], np.array(V[1]), V[0], tuple(V[1])], [*V, *V]),
    "a list with gradients": ([t.clone().requires_grad_() for t in T2], V),
    "a tuple of batches": ((T2, T2), [V, V]),
    "unequal lengths": ([T2, T2[:1], T2[1]], [*V, V[0], V[1]]),
    "an empty one among them": ([T2, T2[:0]], V),
    "a deque": (collections.deque(T2), V),
    "an array of arrays": (np.array([[*T2[0].tolist()], None], dtype=object)[:1], [V[0]]),
    "floats as objects": (np.array(V, dtype=object), V),
    "a column of floats": (pd.Series(V[0]), V[0]),
    "a column of lists": (pd.Series(V, index=["a", "b"]), V),
    "a column of arrays": (pd.Series([np.array(v, dtype=np.float16) for v in V]), V),
    "a column of tensors": (pd.Series(objects(list(T2.bfloat16()))), V),
    "nullable floats": (pd.Series(V[0], dtype="Float64"), V[0]),
    "a frame": (pd.DataFrame(V, columns=list("abcd")), V),
    "a column of a frame": (pd.DataFrame({"v": V, "text": ["a", "b"]})["v"], V),
    "array.array": (array.array("d", V[0]), V[0]),
    "memory": (memoryview(np.array(V, dtype=np.float32)), V),
    "a read-only array": (np.broadcast_to(np.array(V[0]), (3, 4)), [V[0]] * 3),
    "a mask that hides nothing": (np.ma.masked_array(V), V),
    "dlpack": (Exported(T2), V),
    "sparse": (T2.to_sparse(), V),
    "a parameter": (torch.nn.Parameter(T2), V),
    "a view": (T2.expand(2, 2, 4), [V, V]),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    given, wanted = FORMS[name]
    batch = check_vectors(given, 4)
    assert batch.shape == tuple(np.shape(wanted)[:-1])
    assert batch.vectors_ND.equal(torch.tensor(wanted).reshape(-1, 4))
    assert type(batch.vectors_ND) is torch.Tensor and batch.origin is None


SELF: list[Any] = []
SELF.append(SELF)
MISFITS: dict[str, tuple[Any, str]] = {
    "text": ("abc", "found str: a text, which explain_text reads"),
    "texts": (["abc"], r"found list: vectors\[0\] is a text"),
    "nothing": (None, "found NoneType"),
    "nothing in a list": ([V[0], None], r"found list: vectors\[1\] is a NoneType"),
    "bytes": (b"abcd", "found bytes"),
    "a dict": (
        {"resid_post": T2},
        r"found dict: a mapping with the keys \['resid_post'\]; pass one",
    ),
    "a cache": (ActivationCache(), "found ActivationCache: .* of several; pass one of its entries"),
    "a generator": ((v for v in V), r"found generator: an iterator; pass list\(...\)"),
    "a set": ({1.0, 2.0}, "found set"),
    "ragged": (
        [V[0], V[1][:3]],
        r"vectors\[1\] has shape \(3,\), vectors\[0\] \(4,\); .*one width",
    ),
    "ragged deeper": ([V, [V[0], [1.0]]], r"vectors\[1\]\[1\] has shape \(1,\)"),
    "ragged tensors": ([T2, T2[:, :3]], r"vectors\[1\] has shape \(2, 3\)"),
    "a number among vectors": ([1.0, T2[0]], r"vectors\[0\] is the number 1.0"),
    "integers in a list": (
        [T2[0], torch.ones(4, dtype=torch.long)],
        r"vectors\[1\] is torch.int64",
    ),
    "a list of integers": ([[5, 6, 7, 8]], r"int64; .*Token ids"),
    "a range": (range(4), "int64"),
    "decimals": ([decimal.Decimal(1)] * 4, "found list: an array of dtype object"),
    "complex": ([1j] * 4, "complex128"),
    "a column with a gap": (pd.Series([V[0], None]), r"found Series: vectors\[1\] is a NoneType"),
    "a frame of columns of lists": (pd.DataFrame({"v": V, "t": ["a", "b"]}), "found DataFrame"),
    "a column of texts": (pd.Series(["a"]), "found Series"),
    "fields": (np.zeros(4, dtype=[("a", "f4")]), "found ndarray: an array of dtype"),
    "dates": (np.array(["2020-01-01"] * 4, dtype="M8[D]"), "dtype datetime64"),
    "hidden values": (np.ma.masked_array(V, mask=np.eye(2, 4)), "masked values; fill or drop"),
    "meta": (T2.to("meta"), "found Tensor: on the meta device"),
    "meta in a list": ([T2.to("meta")], r"found list: vectors\[0\] is on the meta device"),
    "parts of unequal length": (
        torch.nested.nested_tensor([T2, T2[:1]], layout=torch.jagged),
        r"a nested tensor; pass list\(...\)",
    ),
    "a tensor that only pretends": (FakeTensorMode().from_tensor(T2), "a FakeTensor that gives no"),
    "what fails": (Exported(T2, OSError("no device")), r"found Exported: .*OSError: no device"),
    "itself": (SELF, "found list: nested deeper than 16"),
    "nothing at all": ([], r"shape \(0,\)"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_refused_in_our_words(name: str) -> None:
    given, names = MISFITS[name]
    with pytest.raises(NLAError, match=names) as caught:
        check_vectors(given, 4)
    message = str(caught.value)
    assert not any(word in message for word in ("inhomogeneous", "ufunc", "object_", "Numpy"))


HUGE: dict[str, Any] = {
    "a view": torch.ones(1, 4).expand(10**11, 4),
    "a view in bfloat16": torch.ones(1, 1, 4).bfloat16().expand(10**6, 10**5, 4),
    "an array": np.broadcast_to(np.ones(4, dtype=np.float32), (10**11, 4)),
    "a sparse one": torch.sparse_coo_tensor(
        torch.zeros(2, 1), torch.ones(1), (10**11, 4), check_invariants=True
    ),
    "several": [torch.ones(4).expand(10**9, 4)] * 100,
    "a residual": ResidualTensor.wrap(
        torch.ones(1, 4), Origin("blocks.0.hook_resid_post", locate(torch.ones(1, 1))[0])
    ).expand(10**11, 4),
}


@pytest.mark.parametrize("given", HUGE.values(), ids=HUGE)
def test_what_does_not_fit_into_memory_is_refused_before_it_is_taken(given: Any) -> None:
    with pytest.raises(NLAError, match=r"1,600\.0 GB in float32, and .* GB are free; .*in pieces"):
        check_vectors(given, 4)


def residual(hook_name: str | None, n: int, first_id: int) -> ResidualTensor:
    where = locate(first_id + torch.arange(n)[None])[0]
    return ResidualTensor.wrap(torch.rand(n, 4) + 1, Origin(hook_name, where))


def known(batch: Any) -> list[tuple[Any, ...]]:
    """Hook, position and token id of each vector."""
    return [
        (batch.origin.recording(i).hook_name, *batch.origin.where_LX3[i].tolist()[1:])
        for i in range(len(batch))
    ]


def column(parts: list) -> pd.Series:
    return pd.Series(objects(parts))


@pytest.mark.parametrize("as_list", [list, tuple, column], ids=["list", "tuple", "Series"])
def test_a_list_of_residuals_keeps_what_they_know(as_list: Any) -> None:
    a, b = residual("a", 2, 10), residual("b", 2, 20)
    stacked = check_vectors(as_list([a, b]), 4)
    assert stacked.shape == (2, 2)
    assert known(stacked) == [("a", 0, 10), ("a", 1, 11), ("b", 0, 20), ("b", 1, 21)]
    flat = check_vectors(as_list([a, b[:1], b[1]]), 4)
    assert flat.shape == (4,) and known(flat) == known(stacked)
    assert flat.vectors_ND.equal(torch.cat([a, b]))
    vectors = check_vectors(as_list([a[1], b.bfloat16()[0]]), 4)
    assert vectors.shape == (2,) and known(vectors) == [("a", 1, 11), ("b", 0, 20)]


def test_among_residuals_an_ordinary_tensor_stays_unknown() -> None:
    batch = check_vectors([residual("a", 1, 10), torch.ones(1, 4), V[0]], 4)
    assert known(batch) == [("a", 0, 10), (None, UNKNOWN, -1), (None, UNKNOWN, -1)]


def test_where_tensors_have_no_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    wanted = "no values that can be read here"
    with pytest.raises(NLAError, match=wanted):
        torch.func.vmap(lambda v_D: check_vectors(v_D, 3).vectors_ND)(torch.ones(2, 3))
    vectors = torch.ones(2, 3)
    with pytest.raises(NLAError, match=wanted), FakeTensorMode():
        check_vectors(vectors, 3)
