"""Models in pickles. What transformers hooks onto a model, once it was asked for its hidden states,
are local functions, and have no pickle of their own."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from nla_lens.models.passes import OwnHook

_INSTALLED = "_output_capturing_hooks_installed"
"""Where transformers (5) notes that it has hooked a model."""


class Pickled:
    """What holds a model and pickles with it.

    Attributes:
        model: A transformers model.
    """

    model: Any

    def __getstate__(self) -> dict[str, Any]:
        make_picklable(self.model)
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        forget_hooks(self.model)


class KeepsPrefix:
    """What keeps a prefix of prompts between calls, and pickles without it."""

    _prefix: Any = None

    def forget_prefix(self) -> None:
        """Drops the kept prefix; needed only after the model's weights were changed."""
        self._prefix = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_prefix": None}


class _Theirs(OwnHook):
    """A hook of transformers', which stays where it is and leaves no trace in a pickle."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        super().__init__(lambda: True, hook)

    def __reduce__(self) -> Any:
        return OwnHook, (bool, bool)


def make_picklable(model: nn.Module) -> None:
    """Wraps the hooks that transformers keeps on a model; they go on doing what they do."""
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            local = isinstance(hook, FunctionType) and "<locals>" in hook.__qualname__
            if local and hook.__module__.startswith("transformers."):
                # In its place: nothing is added or taken away under those who are looking.
                module._forward_hooks[number] = _Theirs(hook)


def forget_hooks(model: nn.Module) -> None:
    """Lets transformers hook an unpickled model anew, when it is asked for hidden states again."""
    for module in model.modules():
        vars(module).pop(_INSTALLED, None)
