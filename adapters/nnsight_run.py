"""Rows, positions and tokens of what one run of an nnsight model reads.

Positions count from each row's first real token, whatever the padding, and go on through the steps
of a generation; a row is counted within the invoke that reads it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nla_lens.nla import NLA
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.origin import Origin, where_of_pass
from nla_lens.stream.residual import ResidualTensor


class _Run(threading.local):
    """One thread's run.

    Attributes:
        where_BT3: Rows, positions and tokens of the pass that it is in; None: not known.
    """

    where_BT3: Tensor | None = None


class Recorder:
    """Says of block outputs where they come from.

    Attributes:
        active: Whether residuals are to be recorded; False after `detach`.
    """

    def __init__(
        self, layers: Mapping[str, int], nla: NLA, to_token: Callable[[int], str] | None
    ) -> None:
        """Args:
        layers: Blocks by their envoys' paths.
        nla: Who explains.
        to_token: Text of a token id, where there is a tokenizer.
        """
        self.active = True
        self._layers, self._nla, self._to_token = layers, nla, to_token
        self._run = _Run()

    @contextlib.contextmanager
    def watching(self, envoy: Any) -> Iterator[None]:
        """Notes token ids and masks of each forward pass, from before the pass begins."""

        run, me = self._run, threading.get_ident()
        outer = run.where_BT3

        def hook(module: nn.Module, args: Any, kwargs: Any = None) -> None:
            # Not of another thread's pass, which may come while torch has noted the hook and not
            # yet that it takes keywords.
            if threading.get_ident() == me:
                run.where_BT3 = where_of_pass(args, kwargs)

        if not self.active:
            yield
            return
        handle = envoy._module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            run.where_BT3 = outer

    def wrap(self, value: Any, path: str, rows: list[int] | None, *, entering: bool = False) -> Any:
        """A block's output, its residual stream viewed as a ResidualTensor.

        Args:
            value: A tensor `[B, T, d]`, or a tuple or dict that begins with it.
            path: The block's envoy path.
            rows: First row and number of rows of the invoke that reads it; None for all.
            entering: It is the block's input.
        """
        if type(value) is tuple and value:
            return (self.wrap(value[0], path, rows, entering=entering), *value[1:])
        if type(value) is dict and value:
            first = next(iter(value))
            return value | {first: self.wrap(value[first], path, rows, entering=entering)}
        # Nothing else is looked into: under `scan` values are fake tensors.
        if not self.active or path not in self._layers or type(value) is not Tensor:
            return value
        where_BT3 = self._run.where_BT3
        if where_BT3 is not None and rows is not None and len(where_BT3) != len(value):
            start, size = rows
            where_BT3 = where_BT3[start : start + size].clone()
            where_BT3[..., 0] -= start
        if where_BT3 is None or where_BT3.shape[:-1] != value.shape[:-1]:
            return value
        resid = ResidualTensor.wrap(value, self._origin(path, where_BT3, entering))
        if resid.requires_grad:
            # The view is not what the loss was computed from: nnsight then reads the gradient of
            # what it is a view of, as it does for the rows of an invoke.
            resid._nnsight_batch = True  # type: ignore[attr-defined]
        return resid

    def wrap_inputs(self, value: Any, path: str, rows: list[int] | None) -> Any:
        """A block's `(args, kwargs)`, the first of which is the residual stream."""
        args, kwargs = value
        if args:
            return self.wrap(args, path, rows, entering=True), kwargs
        return args, self.wrap(kwargs, path, rows, entering=True)

    def origin(self, path: str, where_BT3: Tensor) -> Origin | None:
        """What is known of a block's output; None for another module."""
        return self._origin(path, where_BT3) if path in self._layers else None

    def _origin(self, path: str, where_BT3: Tensor, entering: bool = False) -> Origin:
        place = ResidPost(self._layers[path] - entering)
        return Origin(place.name, where_BT3, self._to_token, self._nla)
