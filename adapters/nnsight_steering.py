"""nnsight: the residual stream changed where a module hands its output over.

There a trace reads it, so what it reads and caches is what goes on, and what it writes comes
afterwards. Where nothing is traced, as in a plain forward of the module, a forward hook does it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

from nla_lens.adapters.nnsight_parts import envoy_of, text_stack
from nla_lens.engines.local.nnsight_threads import let_threads, on_output
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, width_of
from nla_lens.models.turns import turn
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.patching import Edit, Watcher, edited, watched_stack


def size_of_blocks(model: Any) -> tuple[int, int]:
    """Width and number of blocks of a model that can be changed on the way.

    Raises:
        NLAError: No whole model, or one whose weights are not in this process.
    """
    stack = text_stack(model)
    if any(parameter.is_meta for parameter in stack.parameters()) and not model.dispatched:
        raise NLAError(
            "the weights of this model are not loaded in this process, where it is changed on the "
            f"way: model.dispatch() loads them. {_REMOTE}"
        )
    return width_of(stack), len(blocks_of(stack))


_REMOTE = (
    "On NDIF nothing is changed from here; write it into the trace: "
    "model.model.layers[K].output[:, -1] += ..."
)


def watched_stack_of(
    model: Any, place: ResidPost, watcher: Watcher
) -> contextlib.AbstractContextManager[None]:
    """See `nla_lens.stream.patching.watched`."""
    return watched_stack(text_stack(model), watcher)


@contextlib.contextmanager
def patched_block(model: Any, place: ResidPost, edit: Edit) -> Iterator[None]:
    """See `nla_lens.stream.patching.patched`.

    Raises:
        NLAError: The model has an interleaver of a kind of its own.
    """
    let_threads(model)
    block = blocks_of(text_stack(model))[place.layer]
    envoy, mine = envoy_of(model, block), threading.get_ident()
    handed_over = False

    def act(output: Any) -> Any:
        nonlocal handed_over
        if threading.get_ident() != mine:
            return output
        handed_over = True
        return edited(output, edit)

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal handed_over
        if threading.get_ident() == mine:
            handed_over = False

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != mine or handed_over:
            return None
        return edited(output, edit)

    with contextlib.ExitStack() as undo:
        undo.enter_context(on_output(model, envoy.path, act))
        undo.enter_context(_not_remote(model))
        for handle in (
            block.register_forward_pre_hook(begin),
            block.register_forward_hook(hook, prepend=True),
        ):
            undo.callback(handle.remove)
        yield


class _Here:
    """Stands for what sends a model's traces away, and refuses those of some threads.

    Attributes:
        threads: Which, each as often as it changes the model.
    """

    def __init__(self, model: Any) -> None:
        self.threads: list[int] = []
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() in self.threads:
            raise NLAError(f"this model is changed on the way, and only in this process. {_REMOTE}")
        return type(self._model)._remote_backend(self._model, *args, **kwargs)

    def __reduce__(self) -> Any:
        """What another thread sends to a server holds nothing of it."""
        return dict, ()


@contextlib.contextmanager
def _not_remote(model: Any) -> Iterator[None]:
    """Refuses this thread's remote traces, which would not be changed."""
    name, me = "_remote_backend", threading.get_ident()
    if not hasattr(type(model), name):
        yield
        return
    with turn(_Here):
        here = vars(model).setdefault(name, _Here(model))
        here.threads.append(me)
    try:
        yield
    finally:
        with turn(_Here):
            here.threads.remove(me)
            if not here.threads:
                vars(model).pop(name, None)
