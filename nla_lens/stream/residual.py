"""A residual-stream tensor that knows where it came from.

>>> resid = cache["resid_post", 20]      # ResidualTensor, [batch, pos, d_model]
>>> resid[0, -1].explain()               # knows its row, its position and its token

What keeps each vector as it is keeps what is known of it (`nla_lens.stream.following` has the
list); any other operation gives an ordinary `torch.Tensor` with the same values, and `torch.Tensor`
itself is never patched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from nla_lens.errors import NLAError
from nla_lens.stream.explainer import Explainer, check_nla
from nla_lens.stream.following import origin_of
from nla_lens.stream.origin import PADDING, Origin, locate
from nla_lens.stream.overwriting import after_writing, forgotten, is_in_place, version, writes

__all__ = ["PADDING", "Origin", "ResidualTensor", "locate"]

_MOVE_AXES_IN_PLACE = (
    "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_",
    "transpose_", "unsqueeze_",
)  # fmt: skip


class ResidualTensor(torch.Tensor):
    """A `torch.Tensor` of shape `[..., d_model]` with an `.explain()`.

    Shares its memory with the tensor it was made from; pickling and computing give ordinary
    tensors.
    """

    _origin: Origin
    # What `version` said when that was known: one list for all that `__getitem__` shows of it.
    _version_known: list[int | None]

    @staticmethod
    def wrap(resid: torch.Tensor, origin: Origin) -> ResidualTensor:
        """Views `resid` as a ResidualTensor.

        Args:
            resid: `[*leading, d_model]`.
            origin: What is known of it; `origin.where_LX3` is `[*leading, 3]`.
        """
        if resid.shape[:-1] != origin.leading:
            raise NLAError(
                f"a residual of shape {tuple(resid.shape)} cannot come from positions of shape "
                f"{tuple(origin.leading)}"
            )
        return resid.as_subclass(ResidualTensor).told(origin)

    def told(self, origin: Origin) -> ResidualTensor:
        """This tensor, of which from now on `origin` is known."""
        self._origin, self._version_known = origin, [version(self)]
        return self

    def _written(self, origin: Origin) -> None:
        """Takes note of what is known after it was written to."""
        if origin is self._origin:
            # Still true of whatever views the same memory.
            self._version_known[0] = version(self)
        else:
            self.told(origin)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every operation as on an ordinary tensor; indexing is handled in `__getitem__`."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # What is compiled takes it for an ordinary tensor.
            _let_compiled_code_take_subclasses()
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        written = _known(args[0]) if args and writes(func) else None
        if written is not None:
            # What is written may be a view of the same memory: it is asked what it is before.
            written = after_writing(func, args, kwargs, written, _known, _leading_index)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            origin = origin_of(func, args, kwargs, result, _known)
            if written is not None:
                args[0]._written(written)
        if isinstance(origin, list):
            return type(result)(map(_wrapped, result, origin))
        # Only in-place operations answer what they were given and change it.
        if origin is None and is_in_place(func):
            if func.__name__ in _MOVE_AXES_IN_PLACE and isinstance(result, ResidualTensor):
                result.__dict__.pop("_origin", None)
            return result
        return _wrapped(result, origin)

    def __getitem__(self, index: Any) -> torch.Tensor:
        plain = self.as_ordinary()[index]
        if torch.compiler.is_compiling():
            return plain
        origin = self.known_origin()
        leading = _leading_index(index, self)
        if origin is None or leading is None:
            return plain
        found = origin.at(leading)
        # torch takes some lists for tuples and others for tensors.
        if found.leading != plain.shape[:-1]:
            return plain
        shown = ResidualTensor.wrap(plain, found)
        if plain._is_view():
            shown._version_known = self._version_known
        return shown

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_ordinary().__reduce_ex__(protocol)

    def __copy__(self) -> torch.Tensor:
        return _wrapped(copy.copy(self.as_ordinary()), self.known_origin())

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        if not self.is_leaf:
            # Refused as it is for an ordinary tensor.
            return copy.deepcopy(self.as_ordinary(), memo)
        plain = self.as_ordinary().detach()
        # As `copy` does: while the memo lives, no other object may get this one's id.
        memo.setdefault(id(memo), []).append(plain)
        # The same NLA, which is not part of the tensor.
        copied = _wrapped(copy.deepcopy(plain, memo), self.known_origin())
        if self.grad is not None:
            copied.grad = copy.deepcopy(self.grad, memo)
        return copied.requires_grad_(self.requires_grad)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        origin = self.known_origin()
        hook_name = None if origin is None else self.hook_name
        return f"ResidualTensor({self.as_ordinary()!r}, hook_name={hook_name!r})"

    def as_ordinary(self) -> torch.Tensor:
        """The same memory as a plain `torch.Tensor`."""
        return self.as_subclass(torch.Tensor)

    def known_origin(self) -> Origin | None:
        """Where the vectors came from; None after `t_()` and the like, which move them about.

        Of vectors that were written to by another view of their memory, nobody knows.
        """
        origin: Origin | None = getattr(self, "_origin", None)
        if origin is None or origin.leading != self.shape[:-1]:
            return None
        return origin if version(self) == self._version_known[0] else forgotten(origin)

    @property
    def origin(self) -> Origin:
        """Where the vectors came from."""
        origin = self.known_origin()
        if origin is None:
            raise NLAError("where these vectors came from is not known (any more)")
        return origin

    @property
    def hook_name(self) -> str | None:
        """The hook point, TransformerLens' spelling; None where the vectors are of several."""
        names = {recording.hook_name for recording in self.origin.used()}
        return names.pop() if len(names) == 1 else None

    def explain(self, nla: Explainer | None = None, **options: Any) -> Any:
        """Says in words what each vector holds.

        Args:
            nla: Who explains; None is the NLA whose probe recorded this tensor.
            **options: Those of `NLA.explain`.

        Returns:
            An `Explanation` for a single vector, else `Explanations` of the leading shape.

        Raises:
            NLAError: No probe is attached and no `nla` is given, probes of several NLAs recorded
                it, or a value is not explainable.
        """
        nla = nla or self._own_nla()
        check_nla(nla)
        return nla.explain(self, **options)

    def _own_nla(self) -> Explainer:
        nlas = {id(r.nla): r.nla for r in self.origin.used() if r.nla is not None}
        if not nlas:
            raise NLAError(
                "this residual has no NLA to explain it: attach one before the run "
                "(nla_lens.attach(model, nla)), or say .explain(nla)"
            )
        if len(nlas) > 1:
            raise NLAError(
                f"these residuals were recorded by probes of {len(nlas)} NLAs; say which one is to "
                "explain them: .explain(nla)"
            )
        return next(iter(nlas.values()))


def _known(value: Any) -> Origin | None:
    return value.known_origin() if isinstance(value, ResidualTensor) else None


def _wrapped(result: Any, origin: Origin | None) -> Any:
    """A result with what is known of it; an ordinary one where nothing is."""
    if origin is None:
        # `F.identity` and the like answer what they were given.
        return result.as_ordinary() if isinstance(result, ResidualTensor) else result
    return result if isinstance(result, ResidualTensor) else ResidualTensor.wrap(result, origin)


def _let_compiled_code_take_subclasses() -> None:
    """Switches a check of torch.compile off that fails on any subclass of Tensor.

    Since torch 2.10 the first call of compiled code looks whether custom operators answer their own
    inputs, and refuses what is neither a Tensor nor a Parameter ("Multiple dispatch failed").
    """
    import torch._functorch.config as config

    if hasattr(config, "check_custom_op_aliasing"):
        config.check_custom_op_aliasing = False


# What `torch.compiler.assume_constant_result` does, without loading the compiler: the function is
# called while code that takes a ResidualTensor is being compiled, and leaves no trace in it.
_let_compiled_code_take_subclasses._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _leading_index(index: Any, tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """The part of an index that concerns the leading axes; None if it reaches into d_model."""
    ndim = tensor.ndim
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
        if not (isinstance(last, slice) and last.indices(n := tensor.shape[-1]) == (0, n, 1)):
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
