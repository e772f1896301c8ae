"""What is ambient where we are called, and must not change what we answer.

Autocast, a default device, a default dtype, inference mode, disabled attention kernels: a user sets
them for code of their own, and what we promise (float32 on the CPU, ordinary tensors, the same
texts) holds among them, too.

>>> with torch.autocast("cpu", torch.bfloat16):
...     nla.reconstruct(texts).dtype
torch.float32
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_AUTOCAST: Final = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While it lasts, nothing ambient acts; also a decorator of functions.

    Modes of torch belong to a thread, so nobody else's code is touched by it, with the one
    exception that `_ProcessWide` names.
    """
    with contextlib.ExitStack() as entered:
        for device in _AUTOCAST:
            if _is_autocast(device):
                entered.enter_context(torch.autocast(device, enabled=False))
        # Looked at by trying: modes answer, too, of which `get_default_device` does not know.
        if torch.empty(0).device.type != "cpu":
            entered.enter_context(torch.device("cpu"))
        # By `with`, which a Ctrl-C cannot part from its end as it can the calls of a stack.
        # What is made in inference mode can be used nowhere else.
        with _process_wide, torch.inference_mode(False), torch.no_grad():
            yield


def undisturbed_steps(function: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """Makes each step of a generator function undisturbed; between steps the caller's modes act."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        steps: Any = function(*args, **kwargs)
        try:
            while True:
                with undisturbed():
                    try:
                        found = next(steps)
                    except StopIteration:
                        return
                yield found
        finally:
            steps.close()

    return run


def _is_autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:
        # A kind of device that this torch cannot autocast on.
        return False


class _ProcessWide:
    """Settings that torch keeps for all threads: while anyone is inside, they are as we need them.

    Where they are so already, as almost always, nothing is changed. Where not, other threads see
    our setting for as long: a default dtype of float32, and a plain way of attention to fall back
    on where a user allowed only others.
    """

    _SETTINGS: Final[tuple[tuple[Callable[[], Any], Callable[[Any], None], Any], ...]] = (
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, True),
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._wanted: dict[int, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            try:
                for i, (read, write, needed) in enumerate(self._SETTINGS):
                    if (found := read()) != needed:
                        self._wanted[i] = found
                        write(needed)
            except BaseException:
                self._put_back()
                raise
            # The last: a Ctrl-C before it has us outside, and none comes behind it.
            self._n_inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._n_inside -= 1
            try:
                self._put_back()
            # May be done again where it was interrupted.
            except BaseException:
                self._put_back()
                raise

    def _put_back(self) -> None:
        if self._n_inside == 0:
            for i, wanted in list(self._wanted.items()):
                self._SETTINGS[i][1](wanted)
                self._wanted.pop(i, None)


_process_wide = _ProcessWide()
if hasattr(os, "register_at_fork"):
    # A forked process has none of the threads that may be inside, or hold the lock.
    os.register_at_fork(after_in_child=_process_wide.__init__)  # type: ignore[misc]
