"""A progress bar where someone is looking, and only when it takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")
_SHOWN_AFTER_SECONDS: Final = 1.5


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
    if show is None:
        show = sys.stdout.isatty() or _in_notebook()
    if not show:
        yield from items
        return
    from tqdm.auto import tqdm

    yield from tqdm(
        items, total=total, unit=unit, delay=_SHOWN_AFTER_SECONDS, desc="explaining", leave=False
    )


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"
