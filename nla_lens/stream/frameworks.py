"""Finds the adapter for a model of another framework, and attaches probes through it.

Adapters are entry points of the group `nla_lens.adapters`, named after the package the model's
class comes from, so anyone can add one. Only the adapter of a framework in use is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final

from torch import nn

from nla_lens.errors import NLAError
from nla_lens.models.turns import turn
from nla_lens.models.wrappers import is_transformers
from nla_lens.plugins import load_plugin
from nla_lens.stream.explainer import Explainer, check_nla

GROUP: Final = "nla_lens.adapters"


class Probe:
    """An NLA attached to a model; also a context manager that detaches at its end.

    Threads may share it: what one records goes on until its own `with` is over, even where another
    detaches meanwhile.

    Attributes:
        model: The model.
        nla: The NLA.
    """

    def __init__(self, model: Any, nla: Explainer, undo: Callable[[], None]) -> None:
        """Args:
        model: The model.
        nla: The NLA.
        undo: Takes everything back that attaching changed.
        """
        self.model, self.nla = model, nla
        self._undo: Callable[[], None] | None = undo
        self._inside: list[int] = []

    def __reduce__(self) -> Any:
        """Raises an NLAError: what it changed is in this process."""
        raise NLAError(
            "a probe belongs to a model in this process and cannot be pickled or copied; send the "
            "NLA, and attach it where it is used"
        )

    @property
    def attached(self) -> bool:
        """Whether residuals are still being recorded."""
        return self._undo is not None

    def detach(self) -> None:
        """Leaves the model as it was; a second call does nothing.

        While other threads are in a `with` of this probe, the last of them to leave does it.
        """
        me = threading.get_ident()
        with turn(Probe):
            self._inside = [other for other in self._inside if other != me]
            self._take_back()

    def __enter__(self) -> Probe:
        with turn(Probe):
            self._inside.append(threading.get_ident())
        return self

    def __exit__(self, *exc: object) -> None:
        me = threading.get_ident()
        with turn(Probe):
            if self._inside:
                # Some frameworks enter in one thread and leave in another.
                self._inside.remove(me if me in self._inside else self._inside[-1])
            self._take_back()

    def _take_back(self) -> None:
        if not self._inside and self._undo is not None:
            undo, self._undo = self._undo, None
            undo()

    def __repr__(self) -> str:
        state = "attached to" if self.attached else "detached from"
        return f"Probe({state} {type(self.model).__name__}, {self.nla!r})"


def attach(model: Any, nla: Explainer) -> Probe:
    """Makes the residuals a model caches explainable by an NLA.

    Values stay bit-identical; what is recorded keeps its `.explain()` after `detach`.

    Args:
        model: A TransformerBridge, HookedTransformer, nnsight or transformers model; a
            transformers model may be wrapped (PEFT, DataParallel, torch.compile, a module of your
            own).
        nla: The NLA, for this model's residual stream.

    Returns:
        The probe, to be detached or used in a `with` block.

    Raises:
        NLAError: No adapter for such a model, another width or too few blocks, weights processed
            in a way that changes the residual stream, or a probe that is there already.
    """
    check_nla(nla)
    adapter = find_adapter(model)
    if adapter is None:
        raise NLAError(
            f"no adapter for {type(model).__module__}.{type(model).__qualname__}; a probe can be "
            f"attached to models of {sorted(e.name for e in entry_points(group=GROUP))}. Vectors "
            "from anywhere can be given to nla.explain"
        )
    # What two threads would find attachable at once, one of them does not.
    with turn(Probe):
        probe: Probe = adapter.attach(model, nla)
    return probe


def find_adapter(model: Any) -> Any | None:
    """The adapter module for a model's framework, None if there is none.

    Raises:
        NLAError: There is one that cannot be imported.
    """
    named = {entry.name: entry for entry in entry_points(group=GROUP)}
    for base in type(model).__mro__:
        package = base.__module__.split(".")[0]
        if package in named:
            return load_plugin(named[package])
    # A wrapper of torch's, or of the user's own, around a transformers model.
    inside = model.modules() if isinstance(model, nn.Module) else ()
    return adapter_of("transformers") if any(map(is_transformers, inside)) else None


def adapter_of(framework: str) -> Any:
    """The adapter module for a framework, by its package's name.

    Raises:
        NLAError: No adapter of that name is installed, or it cannot be imported.
    """
    for entry in entry_points(group=GROUP, name=framework):
        return load_plugin(entry)
    raise NLAError(f"no adapter for {framework} is installed; pip install 'nla-lens[{framework}]'")
