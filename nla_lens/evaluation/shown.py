"""What results of several rows share: they are shown as a table, in a notebook and as a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from nla_lens.disk.writing import write_whole
from nla_lens.results.display import to_html, to_table

_WIDTH: Final = 150


class Shown:
    """A result that has rows, each of which says its columns."""

    def rows_shown(self) -> Sequence[Any]:
        """What is shown, in order."""
        raise NotImplementedError

    def title(self) -> str:
        """What it is about, in a line."""
        raise NotImplementedError

    def to_table(self) -> Any:
        """A table for terminals."""
        return to_table(self.rows_shown(), title=self.title())

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=_WIDTH, file=io.StringIO())
        console.print(self.to_table())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        return to_html(self.rows_shown(), whole_page=False)

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page, everything escaped."""
        return write_whole(path, to_html(self.rows_shown(), whole_page=True))
