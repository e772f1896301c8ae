"""A residual-stream tensor that knows where it came from.

>>> resid = cache["resid_post", 20]      # ResidualTensor, [batch, pos, d_model]
>>> resid[0, -1].explain()               # knows its row, its position and its token

Slicing keeps what it knows; any other operation gives an ordinary `torch.Tensor` with the same
values, and `torch.Tensor` itself is never patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nla_lens.errors import NLAError
from nla_lens.stream.explainer import Explainer, check_nla

PADDING = -1
"""Position of a padding token."""


@dataclass(frozen=True)
class Origin:
    """What is known of every vector of a residual tensor.

    Attributes:
        hook_name: `blocks.K.hook_resid_post` and the like.
        where_LX3: For each vector its row, its position in the row's own text (`PADDING` for
            padding) and its token id (-1 where unknown); int64 `[*leading, 3]`, left on the device
            it was worked out on, since fetching it would make the device wait.
        to_token: Text of a token id.
        nla: Who explains; None until a probe is attached.
    """

    hook_name: str | None
    where_LX3: torch.Tensor
    to_token: Callable[[int], str] | None = None
    nla: Explainer | None = None

    def at(self, index: Any) -> Origin:
        """The same for a slice of the leading axes."""
        parts = index if isinstance(index, tuple) else (index,)
        here = self.where_LX3.device
        moved = tuple(p.to(here) if isinstance(p, torch.Tensor) else p for p in parts)
        return Origin(self.hook_name, self.where_LX3[moved], self.to_token, self.nla)


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


class ResidualTensor(torch.Tensor):
    """A `torch.Tensor` of shape `[..., d_model]` with an `.explain()`.

    Shares its memory with the tensor it was made from; pickling, copying and computing give
    ordinary tensors.
    """

    _origin: Origin

    @staticmethod
    def wrap(resid: torch.Tensor, origin: Origin) -> ResidualTensor:
        """Views `resid` as a ResidualTensor.

        Args:
            resid: `[*leading, d_model]`.
            origin: What is known of it; `origin.where_LX3` is `[*leading, 3]`.
        """
        if resid.shape[:-1] != origin.where_LX3.shape[:-1]:
            raise NLAError(
                f"a residual of shape {tuple(resid.shape)} cannot come from positions of shape "
                f"{tuple(origin.where_LX3.shape[:-1])}"
            )
        wrapped = resid.as_subclass(ResidualTensor)
        wrapped._origin = origin
        return wrapped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every operation as on an ordinary tensor; indexing is handled in `__getitem__`."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        # `x.float()` on a float32 tensor answers x itself; only in-place operations may.
        if isinstance(result, ResidualTensor) and not _is_in_place(func):
            return result.as_ordinary()
        return result

    def __getitem__(self, index: Any) -> torch.Tensor:
        plain = self.as_ordinary()[index]
        origin = self._known()
        leading = _leading_index(index, self.ndim)
        if origin is None or leading is None:
            return plain
        return ResidualTensor.wrap(plain, origin.at(leading))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_ordinary().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.as_ordinary().__deepcopy__(memo)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        origin = self._known()
        hook_name = None if origin is None else origin.hook_name
        return f"ResidualTensor({self.as_ordinary()!r}, hook_name={hook_name!r})"

    def as_ordinary(self) -> torch.Tensor:
        """The same memory as a plain `torch.Tensor`."""
        return self.as_subclass(torch.Tensor)

    def _known(self) -> Origin | None:
        """Where the vectors came from; None after `t_()` and the like, which move them about."""
        origin: Origin | None = getattr(self, "_origin", None)
        if origin is None or origin.where_LX3.shape[:-1] != self.shape[:-1]:
            return None
        return origin

    @property
    def origin(self) -> Origin:
        """Where the vectors came from."""
        origin = self._known()
        if origin is None:
            raise NLAError("where these vectors came from is not known (any more)")
        return origin

    @property
    def hook_name(self) -> str | None:
        """The hook point, TransformerLens' spelling."""
        return self.origin.hook_name

    def explain(self, nla: Explainer | None = None, **options: Any) -> Any:
        """Says in words what each vector holds.

        Args:
            nla: Who explains; None is the NLA whose probe recorded this tensor.
            **options: Those of `NLA.explain`.

        Returns:
            An `Explanation` for a single vector, else `Explanations` of the leading shape.

        Raises:
            NLAError: No probe is attached and no `nla` is given, or a value is not explainable.
        """
        nla = nla or self.origin.nla
        if nla is None:
            raise NLAError(
                "this residual has no NLA to explain it: attach one before the run "
                "(nla_lens.attach(model, nla)), or say .explain(nla)"
            )
        check_nla(nla)
        return nla.explain(self, **options)


def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _leading_index(index: Any, ndim: int) -> tuple[Any, ...] | None:
    """The part of an index that concerns the leading axes; None if it reaches into d_model."""
    parts = list(index) if isinstance(index, tuple) else [index]
    try:
        used = sum(_axes_used(part) for part in parts)
    except (TypeError, ValueError, RuntimeError):
        # torch takes sequences as indices that are no arrays.
        return None
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if dots:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (ndim - used)
        used = ndim
    if used > ndim - 1:
        last = parts.pop()
        if not (isinstance(last, slice) and last == slice(None)):
            return None
    return tuple(parts)


def _axes_used(part: Any) -> int:
    """How many axes of a tensor one part of an index is for."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, (int, slice)) and not isinstance(part, bool):
        return 1
    array = torch.as_tensor(part)
    # uint8 is torch's old kind of mask.
    return array.ndim if array.dtype in (torch.bool, torch.uint8) else 1
