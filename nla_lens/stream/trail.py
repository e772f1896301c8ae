"""Which positions of a thread's passes belong to which step of a generation.

A pass over a text is step 0: its prompt. A pass that goes on with it by what its cache holds, or
over the same text and one token more, is the next step. So a generation has the same steps with a
key-value cache and without one, where each pass reads everything again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

import torch
from torch import Tensor

from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.stream.origin import PADDING, locate

Wanted: TypeAlias = "int | Sequence[int] | slice | None"
"""Indices, a slice, or None for all."""


@dataclass(frozen=True)
class Pass:
    """One pass, column by column.

    Attributes:
        position_BT: Position in each row's own text, from its first real token; -1 for padding.
        step_BT: The step in which a position was read first: 0 is the prompt.
        from_end_BT: -1 for the last real token of its row and step, -2 for the one before, ...
        step: The step that this pass is.
    """

    position_BT: Tensor
    step_BT: Tensor
    from_end_BT: Tensor
    step: int

    @property
    def real_BT(self) -> Tensor:
        """What is no padding."""
        return self.position_BT != PADDING


class Trail:
    """The passes of one thread through one model, one after another."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._n_rows = 0
        self._ids_BT: Tensor | None = None

    def step(self, where_BT3: Tensor, n_past: int) -> Pass:
        """Takes note of a pass.

        Args:
            where_BT3: Rows, positions and tokens of its columns.
            n_past: How many columns its cache holds.
        """
        ids_BT = where_BT3[..., 2]
        n_rows, length = ids_BT.shape
        goes_on = bool(self._ends) and n_rows == self._n_rows and self._goes_on(ids_BT, n_past)
        self._ends = [*(self._ends if goes_on else []), n_past + length]
        self._ids_BT = self._whole(ids_BT, n_past) if goes_on or not n_past else None
        self._n_rows = n_rows
        return _seen(where_BT3, n_past, self._ends)

    def _goes_on(self, ids_BT: Tensor, n_past: int) -> bool:
        if n_past:
            return n_past == self._ends[-1]
        before_BT = self._ids_BT
        return (
            before_BT is not None
            and ids_BT.shape[1] == before_BT.shape[1] + 1
            and torch.equal(ids_BT[:, :-1], before_BT)
        )

    def _whole(self, ids_BT: Tensor, n_past: int) -> Tensor | None:
        """The text so far; None where not all of it is known."""
        if bool((ids_BT < 0).any()):
            return None
        if not n_past:
            return ids_BT
        return None if self._ids_BT is None else torch.cat([self._ids_BT, ids_BT], dim=1)


def _seen(where_BT3: Tensor, n_past: int, ends: Sequence[int]) -> Pass:
    position_BT = where_BT3[..., 1]
    n_rows, length = position_BT.shape
    device = position_BT.device
    ends_S = torch.tensor(ends, device=device)
    columns_T = torch.arange(n_past, n_past + length, device=device)
    step_T = torch.bucketize(columns_T, ends_S, right=True)
    left_BT = (position_BT != PADDING).long().flip(-1).cumsum(-1).flip(-1)
    left_BU = torch.nn.functional.pad(left_BT, (0, 1))
    from_end_BT = left_BU[:, ends_S[step_T] - n_past] - left_BT
    return Pass(position_BT, step_T.expand(n_rows, -1), from_end_BT, len(ends) - 1)


def columns_alone(shape: Sequence[int], device: torch.device) -> Pass:
    """A pass of which nothing is known but its shape `[B, T]`: its columns are its positions."""
    unknown_BT = torch.full(tuple(shape), -1, device=device)
    return Trail().step(locate(unknown_BT), 0)


def chosen(wanted: Wanted, place_BT: Tensor, from_end_BT: Tensor | None = None) -> Tensor:
    """`[B, T]`: what of `place_BT` is wanted; negative indices are looked up in `from_end_BT`."""
    if wanted is None:
        return torch.ones_like(place_BT, dtype=torch.bool)
    if isinstance(wanted, slice):
        return _in_slice(wanted, place_BT, from_end_BT)
    here_BT = torch.zeros_like(place_BT, dtype=torch.bool)
    for index in indices(wanted):
        here_BT |= (place_BT if index >= 0 or from_end_BT is None else from_end_BT) == index
    return here_BT


def indices(wanted: int | Sequence[int]) -> Sequence[int]:
    """One index, or several, as several."""
    return [wanted] if isinstance(wanted, Integral) else list(wanted)  # type: ignore[arg-type, list-item]


def _in_slice(wanted: slice, place_BT: Tensor, from_end_BT: Tensor | None) -> Tensor:
    here_BT = torch.ones_like(place_BT, dtype=torch.bool)
    start, stop = wanted.start, wanted.stop
    for bound, is_start in ((start, True), (stop, False)):
        if bound is not None:
            at_BT = place_BT if bound >= 0 or from_end_BT is None else from_end_BT
            here_BT &= at_BT >= bound if is_start else at_BT < bound
    if (wanted.step or 1) > 1:
        here_BT &= (place_BT - (start or 0)) % wanted.step == 0
    return here_BT


def check_wanted(name: str, wanted: Wanted, *, from_end: bool) -> None:
    """Refuses what no position or step can be.

    Raises:
        NLAError: Names the value.
    """
    listed: Sequence[object]
    if wanted is None:
        return
    if isinstance(wanted, slice):
        listed = [bound for bound in (wanted.start, wanted.stop) if bound is not None]
        stride = 1 if wanted.step is None else wanted.step
        strides = is_int(stride) and (stride == 1 or (stride > 1 and (wanted.start or 0) >= 0))
    else:
        strides = True
        try:
            listed = indices(wanted)
        except TypeError:
            listed = [wanted]
        if not listed:
            raise NLAError(f"{name}={wanted!r} is empty: nothing would be changed")
    if not strides or not all(is_int(index) for index in listed):
        raise NLAError(
            f"{name}={wanted!r:.80} is no index, list of indices, slice or None (for all)"
        )
    if not from_end and any(index < 0 for index in listed):  # type: ignore[operator]
        raise NLAError(f"{name}={wanted!r:.80}: steps count from 0, the prompt")
