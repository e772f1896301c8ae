"""ResidualTensor: what slicing keeps, and that everything else sees an ordinary tensor."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import einops
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nla_lens import NLA, NLAError, ResidualTensor
from nla_lens.stream.residual import PADDING, Origin, locate

IDS_BT = torch.tensor([[9, 11, 12, 13, 14], [21, 22, 23, 24, 25]])
MASK_BT = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


class Precious:
    """Stands for an NLA: must never be pickled or copied."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AssertionError("an NLA was dragged along")

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("an NLA was dragged along")

    def explain(self, vectors: Any, **options: Any) -> Any:
        return vectors, options


def make_plain() -> Tensor:
    """[2, 5, 4]: each vector begins with its own row, position and token id."""
    where_BT3 = locate(IDS_BT, MASK_BT).float()
    return torch.cat([where_BT3, torch.full((2, 5, 1), 0.5)], dim=-1)


def make(plain: Tensor | None = None) -> ResidualTensor:
    origin = Origin("blocks.3.hook_resid_post", locate(IDS_BT, MASK_BT), chr, Precious())  # type: ignore[arg-type]
    return ResidualTensor.wrap(make_plain() if plain is None else plain, origin)


def assert_knows_itself(resid: Tensor) -> None:
    """What it knows of each vector is what stands in the vector."""
    assert isinstance(resid, ResidualTensor)
    assert torch.equal(resid.origin.where_LX3.float(), resid.as_ordinary()[..., :3])
    assert resid.hook_name == "blocks.3.hook_resid_post"
    assert isinstance(resid.origin.nla, Precious)


def assert_ordinary(result: Any) -> None:
    assert type(result) is Tensor


# What a residual knows


def test_positions_count_from_the_first_real_token() -> None:
    where = locate(IDS_BT, MASK_BT)
    assert where.dtype == torch.int64
    assert where[0, :, 1].tolist() == [PADDING, 0, 1, 2, 3]
    assert where[1, :, 1].tolist() == [0, 1, 2, 3, 4]
    assert where[:, 0, 0].tolist() == [0, 1]
    assert where[..., 2].equal(IDS_BT)


def test_positions_without_a_mask_are_indices() -> None:
    assert locate(IDS_BT)[..., 1].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_a_mask_may_have_any_dtype(dtype: torch.dtype) -> None:
    assert locate(IDS_BT.int(), MASK_BT.to(dtype)).equal(locate(IDS_BT, MASK_BT))


def test_a_mask_may_begin_with_what_is_in_a_cache() -> None:
    mask_BS = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert locate(IDS_BT[:, :2], mask_BS)[..., 1].tolist() == [[1, 2], [2, PADDING]]


def test_wrap_refuses_origins_of_another_shape() -> None:
    origin = Origin(None, locate(IDS_BT[:, :4]))
    with pytest.raises(NLAError, match=r"shape \(2, 5, 4\).*positions of shape \(2, 4\)"):
        ResidualTensor.wrap(make_plain(), origin)


def test_wrapping_again_replaces_the_origin() -> None:
    again = ResidualTensor.wrap(make(), Origin("elsewhere", locate(IDS_BT)))
    assert again.hook_name == "elsewhere"
    assert type(again) is ResidualTensor


def test_memory_is_shared() -> None:
    plain = make_plain()
    resid = make(plain)
    assert resid.data_ptr() == plain.data_ptr()
    assert resid[1, 2:].data_ptr() == plain[1, 2:].data_ptr()
    resid[1, 2] = 7.0
    assert plain[1, 2].tolist() == [7.0] * 4


# Slicing

SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "int": lambda x: x[0],
    "negative int": lambda x: x[-1],
    "numpy int": lambda x: x[np.int64(1)],
    "tensor of no axes": lambda x: x[torch.tensor(1)],
    "two ints": lambda x: x[0, -1],
    "int after int": lambda x: x[0][-1],
    "slice": lambda x: x[:, 1:3],
    "step": lambda x: x[:, ::2],
    "empty slice": lambda x: x[:, 5:],
    "ellipsis": lambda x: x[...],
    "ellipsis and all of d_model": lambda x: x[..., :],
    "ellipsis in front": lambda x: x[..., 2, :],
    "ellipsis behind": lambda x: x[1, ...],
    "ellipsis between": lambda x: x[1, ..., :],
    "ellipsis for nothing": lambda x: x[0, 1, ..., :],
    "None": lambda x: x[None],
    "None between": lambda x: x[:, None, 2],
    "None before d_model": lambda x: x[..., None, :],
    "all axes": lambda x: x[:, :, :],
    "no index": lambda x: x[()],
    "true": lambda x: x[True],
    "mask of rows": lambda x: x[torch.tensor([True, False])],
    "mask of positions": lambda x: x[MASK_BT.bool()],
    "old mask": lambda x: x[MASK_BT.to(torch.uint8)],
    "list mask": lambda x: x[[True, False]],
    "numpy mask": lambda x: x[MASK_BT.bool().numpy()],
    "mask after slice": lambda x: x[:, torch.tensor([True, False, True, False, True])],
    "index tensor": lambda x: x[:, torch.tensor([4, 0, 0])],
    "index tensor of two axes": lambda x: x[0, torch.tensor([[1, 2], [3, 4]])],
    "index array": lambda x: x[:, np.array([4, 0])],
    "list": lambda x: x[:, [4, 0]],
    "empty list": lambda x: x[:, []],
    "range": lambda x: x[:, range(1, 3)],
    "paired indices": lambda x: x[[0, 1], [1, -1]],
    "1-axis vector": lambda x: x[0, 1][:],
    "1-axis vector, None": lambda x: x[0, 1][None],
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("take", SLICES.values(), ids=SLICES)
def test_slicing_keeps_what_is_known(take: Callable[[Tensor], Tensor]) -> None:
    taken = take(make())
    assert taken.equal(take(make_plain()))
    assert_knows_itself(taken)


INTO_D_MODEL: dict[str, Callable[[Tensor], Tensor]] = {
    "a coordinate": lambda x: x[0, 1, 2],
    "a coordinate of all": lambda x: x[..., 0],
    "some coordinates": lambda x: x[..., :2],
    "listed coordinates": lambda x: x[..., [0, 1]],
    "masked coordinates": lambda x: x[x > 0],
    "coordinates of an old mask": lambda x: x[(x > 0).to(torch.uint8)],
    "coordinates of a vector": lambda x: x[0, 1][2:],
    "an axis behind d_model": lambda x: x[..., None],
    "an axis behind d_model by position": lambda x: x[:, :, :, None],
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("take", INTO_D_MODEL.values(), ids=INTO_D_MODEL)
def test_indexing_into_d_model_gives_ordinary_tensors(take: Callable[[Tensor], Tensor]) -> None:
    taken = take(make())
    assert taken.equal(take(make_plain()))
    assert_ordinary(taken)


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        arrays.basic_indices((2, 5, 4), allow_newaxis=True),
        arrays.integer_array_indices((2, 5)),
        arrays.arrays(np.bool_, (2, 5)),
        st.tuples(st.slices(2), arrays.arrays(np.bool_, 5)),
    )
)
def test_any_index_takes_what_it_takes_of_an_ordinary_tensor(index: Any) -> None:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, slice) and (part.step or 1) < 0 for part in parts):
        return  # torch has none
    taken = make()[index]
    assert taken.equal(make_plain()[index])
    if isinstance(taken, ResidualTensor):
        assert_knows_itself(taken)


@pytest.mark.parametrize("index", [5, (0, 9), (0, 0, 0, 0), 1.5])
def test_a_wrong_index_raises_as_on_an_ordinary_tensor(index: Any) -> None:
    with pytest.raises((IndexError, TypeError)) as expected:
        make_plain()[index]
    with pytest.raises(expected.type, match=r".") as raised:
        make()[index]
    assert str(raised.value) == str(expected.value)


def test_iteration_gives_rows_and_vectors_that_know_themselves() -> None:
    rows = list(make())
    assert len(rows) == 2
    for row in rows:
        assert_knows_itself(row)
        for vector in row:
            assert_knows_itself(vector)
    first, second = make()[0, 1:3]
    assert (first.origin.where_LX3.tolist(), second.origin.where_LX3.tolist()) == (
        [0, 0, 11],
        [0, 1, 12],
    )


# Everything else

ORDINARY: dict[str, Callable[[Tensor], Any]] = {
    "sum with a number": lambda x: x + 1,
    "number first": lambda x: 1 - x,
    "sum with itself": lambda x: x + x,
    "matmul": lambda x: x @ x.mT,
    "float": lambda x: x.float(),
    "float16": lambda x: x.to(torch.float16),
    "same device": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "reshape": lambda x: x.reshape(10, 4),
    "view": lambda x: x.view(2, 5, 4),
    "transpose": lambda x: x.mT,
    "squeeze": lambda x: x[0, :1].squeeze(0),
    "expand": lambda x: x.expand(2, 5, 4),
    "unbind": lambda x: x.unbind(0)[0],
    "mean": lambda x: x.mean(0),
    "norm": lambda x: x.norm(dim=-1),
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack(list(x)),
    "comparison": lambda x: x == x,
    "out": lambda x: torch.add(x, 1, out=x),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "numpy round trip": lambda x: torch.from_numpy(x.numpy()),
    "dlpack": lambda x: torch.from_dlpack(x),
    "einops": lambda x: einops.rearrange(x, "b t d -> (b t) d"),
    "einops of a list": lambda x: einops.rearrange(list(x), "b t d -> t b d"),
    "einops reduce": lambda x: einops.reduce(x, "b t d -> b d", "max"),
    "einsum": lambda x: einops.einsum(x, x, "b t d, b s d -> b t s"),
    "vmap": lambda x: torch.func.vmap(lambda v: v * 2)(x),
    "jacobian": lambda x: torch.func.jacrev(lambda v: (v**2).sum())(x),
    "collate": lambda x: torch.utils.data.default_collate([x, x]),
}


@pytest.mark.parametrize("compute", ORDINARY.values(), ids=ORDINARY)
def test_computing_gives_ordinary_tensors(compute: Callable[[Tensor], Any]) -> None:
    result = compute(make())
    assert_ordinary(result)
    assert result.equal(compute(make_plain()))


def test_it_goes_into_a_compiled_function() -> None:
    # Inductor takes it, too, but needs a C++ compiler and seconds; under "aot_eager" torch 2.13
    # fails on the first call with any subclass of Tensor, an empty one included.
    double = torch.compile(lambda x: (x * 2).relu() + x[0], backend="eager")
    result = double(make())
    assert_ordinary(result)
    assert result.equal(make_plain().mul(2).relu() + make_plain()[0])


def test_it_goes_into_a_module() -> None:
    torch.manual_seed(0)
    module = torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    assert_ordinary(module(make()))
    assert module(make()).equal(module(make_plain()))


def test_operations_in_place_stay_in_place() -> None:
    plain = make_plain()
    resid = make(plain)
    kept = resid
    resid += 1
    resid.mul_(2)
    resid[:, 0] = 0
    assert kept is resid
    assert plain[1, 1].equal((make_plain()[1, 1] + 1) * 2)
    assert plain[:, 0].eq(0).all()
    assert isinstance(resid, ResidualTensor)


def test_moving_axes_in_place_loses_what_was_known() -> None:
    row = make()[0]
    row.t_()
    assert_ordinary(row[0])
    assert "hook_name=None" in repr(row)
    with pytest.raises(NLAError, match="came from is not known"):
        row.explain()


def test_gradients_flow_through_it() -> None:
    resid = make().requires_grad_()
    (resid[0, 1:] ** 2).sum().backward()
    assert resid.grad is not None
    assert_ordinary(resid.grad)
    assert resid.grad[0, 1:].equal(2 * make_plain()[0, 1:])
    assert resid.grad[1].eq(0).all()


def test_it_patches_into_ordinary_tensors() -> None:
    target = torch.zeros(2, 5, 4)
    target[:, 2] = make()[:, 2]
    assert_ordinary(target)
    assert target[:, 2].equal(make_plain()[:, 2])


def test_numpy_and_python_see_the_values() -> None:
    resid = make()
    assert np.array_equal(np.asarray(resid), make_plain().numpy())
    assert type(resid.numpy()) is np.ndarray
    assert resid.tolist() == make_plain().tolist()
    assert float(resid[0, 1, 2]) == 11.0
    assert len(resid) == 2


def test_repr_and_format() -> None:
    shown = repr(make()[0, -1])
    assert shown == (
        "ResidualTensor(tensor([ 0.0000,  3.0000, 14.0000,  0.5000]), "
        "hook_name='blocks.3.hook_resid_post')"
    )
    assert f"{make()[0, -1]}" == shown
    assert "hook_name=None" in repr(make_plain().as_subclass(ResidualTensor))


# Copies leave the NLA behind

COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy of a cache": lambda x: copy.deepcopy({"resid": x})["resid"],
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_are_ordinary(make_copy: Callable[[Tensor], Tensor]) -> None:
    copied = make_copy(make()[:, 1:])
    assert_ordinary(copied)
    assert copied.equal(make_plain()[:, 1:])


def test_torch_save_writes_what_weights_only_loads() -> None:
    buffer = io.BytesIO()
    torch.save({"cached": make()}, buffer)
    assert b"nla_lens" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["cached"]
    assert_ordinary(loaded)
    assert loaded.equal(make_plain())


def test_safetensors_writes_it(tmp_path: Any) -> None:
    save_file({"cached": make()}, tmp_path / "cached.safetensors")
    assert load_file(tmp_path / "cached.safetensors")["cached"].equal(make_plain())


def test_torch_itself_is_not_patched() -> None:
    before = dict(vars(Tensor))
    resid = make()
    repr(resid[0] + 1)
    assert dict(vars(Tensor)) == before
    assert not hasattr(Tensor, "explain")
    assert not hasattr(torch.zeros(1), "explain")


# explain


def test_explain_hands_itself_to_its_own_nla() -> None:
    resid = make()[0, 2]
    vectors, options = resid.explain(max_new_tokens=3)
    assert vectors is resid
    assert options == {"max_new_tokens": 3}


def test_explain_takes_another_nla() -> None:
    other = Precious()
    other.explain = lambda vectors, **options: "other"  # type: ignore[method-assign]
    assert make().explain(other) == "other"  # type: ignore[arg-type]


def test_explain_without_an_nla_says_what_to_do() -> None:
    resid = ResidualTensor.wrap(make_plain(), Origin("blocks.0.hook_resid_post", locate(IDS_BT)))
    with pytest.raises(NLAError, match=r"nla_lens\.attach\(model, nla\).*\.explain\(nla\)"):
        resid.explain()


def test_explanations_carry_what_is_known(nla: NLA) -> None:
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    where = locate(ids, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    vectors = torch.randn(2, 3, nla.spec.d_model, generator=torch.Generator().manual_seed(0))
    name = nla.spec.hook_name
    resid = ResidualTensor.wrap(vectors, Origin(name, where, lambda i: f"<{i}>", nla))
    found = resid.explain(max_new_tokens=2)
    assert found.shape == (2, 3)
    assert [e.position for e in found.flat] == [PADDING, 0, 1, 0, 1, 2]
    assert [e.token_id for e in found.flat] == ids.flatten().tolist()
    assert [e.token for e in found.flat] == [f"<{i}>" for i in range(3, 9)]
    assert {e.hook_name for e in found.flat} == {name}
    assert ["padding" in e.flags for e in found.flat] == [True] + [False] * 5
    assert ["early_position" in e.flags for e in found.flat] == [False] + [True] * 5
    alone = resid[1, 2].explain(max_new_tokens=2)
    assert (alone.token_ids, alone.position) == (found[1, 2].token_ids, 2)


def test_unknown_tokens_are_none(nla: NLA) -> None:
    where = locate(torch.full((1, 1), -1))
    resid = ResidualTensor.wrap(torch.ones(1, 1, nla.spec.d_model), Origin(None, where, str, nla))
    found = resid[0, 0].explain(max_new_tokens=1)
    assert (found.token, found.token_id, found.position) == (None, None, 0)
