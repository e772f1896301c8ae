"""A progress bar where someone is looking, and only when it takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")
_SHOWN_AFTER_SECONDS: Final = 1.5


class _Bars(threading.local):
    """The bars that are open in a thread, the innermost last."""

    def __init__(self) -> None:
        self.open: list[Any] = []


_bars = _Bars()


def with_progress(
    items: Iterable[T], *, total: int, show: bool | None, unit: str = "vector"
) -> Iterator[T]:
    """Passes items on with a bar beside them.

    Args:
        items: What is counted.
        total: How many there will be.
        show: True always, False never, None where stdout is a terminal or a notebook.
        unit: What one item is called.
    """
    with _bar("explaining", show, total=total, unit=unit) as bar:
        if bar is None:
            yield from items
            return
        for item in items:
            yield item
            bar.update()


def show_state(state: str) -> None:
    """Says what is being waited for, at the innermost bar of this thread, if there is one."""
    for bar in _bars.open[-1:]:
        bar.set_postfix_str(state, refresh=time.time() - bar.start_t > bar.delay)


@contextlib.contextmanager
def waiting(what: str, show: bool | None) -> Iterator[None]:
    """A line while a server is waited for: without `show_state` in it, nothing is shown.

    Args:
        what: What is being done.
        show: As in `with_progress`.
    """
    with _bar(what, show, bar_format="{desc}: {elapsed}{postfix}"):
        yield


@contextlib.contextmanager
def _bar(what: str, show: bool | None, **options: Any) -> Iterator[Any]:
    if not (show or (show is None and is_watched(show))):
        yield None
        return
    from tqdm.auto import tqdm

    # A generator may be closed by another thread than the one that began it.
    bars = _bars.open
    drawn_on = _MayBreak(sys.stderr)
    with tqdm(desc=what, delay=_SHOWN_AFTER_SECONDS, leave=False, file=drawn_on, **options) as bar:
        bars.append(bar)
        try:
            yield bar
        finally:
            bars.remove(bar)


class _MayBreak:
    """A stream that costs nobody's work where it is closed, full, or a pipe nobody reads."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Writes what can be written."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        """As far as it can be."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)

    # By this `tqdm.write` knows the bars that stand where it writes.
    def __eq__(self, other: object) -> bool:
        return bool(self._stream == getattr(other, "_stream", other))

    def __hash__(self) -> int:
        return hash(self._stream)


def is_watched(show: bool | None) -> bool:
    """Whether someone looks at a terminal or notebook, and has not said that nothing is wanted."""
    return show is not False and (is_terminal(sys.stdout) or in_notebook())


def is_terminal(stream: Any) -> bool:
    """Whether it is; None stands for a stream that was closed, and objects without `isatty` do."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def in_notebook() -> bool:
    """Whether stdout is a notebook's."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"
