"""ResidualTensor: what slicing keeps, and that everything else sees an ordinary tensor."""

import copy
import io
import pickle
import warnings
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
from nla_lens.stream.origin import UNKNOWN
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


# What keeps each vector as it is

LEFT: Tensor = torch.tensor([[[4], [0]], [[1], [1]]])

KEEPING: dict[str, Callable[[Tensor], Any]] = {
    "to": lambda x: x.to(torch.bfloat16),
    "to, everything said": lambda x: x.to(device="cpu", dtype=torch.float64, copy=True),
    "to what it is": lambda x: x.to("cpu"),
    "to as another": lambda x: x.to(torch.zeros(1, dtype=torch.float16)),
    "cpu": lambda x: x.cpu(),
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "type": lambda x: x.type(torch.float64),
    "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    "clone": lambda x: x.clone(),
    "torch.clone": lambda x: torch.clone(input=x),
    "contiguous": lambda x: x[:, ::2].contiguous(),
    "memory format": lambda x: x[None].contiguous(memory_format=torch.channels_last),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "requires_grad_": lambda x: x.requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(x),
    "as_tensor": lambda x: torch.as_tensor(x),
    "select": lambda x: x.select(1, -1),
    "torch.select": lambda x: torch.select(x, -2, 3),
    "index_select": lambda x: x.index_select(1, torch.tensor([4, 0, 0])),
    "index_select, named": lambda x: torch.index_select(x, dim=-2, index=torch.tensor([3])),
    "take_along_dim": lambda x: x.take_along_dim(LEFT, 1),
    "take_along_dim, named": lambda x: torch.take_along_dim(x, LEFT, dim=-2),
    "gather": lambda x: x.gather(1, LEFT.expand(-1, -1, 4)),
    "gather, named": lambda x: torch.gather(input=x, dim=1, index=LEFT.expand(-1, -1, 4)),
    "squeeze": lambda x: x[:, 1:2].squeeze(),
    "squeeze of an axis": lambda x: x[:1].squeeze(0),
    "squeeze of axes": lambda x: x[:1, :1].squeeze((0, 1)),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "unsqueeze before d_model": lambda x: torch.unsqueeze(x, -2),
    "view": lambda x: x.view(-1, 4),
    "view of a tuple": lambda x: x.view((5, 2, 4)),
    "view as": lambda x: x.view_as(torch.zeros(10, 4)),
    "reshape": lambda x: x.reshape(10, -1),
    "reshape of moved axes": lambda x: x.transpose(0, 1).reshape(10, 4),
    "torch.reshape": lambda x: torch.reshape(x, (1, 10, 4)),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten, named": lambda x: torch.flatten(x, end_dim=-2),
    "flatten of a vector": lambda x: x[0, 1].flatten(),
    "unflatten": lambda x: x.flatten(0, 1).unflatten(0, (5, 2)),
    "atleast_3d": lambda x: torch.atleast_2d(x[0, 0]),
    "transpose": lambda x: x.transpose(0, 1),
    "swapaxes": lambda x: x.swapaxes(-2, -3),
    "T": lambda x: x[0, :, None].transpose(0, 1),
    "mT of leading axes": lambda x: x.permute(1, 0, 2),
    "permute": lambda x: torch.permute(x, dims=(1, 0, -1)),
    "movedim": lambda x: x.movedim(0, 1),
    "moveaxis": lambda x: torch.moveaxis(x[None], (0, 1), (1, 0)),
    "unbind": lambda x: x.unbind(),
    "unbind of positions": lambda x: torch.unbind(x, dim=1),
    "split": lambda x: x.split(2, 1),
    "split in sizes": lambda x: torch.split(x, [1, 4], dim=-2),
    "chunk": lambda x: x.chunk(2, dim=1),
    "tensor_split": lambda x: torch.tensor_split(x, 3, dim=1),
    "tensor_split at indices": lambda x: x.tensor_split(torch.tensor([1, 3]), dim=1),
    "hsplit": lambda x: x.hsplit(5),
    "vsplit": lambda x: torch.vsplit(x, 2),
    "narrow": lambda x: x.narrow(1, 1, 3),
    "flip": lambda x: x.flip(1),
    "flip of both": lambda x: x.flip((0, 1)),
    "fliplr": lambda x: torch.fliplr(x),
    "roll": lambda x: x.roll(2, 1),
    "roll of both": lambda x: torch.roll(x, (1, 2), dims=(0, -2)),
    "rot90": lambda x: torch.rot90(x),
    "expand": lambda x: x[:, :1].expand(2, 3, -1),
    "expand in front": lambda x: x.expand(3, 2, 5, 4),
    "expand_as": lambda x: x[0, 0].expand_as(torch.zeros(2, 4)),
    "broadcast_to": lambda x: torch.broadcast_to(x[0, 0], (2, 4)),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "repeat in front": lambda x: x.repeat((2, 1, 1, 1)),
    "tile": lambda x: x.tile((3, 1, 1)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "repeat_interleave by row": lambda x: torch.repeat_interleave(x, torch.tensor([1, 3]), dim=0),
    "cat": lambda x: torch.cat([x, x.flip(0)], dim=1),
    "cat to nothing": lambda x: torch.cat([torch.empty(0), x[0]]),
    "concat": lambda x: torch.concat((x[0], x[1]), axis=0),
    "stack": lambda x: torch.stack(list(x[0])),
    "stack in the middle": lambda x: torch.stack(tensors=[x[0], x[1]], dim=-2),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x[0, 0], x[1, 2]]),
    "einops": lambda x: einops.rearrange(x, "b t d -> t b d"),
    "einops joining": lambda x: einops.rearrange(x, "b t d -> (b t) d"),
    "einops splitting": lambda x: einops.rearrange(x[:, :4], "b (t u) d -> u b t d", u=2),
    "einops of a list": lambda x: einops.rearrange(list(x), "b t d -> t b d"),
    "einops repeat": lambda x: einops.repeat(x, "b t d -> b t k d", k=3),
    "collate": lambda x: torch.utils.data.default_collate([x[0], x[1]]),
    "a loader": lambda x: next(iter(torch.utils.data.DataLoader(x.flatten(0, 1), batch_size=3))),
    "identity": lambda x: torch.nn.Identity()(x),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a cache": lambda x: copy.deepcopy({"resid": x})["resid"],
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("move", KEEPING.values(), ids=KEEPING)
def test_what_keeps_vectors_keeps_what_is_known(move: Callable[[Tensor], Any], mode: Any) -> None:
    with mode():
        resid, plain = move(make()), move(make_plain())
    if isinstance(plain, Tensor):
        resid, plain = [resid], [plain]
    assert len(resid) == len(plain)
    for moved, wanted in zip(resid, plain, strict=True):
        assert (moved.dtype, moved.stride()) == (wanted.dtype, wanted.stride())
        assert moved.requires_grad == wanted.requires_grad and moved.is_leaf == wanted.is_leaf
        assert moved.equal(wanted)
        assert_knows_itself(moved)


SIDE = 4
AXES = (0, 1, 2, -1, -2, -3)
ALL_ALIKE: list[Callable[[Tensor], Any]] = [
    *(lambda x, a=a: x.select(a, 1) for a in AXES),
    *(lambda x, a=a: x.flip(a) for a in AXES),
    *(lambda x, a=a: x.roll(3, a) for a in AXES),
    *(lambda x, a=a, b=b: x.transpose(a, b) for a in AXES for b in AXES),
    *(lambda x, a=a, b=b: x.movedim(a, b) for a in AXES for b in AXES),
    *(lambda x, a=a: x.unsqueeze(a).squeeze(a) for a in AXES),
    *(lambda x, a=a: x.unbind(a) for a in AXES),
    *(lambda x, a=a: x.index_select(a, torch.tensor([3, 2, 1, 0])) for a in AXES),
    *(lambda x, a=a: x.gather(a, torch.tensor([3, 2, 1, 0]).expand(4, 4, 4)) for a in AXES),
    *(lambda x, a=a: x.gather(a, torch.arange(4)[:, None].expand(4, 4, 4)) for a in AXES),
    *(lambda x, a=a: x.take_along_dim(torch.tensor([3, 2, 1, 0]).view(1, 1, 4), a) for a in AXES),
    *(lambda x, a=a: x.repeat_interleave(torch.tensor([2, 0, 1, 1]), a) for a in AXES),
    *(lambda x, a=a, k=k: torch.rot90(x, k, (a, (a + 1) % 3)) for a in range(3) for k in range(4)),
    *(lambda x, a=a: torch.cat([x, x], a) for a in AXES),
    *(lambda x, a=a: torch.cat([x[:1], x[1:]], a) for a in (0, -3)),
    *(lambda x, a=a: torch.stack(list(x), a) for a in AXES),
    *(lambda x, f=f: f([x[0], x[1]]) for f in (torch.hstack, torch.vstack, torch.dstack)),
    *(lambda x, f=f: f(list(x[0])) for f in (torch.hstack, torch.vstack, torch.column_stack)),
    *(lambda x, f=f: f(x[0]) for f in (torch.fliplr, torch.flipud, torch.t)),
    *(lambda x, f=f: f(x, 4) for f in (torch.hsplit, torch.vsplit, torch.dsplit)),
    lambda x: x[0].T,
    lambda x: x[0].mT,
    lambda x: x.diagonal(),
    lambda x: x.unfold(0, 4, 1),
    lambda x: x.as_strided((4, 4), (1, 4)),
]


@pytest.mark.parametrize("joined", [False, True])
def test_nothing_is_confused_where_all_axes_are_as_long_as_d_model(joined: bool) -> None:
    """And, where tensors of two hooks were joined, as what is known of a vector."""
    ids_BT = 7 + torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    plain = torch.cat([locate(ids_BT).float(), torch.full((SIDE, SIDE, 1), 0.5)], dim=-1)
    resid: Tensor = ResidualTensor.wrap(plain, Origin("a", locate(ids_BT)))
    if joined:
        resid = torch.cat([resid[:2], ResidualTensor.wrap(plain, Origin("b", locate(ids_BT)))[2:]])
        plain[2:, :, 3] = 0.25
    for move in ALL_ALIKE:
        try:
            wanted = move(plain)
        except (IndexError, RuntimeError):
            continue
        found = move(resid)
        pairs = [(found, wanted)] if isinstance(wanted, Tensor) else zip(found, wanted, strict=True)
        for moved, same in pairs:
            if isinstance(moved, ResidualTensor):
                assert moved.origin.where_LX3.float().equal(same[..., :3])
                flat, values = moved.origin.flat(), same.reshape(-1, SIDE)
                names = [flat.recording(i).hook_name for i in range(len(values))]
                if joined:
                    assert names == ["a" if value == 0.5 else "b" for value in values[:, 3]]


def test_joined_vectors_keep_their_own_hooks_tokens_and_nla() -> None:
    nla = Precious()
    parts = [
        ResidualTensor.wrap(
            make_plain(),
            Origin(
                f"blocks.{k}.hook_resid_post",
                locate(IDS_BT, MASK_BT),
                lambda i, k=k: f"{k}:{i}",
                nla,
            ),  # type: ignore[arg-type]
        )
        for k in range(3)
    ]
    stacked = torch.stack(parts)
    assert isinstance(stacked, ResidualTensor) and stacked.hook_name is None
    assert stacked.origin.where_LX3.float().equal(stacked.as_ordinary()[..., :3])
    for k in range(3):
        for one in (stacked[k], stacked.flip(0)[2 - k, 0, -1], stacked.transpose(0, 1)[1, k]):
            assert one.hook_name == f"blocks.{k}.hook_resid_post"
        flat = stacked[k].origin.flat()
        assert flat.recording(1).to_token(11) == f"{k}:11"
    again = torch.cat([stacked[1:].flatten(0, 2), parts[0][0]])
    assert [again[i].hook_name for i in (0, 10, 20)] == [
        f"blocks.{k}.hook_resid_post" for k in (1, 2, 0)
    ]
    again = torch.stack([stacked, stacked.clone()])
    assert again[1, 2, 0].hook_name == "blocks.2.hook_resid_post"
    assert len(again.origin.recordings) == 3
    same_hook = torch.cat([parts[1], parts[1].clone()])
    assert same_hook.origin.recordings == ()
    assert stacked.explain()[0] is stacked


def test_residuals_of_two_nlas_need_one_to_be_named() -> None:
    other = ResidualTensor.wrap(make_plain(), Origin(None, locate(IDS_BT), chr, Precious()))  # type: ignore[arg-type]
    both = torch.stack([make(), other])
    with pytest.raises(NLAError, match=r"probes of 2 NLAs.*\.explain\(nla\)"):
        both.explain()
    chosen = Precious()
    assert both.explain(chosen)[0] is both  # type: ignore[arg-type]
    assert both[1].explain()[0].origin.hook_name is None
    without = ResidualTensor.wrap(make_plain(), Origin("elsewhere", locate(IDS_BT)))
    assert torch.cat([make(), without]).explain(max_new_tokens=1)[1] == {"max_new_tokens": 1}


@pytest.mark.parametrize("move", ["clone", "cpu", "detach", "data", "view"])
def test_moves_are_ordinary_to_autograd(move: str) -> None:
    def of(x: Tensor) -> Tensor:
        grown = (x * 2).requires_grad_()
        kept = ResidualTensor.wrap(grown, make().origin) if isinstance(x, ResidualTensor) else grown
        moved = {
            "clone": lambda: kept.clone(),
            "cpu": lambda: kept.cpu(),
            "detach": lambda: kept.detach().requires_grad_(),
            "data": lambda: kept.data.requires_grad_(),
            "view": lambda: kept.view(10, 4),
        }[move]()
        (moved * torch.arange(4.0)).sum().backward()
        grad = moved.grad if move in ("detach", "data") else grown.grad
        assert grad is not None
        assert_ordinary(grad)
        return grad

    assert of(make()).equal(of(make_plain()))


def test_a_probe_is_trained_on_residuals() -> None:
    def trained(vectors: Tensor) -> Tensor:
        torch.manual_seed(0)
        probe = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD([*probe.parameters()], lr=0.01)
        loader = torch.utils.data.DataLoader(vectors.view(-1, 4), batch_size=4)
        for batch in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(probe(batch), batch[:, 1:2]).backward()
            optimizer.step()
        return probe.weight.detach()

    assert_ordinary(trained(make()))
    assert trained(make()).equal(trained(make_plain()))


def test_a_leaf_is_copied_as_a_leaf() -> None:
    leaf = make().clone().requires_grad_()
    (leaf**2).sum().backward()
    copied = copy.deepcopy([leaf, leaf])
    assert copied[0] is copied[1] and copied[0] is not leaf
    assert_knows_itself(copied[0])
    assert copied[0].is_leaf and copied[0].requires_grad and copied[0].grad.equal(leaf.grad)
    assert copied[0].data_ptr() != leaf.data_ptr()
    with pytest.raises(RuntimeError, match="created explicitly by the user"):
        copy.deepcopy(leaf * 1)
    with pytest.raises(RuntimeError, match="created explicitly by the user"):
        copy.deepcopy(leaf.view(10, 4))


def test_copies_of_views_share_memory_as_they_did() -> None:
    resid = make()
    whole, part = copy.deepcopy((resid, resid[1]))
    whole[1, 2] = 7.0
    assert part[2].tolist() == [7.0] * 4
    shallow = copy.copy(resid)
    assert shallow.data_ptr() == resid.data_ptr()


def test_memory_is_shared_by_views() -> None:
    plain = make_plain()
    resid = make(plain)
    for moved in (resid.view(10, 4), resid.detach(), resid.float(), resid.transpose(0, 1)):
        assert moved.data_ptr() == plain.data_ptr()
    assert resid.float() is resid


def test_vmap_and_grad_see_ordinary_tensors() -> None:
    doubled = torch.func.vmap(lambda v: v.clone().view(2, 2).flatten() * 2)(make().view(10, 4))
    assert_ordinary(doubled)
    captured = torch.func.vmap(lambda v: (v + make()[0, 1].clone()).detach())(make_plain()[0])
    assert captured.equal(make_plain()[0] + make_plain()[0, 1])
    grad = torch.func.grad(lambda v: (v.clone().reshape(-1) ** 2).sum())(make())
    assert grad.equal(2 * make_plain())


def _send(queue: Any) -> None:
    queue.put(make().clone())
    queue.get()


def test_another_process_gets_an_ordinary_tensor() -> None:
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_send, args=(queue,))
    process.start()
    received = queue.get()
    assert_ordinary(received)
    assert received.equal(make_plain())
    queue.put(None)
    process.join(30)
    assert process.exitcode == 0


# Everything else

ORDINARY: dict[str, Callable[[Tensor], Any]] = {
    "sum with a number": lambda x: x + 1,
    "number first": lambda x: 1 - x,
    "sum with itself": lambda x: x + x,
    "matmul": lambda x: x @ x.mT,
    "transpose": lambda x: x.mT,
    "transpose of d_model": lambda x: x.transpose(0, -1),
    "permute of d_model": lambda x: x.permute(2, 0, 1),
    "movedim of d_model": lambda x: torch.movedim(x, -1, 0),
    "flip of d_model": lambda x: x.flip(-1),
    "flip of all": lambda x: x.flip(0, 1, 2),
    "roll of d_model": lambda x: x.roll(1, 2),
    "roll of everything": lambda x: x.roll(1),
    "reshape across d_model": lambda x: x.reshape(4, 10),
    "flatten": lambda x: x.flatten(),
    "unflatten of d_model": lambda x: x.unflatten(-1, (2, 2)),
    "bits": lambda x: x.view(torch.int32),
    "integers": lambda x: x.long(),
    "to integers": lambda x: x.to(torch.int64),
    "unsqueeze behind": lambda x: x.unsqueeze(-1),
    "unbind of d_model": lambda x: x.unbind(-1)[0],
    "split of d_model": lambda x: x.split(2, dim=-1)[0],
    "chunk of d_model": lambda x: torch.chunk(x, 2, -1)[0],
    "narrow of d_model": lambda x: x.narrow(-1, 0, 3),
    "select of d_model": lambda x: x.select(2, 0),
    "index_select of d_model": lambda x: x.index_select(-1, torch.tensor([1, 0, 2, 3])),
    "gather of coordinates": lambda x: x.gather(1, torch.zeros(2, 5, 4, dtype=torch.long)),
    "take_along_dim of coordinates": lambda x: x.take_along_dim(x.long().argsort(1), 1),
    "repeat of d_model": lambda x: x.repeat(1, 1, 2),
    "repeat_interleave of d_model": lambda x: x.repeat_interleave(2, -1),
    "cat along d_model": lambda x: torch.cat([x, x], -1),
    "cat of vectors": lambda x: torch.cat(list(x[0])),
    "stack behind": lambda x: torch.stack([x, x], -1),
    "hstack of vectors": lambda x: torch.hstack([x[0, 0], x[0, 1]]),
    "cat with an ordinary tensor": lambda x: torch.cat([x, torch.zeros(2, 5, 4)]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "where": lambda x: torch.where(x > 0, x, x),
    "einops into d_model": lambda x: einops.rearrange(x, "b t (h k) -> b h t k", h=2),
    "mean": lambda x: x.mean(0),
    "norm": lambda x: x.norm(dim=-1),
    "comparison": lambda x: x == x,
    "out": lambda x: torch.add(x, 1, out=torch.empty(2, 5, 4)),
    "out of cat": lambda x: torch.cat([x, x], out=torch.empty(4, 5, 4)),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "numpy round trip": lambda x: torch.from_numpy(x.numpy()),
    "dlpack": lambda x: torch.from_dlpack(x),
    "einops reduce": lambda x: einops.reduce(x, "b t d -> b d", "max"),
    "einsum": lambda x: einops.einsum(x, x, "b t d, b s d -> b t s"),
    "vmap": lambda x: torch.func.vmap(lambda v: v * 2)(x),
    "jacobian": lambda x: torch.func.jacrev(lambda v: (v**2).sum())(x),
}


@pytest.mark.parametrize("compute", ORDINARY.values(), ids=ORDINARY)
def test_computing_gives_ordinary_tensors(compute: Callable[[Tensor], Any]) -> None:
    result = compute(make())
    assert_ordinary(result)
    assert result.equal(compute(make_plain()))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # Inductor needs a C++ compiler
def test_it_goes_into_compiled_code(backend: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    linear = torch.nn.Linear(4, 2)
    for resid, plain in ((make(), make_plain()), (make()[0], make_plain()[0])):
        found = torch.compile(linear, backend=backend, fullgraph=fullgraph)(resid)
        assert_ordinary(found)
        assert found.equal(linear(plain))
        found.sum().backward()

    def moved(x: Tensor) -> Tensor:
        return (x.clone().view(10, 4) * 2).relu() + x[0, 1] + torch.stack([x, x])[0, 0, 0].float()

    found = torch.compile(moved, backend=backend, fullgraph=fullgraph)(make())
    assert_ordinary(found)
    assert found.equal(moved(make_plain()))


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
    square = make()[0, :4]
    square.t_()
    assert "hook_name=None" in repr(square)


def positions(resid: Tensor) -> Any:
    assert isinstance(resid, ResidualTensor)
    return resid.origin.where_LX3[..., 1].tolist()


ROW = [0, 1, 2, 3, 4]
GONE = [UNKNOWN] * 5


def written(change: Callable[[Any, Any], Any]) -> Any:
    resid, other = make()[1], make()[1]
    change(resid, other)
    return positions(resid)


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda r, o: r.__setitem__(0, o[3]), [3, 1, 2, 3, 4]),
        (lambda r, o: r.__setitem__([0, 1], o[[4, 2]]), [4, 2, 2, 3, 4]),
        (lambda r, o: r.__setitem__(slice(2), o[4]), [4, 4, 2, 3, 4]),
        (lambda r, o: r.__setitem__(0, o[3].as_ordinary()), [UNKNOWN, 1, 2, 3, 4]),
        (lambda r, o: r.__setitem__(-1, 0.0), [0, 1, 2, 3, UNKNOWN]),
        (lambda r, o: r.__setitem__((..., 3), 0.0), ROW),
        (lambda r, o: r.__setitem__(r > 9, 0.0), ROW),
        (lambda r, o: r.copy_(o.flip(0)), ROW[::-1]),
        (lambda r, o: r.copy_(o.as_ordinary().flip(0)), GONE),
        (lambda r, o: r.index_copy_(0, torch.tensor([0]), o[3:4]), GONE),
        (lambda r, o: torch.index_select(o, 0, torch.tensor([4, 3, 2, 1, 0]), out=r), GONE),
        (lambda r, o: setattr(r, "data", o.flip(0)), GONE),
        (lambda r, o: r.as_ordinary().copy_(o.flip(0)), GONE),
        (lambda r, o: r[1:].copy_(o[:4]), GONE),
        (lambda r, o: r.mul_(2).clamp_(-1, 1), ROW),
        (lambda r, o: r[2].add_(1), ROW),
        (lambda r, o: r.__setitem__(2, r[2].__iadd__(1)), ROW),  # r[2] += 1
        (lambda r, o: (r.zero_(), r.add_(o)), GONE),
    ],
)
def test_what_is_known_after_writing(change: Callable[[Any, Any], Any], left: Any) -> None:
    assert written(change) == left
    with torch.inference_mode():
        # Nothing counts there what is written by way of another view.
        assert written(change) in (left, ROW)


def test_who_explains_stays_known_after_writing() -> None:
    resid = make()[1]
    resid[0], resid[1] = make()[1, 3].as_ordinary(), 0
    copied = resid.clone().copy_(make_plain()[1])
    for written in (resid, resid[0], copied):
        assert written.explain()[0] is written
    assert resid[2].hook_name == "blocks.3.hook_resid_post" and resid[0].hook_name is None
    taken = make()[0]
    whole = taken[1:]
    taken[2] = make()[1, 4]
    assert positions(whole) == [UNKNOWN] * 4  # it views what was written to
    assert taken[2].origin.where_LX3.tolist() == [1, 4, 25]


def test_indices_that_reach_to_the_end_of_a_vector() -> None:
    for part in (make()[..., :4], make()[:, :, 0:4], make()[..., 0:9:1]):
        assert_knows_itself(part)
    for part in (make()[..., :3], make()[..., 1:], make()[..., ::2]):
        assert_ordinary(part)


def test_lists_of_lists_index_as_they_do_without_a_probe() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to read them otherwise
        assert make()[[[1, 0]]].equal(make_plain()[[[1, 0]]])


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


# What leaves the process leaves the NLA behind

COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "pickle of a cache": lambda x: pickle.loads(pickle.dumps({"resid": x}))["resid"],
    "pickle of a leaf": lambda x: pickle.loads(pickle.dumps(x.clone().requires_grad_())),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_what_is_pickled_is_ordinary(make_copy: Callable[[Tensor], Tensor]) -> None:
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
