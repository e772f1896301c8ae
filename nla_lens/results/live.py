"""A table that fills while explanations are made: in a notebook, or drawn over on a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from nla_lens.progress import in_notebook, is_watched
from nla_lens.results.display import to_html, to_table
from nla_lens.results.explanation import Explanation
from nla_lens.results.flags import PARTIAL

_MOST_SHOWN: Final = 8
"""The newest; more would not fit on a screen."""
_PAUSE_SECONDS: Final = 0.1
_NOTEBOOK_AFTER_SECONDS: Final = 1.5
"""What is there sooner needs no table before its own."""

Draw = Callable[[Sequence[Explanation]], Any]


def filling(explained: Iterable[Explanation], *, total: int, show: bool | None) -> Iterator[Any]:
    """Passes explanations on, with a table of the newest where a notebook shows it.

    Args:
        explained: Finished ones.
        total: How many there will be.
        show: As in `progress.with_progress`.
    """
    if total > 1 and in_notebook() and is_watched(show):
        return _drawn(explained, _notebook(), after=_NOTEBOOK_AFTER_SECONDS)
    return iter(explained)


def written_live(explained: Iterable[Explanation]) -> Iterator[Explanation]:
    """Passes on what is finished, with a table of the newest that shows partial texts, too."""
    return _drawn(explained, _notebook() if in_notebook() else _terminal())


def _drawn(
    explained: Iterable[Explanation],
    place: contextlib.AbstractContextManager[Draw],
    after: float = 0.0,
) -> Iterator[Explanation]:
    shown: list[Explanation] = []
    due = time.monotonic() + after
    with place as draw:
        for e in explained:
            is_partial = PARTIAL in e.flags
            if (now := time.monotonic()) >= due:
                draw([*shown, e][-_MOST_SHOWN:])
                due = now + _PAUSE_SECONDS
            if not is_partial:
                shown = [*shown, e][-_MOST_SHOWN:]
                yield e


@contextlib.contextmanager
def _terminal() -> Iterator[Draw]:
    from rich.console import Console
    from rich.live import Live

    # Gone at the end, as whoever asked shows all of it. rich's own console has the width of when it
    # was first used.
    with Live(console=Console(), transient=True, auto_refresh=False) as live:
        yield lambda shown: live.update(to_table(shown), refresh=True)


@contextlib.contextmanager
def _notebook() -> Iterator[Draw]:
    from IPython.display import HTML, display

    handle: Any = None

    def draw(shown: Sequence[Explanation]) -> None:
        nonlocal handle
        page = HTML(to_html(shown, whole_page=False))
        if handle is None:
            handle = display(page, display_id=True)
        else:
            handle.update(page)

    try:
        yield draw
    finally:
        if handle is not None:
            handle.update(HTML(""))
