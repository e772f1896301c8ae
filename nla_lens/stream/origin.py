"""What is known of residual vectors: place, row, position, token, and who can explain them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from nla_lens.models.cache_keyword import STATES, cache_among
from nla_lens.stream.explainer import Explainer

PADDING: Final = -1
"""Position of a padding token."""
UNKNOWN: Final = -2
"""Position of a vector where it is not known."""


@dataclass(frozen=True)
class Recording:
    """What all vectors of one recorded tensor share.

    Attributes:
        hook_name: `blocks.K.hook_resid_post` and the like; None where it is not known.
        to_token: Text of a token id; None where there is no tokenizer.
        nla: Who explains; None until a probe is attached.
    """

    hook_name: str | None = None
    to_token: Callable[[int], str | None] | None = None
    nla: Explainer | None = None


@dataclass(frozen=True)
class Origin:
    """What is known of every vector of a residual tensor.

    Attributes:
        hook_name: `blocks.K.hook_resid_post` and the like; None also where vectors of several
            places were joined, see `used`.
        where_LX3: For each vector its row, its position in the row's own text (`PADDING` for
            padding, `UNKNOWN`) and its token id (-1 where unknown); int64 `[*leading, 3]`, left on
            the device it was worked out on, since fetching it would make the device wait.
        to_token: Text of a token id.
        nla: Who explains; None until a probe is attached.
        recordings: Where vectors of several were joined: all of them.
        which_LX1: Then each vector's index in `recordings`, int64 `[*leading, 1]`.
    """

    hook_name: str | None
    where_LX3: torch.Tensor
    to_token: Callable[[int], str | None] | None = None
    nla: Explainer | None = None
    recordings: tuple[Recording, ...] = ()
    which_LX1: torch.Tensor | None = None

    @classmethod
    def unknown(cls, shape: Sequence[int]) -> Origin:
        """Of vectors of which nothing is known."""
        where_LX3 = torch.tensor([0, UNKNOWN, -1], device="cpu").expand(*shape, 3)
        return cls(None, where_LX3)

    @property
    def leading(self) -> torch.Size:
        """The leading axes of the tensor it is known of."""
        return self.where_LX3.shape[:-1]

    @property
    def table_LXC(self) -> torch.Tensor:
        """All that differs from vector to vector, int64: 3 columns, or 4 after joining."""
        if self.which_LX1 is None:
            return self.where_LX3
        return torch.cat([self.where_LX3, self.which_LX1], dim=-1)

    def moved(self, table_LXC: torch.Tensor) -> Origin:
        """The same for vectors that were picked or moved about as `table_LXC` was."""
        if self.which_LX1 is None:
            return replace(self, where_LX3=table_LXC)
        return replace(self, where_LX3=table_LXC[..., :3], which_LX1=table_LXC[..., 3:])

    def at(self, index: Any) -> Origin:
        """The same for a slice of the leading axes."""
        table_LXC = self.table_LXC
        return self.moved(table_LXC[on_device(index, table_LXC)])

    def flat(self) -> Origin:
        """The same in row-major order, `[n, 3]` on the CPU."""
        table_LXC = self.table_LXC
        return self.moved(table_LXC.reshape(-1, table_LXC.shape[-1]).cpu())

    def recording(self, *index: int) -> Recording:
        """That of one vector."""
        if self.which_LX1 is None:
            return Recording(self.hook_name, self.to_token, self.nla)
        return self.recordings[int(self.which_LX1[index])]

    def used(self) -> list[Recording]:
        """Those of all vectors, each once."""
        if self.which_LX1 is None:
            return [self.recording()]
        return [self.recordings[i] for i in self.which_LX1.unique().tolist()]

    @classmethod
    def joined(cls, origins: Sequence[Origin], join: Callable[..., torch.Tensor]) -> Origin:
        """Of vectors of several tensors.

        Args:
            origins: What is known of each tensor.
            join: Does to tables what was done to the tensors: `torch.cat` with its axis, say.
        """
        first = origins[0]
        shared = [(o.hook_name, o.to_token, o.nla, id(o.recordings)) for o in origins]
        here = first.where_LX3.device
        if shared.count(shared[0]) == len(shared):
            return first.moved(join([o.table_LXC.to(here) for o in origins]))
        recordings: tuple[Recording, ...] = ()
        tables = []
        for o in origins:
            which_LX1 = (
                torch.zeros_like(o.where_LX3[..., :1]) if o.which_LX1 is None else o.which_LX1
            )
            table_LX4 = torch.cat([o.where_LX3, which_LX1 + len(recordings)], dim=-1)
            tables.append(table_LX4.to(here))
            recordings += o.recordings or (o.recording(),)
        table_LX4 = join(tables)
        names = {recording.hook_name for recording in recordings}
        return cls(
            names.pop() if len(names) == 1 else None,
            table_LX4[..., :3],
            recordings=recordings,
            which_LX1=table_LX4[..., 3:],
        )


def on_device(index: Any, tensor: torch.Tensor) -> tuple[Any, ...]:
    """An index whose tensors are where `tensor` is."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(p.to(tensor.device) if isinstance(p, torch.Tensor) else p for p in parts)


def locate(
    token_ids_BT: torch.Tensor, attention_mask_BS: torch.Tensor | None = None
) -> torch.Tensor:
    """`where_LX3` of token ids `[B, T]`: positions count from each row's first real token.

    Args:
        token_ids_BT: Ids; -1 where unknown.
        attention_mask_BS: Which tokens are real; S is larger than T if it begins earlier, with what
            is in a key-value cache. None: all of them.
    """
    ids = token_ids_BT.detach().long()
    n_rows, n_tokens = ids.shape
    if attention_mask_BS is None:
        positions = torch.arange(n_tokens, device=ids.device).expand_as(ids)
    else:
        mask = attention_mask_BS.to(ids)
        positions = mask.cumsum(-1).sub(1).masked_fill(mask == 0, PADDING)[:, -n_tokens:]
    rows = torch.arange(n_rows, device=ids.device)[:, None].expand_as(ids)
    return torch.stack([rows, positions, ids], dim=-1)


def where_of_pass(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """`where_LX3` `[B, T, 3]` of one forward pass of a transformers model, from its arguments.

    Positions are `UNKNOWN` where a mask is given of which padding cannot be read (of four axes, or
    one for each kind of attention) and no positions beside it. None where nothing is known.
    """
    given = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(given, torch.Tensor) and given.ndim == 2 and not given.is_floating_point():
        ids_BT = given
    else:
        embeds_BTD = kwargs.get("inputs_embeds")
        if not isinstance(embeds_BTD, torch.Tensor) or embeds_BTD.ndim != 3:
            return None
        ids_BT = torch.full(embeds_BTD.shape[:2], -1, device=embeds_BTD.device)
    mask_BS = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    n_past = _n_past(args, kwargs)
    if isinstance(mask_BS, torch.Tensor) and mask_BS.ndim == 2:
        return locate(ids_BT, _seen_by_pass(mask_BS, n_past, ids_BT.shape[1]))
    positions_BT = kwargs.get("position_ids")
    if isinstance(positions_BT, torch.Tensor) and positions_BT.ndim == 2:
        where_BT3 = locate(ids_BT)
        where_BT3[..., 1] = _without_padding(positions_BT.to(ids_BT.device))
        return where_BT3
    if mask_BS is None:
        return locate(ids_BT, ids_BT.new_ones(len(ids_BT), (n_past or 0) + ids_BT.shape[1]))
    where_BT3 = locate(ids_BT)
    where_BT3[..., 1] = UNKNOWN
    return where_BT3


def _seen_by_pass(mask_BS: torch.Tensor, n_past: int | None, length: int) -> torch.Tensor:
    """The mask up to a pass's last token: one for a cache of fixed size goes on behind it."""
    return mask_BS if n_past is None else mask_BS[:, : n_past + length]


def _n_past(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many columns a pass's cache holds; None where that is not known."""
    past = cache_among(kwargs)
    if past is None:
        return None if len(args) > 3 or kwargs.get(STATES) is not None else 0
    length = getattr(past, "get_seq_length", None)
    return None if length is None else int(length())


def _without_padding(positions_BT: torch.Tensor) -> torch.Tensor:
    """Positions as `generate` numbers them, those of padding on the left found.

    It gives all of a row's padding one number, 0 or 1, and counts from the first real token.
    """
    goes_on_BT = positions_BT.diff(dim=-1) == 1
    goes_on_BT = torch.nn.functional.pad(goes_on_BT, (0, 1), value=True)
    return positions_BT.masked_fill(goes_on_BT.long().cumsum(-1) == 0, PADDING)
