"""Our passes through models that other threads, and the user's own code, run at the same time.

What a pass needs on a model (forward hooks, a faster product) stands on modules that all share. So
it acts in the one pass that asked for it: not in another thread's, nor in one that a user's hook
starts in the middle of ours. Nobody else's forward waits for ours, is changed by it, or sees an
exception of it.

Our own passes through one model take turns, in the order in which they asked: models with a state
(rotary tables that grow, weights that are fetched for a moment) are not made for several at once.
A pass is one forward call, so long jobs of several threads go on side by side. A turn may be taken
again inside a turn, as where a user's hook explains what it sees.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from nla_lens.errors import NLAError
from nla_lens.models.anatomy import text_model


class _Here(threading.local):
    """What a thread is doing.

    Attributes:
        current: Its innermost pass of ours.
    """

    current: OwnPass | None = None


_here = _Here()


def current_pass() -> OwnPass | None:
    """The pass of ours that this thread is in, the innermost."""
    return _here.current


class _ReachedError(Exception):
    """Ends a forward pass that need not go on."""


class OwnHook:
    """A forward hook, or forward pre-hook, that acts for one pass alone."""

    def __init__(self, is_due: Callable[[], bool], act: Callable[..., Any]) -> None:
        """Args:
        is_due: Whether what runs just now is that pass.
        act: As torch calls a hook.
        """
        self._is_due, self._act = is_due, act

    def __call__(self, *args: Any) -> Any:
        return self._act(*args) if self._is_due() else None


class _OfAPass(OwnHook):
    """One that is taken back at the end of a pass."""

    def __reduce__(self) -> Any:
        """A copy of a model, made by another thread in the middle of a pass, is in no pass."""
        return OwnHook, (_never, _never)


def _never(*_: Any) -> Any:
    return None


class OwnPass:
    """One forward call of ours, as a context; what is hooked in it is taken back at its end.

    >>> with OwnPass(model) as own_pass:
    ...     own_pass.hook(model.model.layers[1], lambda module, args, output: ...)
    ...     model(input_ids=ids)
    """

    def __init__(self, model: Any) -> None:
        """Args:
        model: What is called in it, a torch module.
        """
        stack = stack_of(model)
        self._turns = _turns_of(stack)
        # Entered again in the middle of a pass, they show that somebody else's has begun.
        self._entered = {model: 0, stack: 0}
        self._n_inside = 0
        self._handles: list[Any] = []
        self._outer: OwnPass | None = None

    def __enter__(self) -> OwnPass:
        try:
            self._turns.take(self)
            self._outer, _here.current = _here.current, self
            for module in self._entered:
                self._count(module)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def acts(self) -> bool:
        """Whether what runs just now is this pass: not another thread, nor a pass inside it."""
        return _here.current is self and not self._n_inside

    def hook(self, module: nn.Module, act: Callable[..., Any]) -> None:
        """Puts a forward hook on a module."""
        self._handles.append(module.register_forward_hook(_OfAPass(self.acts, act)))

    def pre_hook(self, module: nn.Module, act: Callable[..., Any]) -> None:
        """Puts a forward pre-hook on a module."""
        own = _OfAPass(self.acts, act)
        self._handles.append(module.register_forward_pre_hook(own))

    def output_of(
        self, module: nn.Module, call: Callable[[], Any], last: nn.Module | None = None
    ) -> Any:
        """What a module puts out in this pass; what comes after it does not run.

        Args:
            module: The module.
            call: Runs the model.
            last: The last module to run, if another; `module` is part of it.

        Raises:
            NLAError: The module did not run.
        """
        found: list[Any] = []

        def stop(*_: Any) -> None:
            raise _ReachedError

        self.hook(module, lambda _, args, output: found.append(output))
        self.hook(last or module, stop)
        try:
            call()
        except Exception:
            # On its way up the exception may have been replaced by another.
            if not found:
                raise
        if not found:
            raise NLAError(f"the {type(module).__name__} to be read did not run in a pass of ours")
        return found[0]

    def _is_current(self) -> bool:
        return _here.current is self

    def _count(self, module: nn.Module) -> None:
        def step(by: int) -> OwnHook:
            def act(*_: Any) -> None:
                self._entered[module] += by
                self._n_inside = sum(n > 1 for n in self._entered.values())

            return _OfAPass(self._is_current, act)

        self._handles += [
            module.register_forward_pre_hook(step(1), prepend=True),
            module.register_forward_hook(step(-1), always_call=True),
        ]

    def _end(self) -> None:
        try:
            for handle in self._handles:
                handle.remove()
            if self._is_current():
                _here.current = self._outer
        finally:
            self._turns.give_back(self)


def stack_of(model: Any) -> Any:
    """The blocks inside, which are the same in all that wraps a model; else the model itself."""
    inner = getattr(model, "original_model", model)
    try:
        return text_model(inner)
    except NLAError:
        return inner


def has_hooks(model: nn.Module) -> bool:
    """Whether somebody's hooks act on a model.

    Not ours, and not those that transformers or a probe keeps there: they only look.
    """
    return any(
        not isinstance(hook, OwnHook)
        and not getattr(hook, "only_looks", False)
        and not str(getattr(hook, "__module__", "")).startswith("transformers.")
        for module in model.modules()
        # Lists, since other threads may be changing them.
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    )


class Turns:
    """A lock that a thread may take again, and that threads get in the order in which they asked.

    Python's own is not fair: who gives it back and takes it again at once keeps it.

    Threads never wait for one another in a ring, as where hooks of each explain by the other's
    model: the one that would close the ring goes in as a guest. Whoever holds the turn stands still
    meanwhile, just as for a pass inside its own.
    """

    def __init__(self) -> None:
        self._owner: int | None = None
        self._holders: list[object] = []
        self._guests: list[object] = []
        self._queue: deque[tuple[int, object, threading.Lock]] = deque()

    def take(self, holder: object) -> None:
        """Waits for its turn; `give_back` must follow even where this raises, as on Ctrl-C.

        Args:
            holder: Any object, the same for both.
        """
        me, ticket = threading.get_ident(), threading.Lock()
        with _shared.guard:
            if self._owner == me or not self._holders:
                self._owner = me
                self._holders.append(holder)
                return
            if self._would_close_a_ring(me):
                self._guests.append(holder)
                return
            ticket.acquire()
            self._queue.append((me, holder, ticket))
            _shared.wanted[me] = self
        ticket.acquire()

    def give_back(self, holder: object) -> None:
        """Ends a turn, or the wait for it, and lets the next thread have it."""
        try:
            self._leave(holder)
        # A Ctrl-C in this very moment must not leave others waiting for ever.
        except BaseException:
            self._leave(holder)
            raise

    def _leave(self, holder: object) -> None:
        """May be called again where it was interrupted."""
        with _shared.guard:
            for held in (self._holders, self._guests):
                held[:] = [other for other in held if other is not holder]
            for waiting in [w for w in self._queue if w[1] is holder]:
                self._queue.remove(waiting)
                _shared.wanted.pop(waiting[0], None)
            if not self._holders:
                self._owner = None
                if self._queue:
                    self._owner, first, ticket = self._queue[0]
                    _shared.wanted.pop(self._owner, None)
                    with contextlib.suppress(RuntimeError):
                        ticket.release()
                    self._holders.append(first)
                    self._queue.popleft()

    def _would_close_a_ring(self, me: int) -> bool:
        turns: Turns | None = self
        while turns is not None and turns._owner is not None:
            if turns._owner == me:
                return True
            turns = _shared.wanted.get(turns._owner)
        return False


@contextlib.contextmanager
def turn(key: Any) -> Iterator[None]:
    """What is done in it with an object, one thread does at a time."""
    turns, holder = _turns_of(key), object()
    try:
        turns.take(holder)
        yield
    finally:
        turns.give_back(holder)


class _Shared:
    """What all turns share.

    Attributes:
        guard: Held for as long as one looks or changes anything, and never while one waits.
        of: Each model's turns.
        wanted: What each thread waits for.
    """

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.of: weakref.WeakKeyDictionary[Any, Turns] = weakref.WeakKeyDictionary()
        self.wanted: dict[int, Turns] = {}


_shared = _Shared()


def _turns_of(stack: Any) -> Turns:
    with _shared.guard:
        found = _shared.of.get(stack)
        if found is None:
            found = _shared.of[stack] = Turns()
        return found


def _forget_threads() -> None:
    """A forked process has none of the threads that may hold a turn, or the guard."""
    global _shared
    _shared = _Shared()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
