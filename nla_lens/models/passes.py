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

import threading
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from nla_lens.errors import NLAError
from nla_lens.models.anatomy import text_model
from nla_lens.models.turns import turns_of

_STATES: Final = "recurrent_states"


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

    def belongs_to(self, own_pass: OwnPass) -> bool:
        """Whether it was put there by a pass."""
        return getattr(self._is_due, "__self__", None) is own_pass

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
        self._turns = turns_of(stack)
        # Entered again in the middle of a pass, they show that somebody else's has begun.
        self._entered = {model: 0, stack: 0}
        self._n_inside = 0
        self._handles: list[Any] = []
        self._kept = _KeptInModules(stack)
        self._outer: OwnPass | None = None

    def __enter__(self) -> OwnPass:
        try:
            self._turns.take(self)
            self._outer, _here.current = _here.current, self
            self._kept.take_out()
            for module in self._entered:
                self._count(module)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exc: object) -> None:
        try:
            self._end()
            # A Ctrl-C may have come while torch put a hook down, whose handle we then never got.
            if kind is not None and not issubclass(kind, Exception):
                self._sweep()
        # Or just now.
        except BaseException:
            self._end()
            self._sweep()
            raise

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
        """May be called again where it was interrupted."""
        try:
            for handle in self._handles:
                handle.remove()
            self._kept.put_back()
            if self._is_current():
                _here.current = self._outer
        finally:
            self._turns.give_back(self)

    def _sweep(self) -> None:
        """Takes back what is hooked and has no handle."""
        for module in {part for model in self._entered for part in model.modules()}:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for number, hook in list(hooks.items()):
                    if isinstance(hook, _OfAPass) and hook.belongs_to(self):
                        hooks.pop(number, None)
                        module._forward_hooks_always_called.pop(number, None)


class _KeptInModules:
    """What RecurrentGemma's modules keep of the last pass, with a cache or without.

    A pass of ours begins with nothing, and somebody's generation goes on with its own: states of
    another number of rows do not even fit.
    """

    def __init__(self, stack: Any) -> None:
        family = getattr(getattr(stack, "config", None), "model_type", None)
        self._modules = (
            [module for module in stack.modules() if _STATES in vars(module)]
            if family == "recurrent_gemma"
            else []
        )
        self._states: list[Any] = []

    def take_out(self) -> None:
        """Before a pass."""
        self._states = [getattr(module, _STATES) for module in self._modules]
        for module in self._modules:
            setattr(module, _STATES, None)

    def put_back(self) -> None:
        """After it; nothing where it did not begin."""
        for module, states in zip(self._modules, self._states, strict=False):
            setattr(module, _STATES, states)


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
