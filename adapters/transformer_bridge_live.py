"""TransformerLens: what a hook at a residual hook point is handed can be explained while it runs.

>>> def look(resid, hook):
...     print(hook.name, resid[0, -1].explain())
>>> model.run_with_hooks(prompt, fwd_hooks=[("blocks.20.hook_resid_post", look)])

Attaching gives the residual hook points classes derived from their own, which hand their hooks the
same memory as a ResidualTensor; the model itself goes on with ordinary tensors. A dictionary of
SAELens that is spliced in later is found when the model runs: its `hook_sae_input` is the residual.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from nla_lens.adapters.transformer_bridge_run import Run
from nla_lens.models.passes import OwnHook
from nla_lens.nla import NLA
from nla_lens.stream.hook_point import residual_names
from nla_lens.stream.origin import Origin
from nla_lens.stream.residual import ResidualTensor

_SAE_INPUT: Final = re.compile(r"(blocks\.\d+\.hook_\w+)\.(?:.+\.)?hook_sae_input")


class Live:
    """Says of what hook points are passed where it comes from.

    Attributes:
        nla: Who explains.
        active: Whether it is said; False after `detach`.
    """

    def __init__(self, model: Any, nla: NLA) -> None:
        """Changes the residual hook points of a model."""
        self.nla, self.active = nla, True
        self._names = residual_names(model.cfg.n_layers)
        self._thread = _Running()
        self._changed: dict[int, tuple[Any, type]] = {}
        self._change_all(model)

    def undo(self) -> None:
        """Gives the hook points their classes back."""
        self.active = False
        for point, cls in self._changed.values():
            point.__class__ = cls

    def dictionary_inputs(self, model: Any) -> dict[str, str]:
        """Names of the inputs of dictionaries spliced in at residual hook points, and those."""
        if not getattr(model, "acts_to_saes", None):
            return {}
        found = {path: _SAE_INPUT.fullmatch(path) for path, _ in model.named_modules()}
        return {
            path: self._names[match[1]]
            for path, match in found.items()
            if match is not None and match[1] in self._names
        }

    @contextlib.contextmanager
    def caching(self, run: Run) -> Iterator[None]:
        """`run_with_cache`: what it caches is told afterwards, so only others' hooks are told."""
        self._thread.cached = run, {i for i, (p, _) in self._changed.items() if p._forward_hooks}
        try:
            with run.watching():
                yield
        finally:
            self._thread.cached = None

    @contextlib.contextmanager
    def running(self, model: Any, said: Mapping[str, Any]) -> Iterator[None]:
        """One forward call.

        Args:
            model: The model.
            said: The arguments of `forward` by name.
        """
        here = self._thread
        (cached, here.cached), outer = (here.cached, None), here.run
        try:
            if self.active and hasattr(model, "acts_to_saes"):
                # Splicing in and taking out puts other hook points there.
                self._change_all(model)
            if cached is not None:
                here.run = cached
                yield
            elif self.active and any(point._forward_hooks for point, _ in self._changed.values()):
                run = Run(model, said)
                here.run = run, None
                with run.watching():
                    yield
            else:
                here.run = None
                yield
        finally:
            here.run = outer

    def told(self, point: Any, value: Any, hook_name: str) -> ResidualTensor | None:
        """The same tensor, knowing where it comes from; None where that is nobody's business."""
        if self._thread.run is None or not self.active or type(value) is not Tensor:
            return None
        run, asked = self._thread.run
        if asked is not None and id(point) not in asked:
            return None
        if all(isinstance(hook, OwnHook) for hook in list(point._forward_hooks.values())):
            return None
        where_BT3 = run.where_BT3
        if where_BT3 is None or where_BT3.shape[:-1] != value.shape[:-1]:
            return None
        return ResidualTensor.wrap(value, Origin(hook_name, where_BT3, run.to_token, self.nla))

    def _change_all(self, model: Any) -> None:
        points = model.hook_dict
        for name, hook_name in self._names.items():
            if name in points:
                self._change(points[name], hook_name)
        for path, hook_name in self.dictionary_inputs(model).items():
            self._change(model.get_submodule(path), hook_name)

    def _change(self, point: Any, hook_name: str) -> None:
        if id(point) in self._changed or not isinstance(point, nn.Module):
            return
        cls = type(point)
        namespace = {
            **{"nla_base": cls, "nla_live": self, "nla_hook_name": hook_name},
            "__module__": cls.__module__,
        }
        self._changed[id(point)] = point, cls
        point.__class__ = type(cls.__name__, (_ProbedPoint, cls), namespace)


class _Running(threading.local):
    """What a thread is in: a run and the hook points that are told in it (None: all)."""

    run: tuple[Run, set[int] | None] | None = None
    cached: tuple[Run, set[int] | None] | None = None


class _ProbedPoint(nn.Module):
    """A hook point that tells its hooks where a residual comes from; its copies do not."""

    nla_base: type
    nla_live: Live
    nla_hook_name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        told = None
        if args and not torch.compiler.is_compiling():
            told = self.nla_live.told(self, args[0], self.nla_hook_name)
        if told is None:
            return super().__call__(*args, **kwargs)
        result = super().__call__(told, *args[1:], **kwargs)
        if result is told and not told.requires_grad:
            return args[0]
        # With a gradient the model goes on from what the hook saw, so that it is in the graph.
        return result.as_ordinary() if isinstance(result, ResidualTensor) else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (self.nla_base,), self.__getstate__()
