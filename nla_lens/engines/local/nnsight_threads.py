"""nnsight's traces in several threads: each run belongs to the thread that started it.

nnsight keeps what a run is doing in one object for a whole model, its interleaver, and every module
looks there on each call. So two traces of one model at once mix up, and another thread's plain
forward of that model is served to a trace it has nothing to do with (greenlet: "cannot switch to a
different thread"). Here that object answers each thread with its own run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from greenlet import GreenletExit
from nnsight.intervention.interleaver import Interleaver

from nla_lens.errors import NLAError

_OF_THE_MODEL: Final = ("envoys", "fragments", "defer_exceptions")
_OF_A_RUN: Final = tuple(name for name in vars(Interleaver()) if name not in _OF_THE_MODEL)


class _Run(threading.local):
    """What one thread's run is doing, by nnsight's own names.

    Attributes:
        may_end_early: Whether a loop over steps that the run did not make goes without a warning.
    """

    may_end_early = False

    def __init__(self) -> None:
        fresh = vars(Interleaver())
        vars(self).update({name: fresh[name] for name in _OF_A_RUN})


class ThreadsInterleaver(Interleaver):
    """nnsight's interleaver, with a run for each thread."""

    nla_run: _Run
    nla_acts: dict[str, tuple[Callable[[Any], Any], ...]]

    def handle(self, provider: str, value: Any) -> Any:
        """See `Interleaver.handle`; what `on_output` asked for comes before all readers."""
        for act in self.nla_acts.get(provider, ()):
            value = act(value)
        return super().handle(provider, value)

    def check_dangling_mediators(self) -> None:
        """See `Interleaver.check_dangling_mediators`."""
        if self.nla_run.may_end_early:
            for mediator in self.mediators:
                # Not pinned to a step, it waits for what should have come: an error.
                if mediator.alive and mediator.iteration != 0:
                    mediator.worker.throw(GreenletExit)
        super().check_dangling_mediators()


def _by_thread(name: str) -> property:
    return property(
        lambda self: getattr(self.nla_run, name),
        lambda self, value: setattr(self.nla_run, name, value),
    )


for _name in _OF_A_RUN:
    setattr(ThreadsInterleaver, _name, _by_thread(_name))

_guard = threading.Lock()


def let_threads(model: Any) -> None:
    """Lets threads trace one nnsight model at the same time, from now on.

    Args:
        model: An nnsight model. An interleaver of a kind of its own stays as it is, and so does one
            in the middle of a run.
    """
    interleaver = model.interleaver
    with _guard:
        if type(interleaver) is Interleaver and not interleaver.interleaving:
            interleaver.nla_run, interleaver.nla_acts = _Run(), {}
            interleaver.__class__ = ThreadsInterleaver
            for name in _OF_A_RUN:
                vars(interleaver).pop(name, None)


@contextlib.contextmanager
def on_output(model: Any, path: str, act: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, what a module hands over in a trace goes through `act`, in any thread.

    Args:
        model: An nnsight model that `let_threads` was called with.
        path: The path of the module's envoy.
        act: Its output to its output.

    Raises:
        NLAError: It has an interleaver of a kind of its own.
    """
    interleaver, provider = model.interleaver, f"{path}.output"
    if not isinstance(interleaver, ThreadsInterleaver):
        raise NLAError(
            f"this model's interleaver is a {type(interleaver).__name__}: its traces cannot be "
            "changed on the way"
        )
    with _guard:
        acts = interleaver.nla_acts
        acts[provider] = (*acts.get(provider, ()), act)
    try:
        yield
    finally:
        with _guard:
            acts[provider] = tuple(other for other in acts[provider] if other is not act)
            if not acts[provider]:
                del acts[provider]


@contextlib.contextmanager
def ending_early(model: Any) -> Iterator[None]:
    """While it lasts, this thread's loops over steps may ask for more than there are.

    Not `warnings.catch_warnings`: what that changes, it changes for all threads.
    """
    run = getattr(model.interleaver, "nla_run", None)
    if run is None:
        yield
        return
    run.may_end_early = True
    try:
        yield
    finally:
        run.may_end_early = False
