"""Many explanations in the shape of their vectors: a table, a page, a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np

from nla_lens.checks import to_path
from nla_lens.disk.writing import write_whole
from nla_lens.errors import NLAError
from nla_lens.foreign import well_formed
from nla_lens.results.display import to_html
from nla_lens.results.explanation import Explanation
from nla_lens.results.lines import Format, damaged, read_lines, write_lines
from nla_lens.results.page import documents_of, to_frame, to_page
from nla_lens.results.parquet import SUFFIX, is_parquet, read_records, write_records

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Explanations(Sequence["Explanation | Explanations"]):
    """Explanations in the shape of the vectors' leading axes, indexed like an array.

    >>> explanations.shape
    (2, 9)
    >>> explanations[0, -1]     # the last position of row 0
    >>> explanations[0]         # the whole row: Explanations of shape (9,)
    """

    LINES: ClassVar[Format] = Format("nla_lens.explanations", 1)
    RECORD: ClassVar[type[Explanation]] = Explanation
    """What it holds; the columns of a table without rows."""

    def __init__(self, items: Iterable[Explanation], shape: Sequence[int] | None = None) -> None:
        """Args:
        items: In row-major order.
        shape: Leading axes; None is one axis.

        Raises:
            NLAError: The shape does not hold as many as there are.
        """
        listed = list(items)
        self.shape: tuple[int, ...] = (len(listed),) if shape is None else tuple(shape)
        if math.prod(self.shape) != len(listed) or not self.shape or min(self.shape) < 0:
            raise NLAError(f"{len(listed)} explanations do not fill the shape {self.shape}")
        self._grid = np.empty(len(listed), dtype=object)
        self._grid[:] = listed
        self._grid = self._grid.reshape(self.shape)

    @property
    def flat(self) -> list[Explanation]:
        """All of them in row-major order."""
        return list(self._grid.ravel())

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> Explanation | Explanations: ...
    @overload
    def __getitem__(self, index: slice) -> Explanations: ...
    @overload
    def __getitem__(self, index: tuple[Any, ...]) -> Explanation | Explanations: ...
    def __getitem__(self, index: Any) -> Explanation | Explanations:
        picked = self._grid[index]
        if isinstance(picked, Explanation):
            return picked
        return Explanations(picked.ravel(), picked.shape)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanations):
            return NotImplemented
        return self.shape == other.shape and self.flat == other.flat

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [f"  {e!r}" for e in self.flat[:8]]
        if len(self.flat) > len(shown):
            shown.append(f"  ... {len(self.flat) - len(shown)} more")
        return "\n".join([f"Explanations of shape {self.shape}:", *shown])

    def _repr_html_(self) -> str:
        table = to_html(self.flat, whole_page=False)
        if all(e.label is None for e in self.flat):
            return table
        return f"{to_frame(self._page())}<details><summary>As a table</summary>{table}</details>"

    def to_dict(self) -> dict[str, Any]:
        """`{"shape": [...], "explanations": [...]}`, ready for JSON."""
        return {"shape": list(self.shape), "explanations": [e.to_dict() for e in self.flat]}

    def to_pandas(self) -> pd.DataFrame:
        """One row per explanation; a MultiIndex over the leading axes where there are several.

        Raises:
            NLAError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise NLAError("to_pandas needs pandas: pip install pandas") from error
        kind = type(self.flat[0]) if self.flat else self.RECORD
        columns = [f.name for f in fields(kind) if f.name != "samples"]
        rows = [{c: _for_tables(getattr(e, c)) for c in columns} for e in self.flat]
        frame = pd.DataFrame(rows, columns=columns)
        if len(self.shape) > 1:
            frame.index = pd.MultiIndex.from_product([range(n) for n in self.shape])
        return frame

    def plot(self, nla: Any = None, vectors: Any = None) -> Figure:
        """Four panels: fidelity by position, norm against fidelity, cos against a control, flags.

        Args:
            nla: For the control: an NLA with a reconstructor.
            vectors: For the control: what was explained, with as many leading axes.

        Raises:
            NLAError: matplotlib (extra `plots`) is not installed, nothing was scored, or there are
                not as many vectors.
        """
        from nla_lens.results.plots import plot

        if vectors is not None and len(self.shape) > 1:
            vectors = vectors.reshape(len(self.flat), -1)
        return plot(self.flat, nla, vectors)

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page that works from disk, everything escaped.

        Returns:
            The file written.
        """
        return write_whole(path, self._page())

    def _page(self) -> str:
        hooks = sorted({e.hook_name for e in self.flat if e.hook_name is not None})
        about = " · ".join([f"{len(self.flat)} explanations", *hooks])
        return to_page(documents_of(self.flat), title="What the residual stream says", about=about)

    def save(self, path: str | Path) -> Path:
        """Writes a file that appears whole or not at all.

        Args:
            path: Ends it in `.parquet`, the rows of a store (`nla_lens.results.rows`), which others
                read without us; else JSON lines: a header, then one explanation a line.
        """
        write = write_records if to_path(path).suffix == SUFFIX else write_lines
        return write(path, self.LINES, {"shape": list(self.shape)}, self.flat)

    @classmethod
    def load(cls, path: str | Path) -> Explanations:
        """Reads what `save` wrote, by its content, whatever it is called; or a store's shard.

        Raises:
            NLAError: Not such a file, or a damaged one; names the file and the line.
        """
        path = to_path(path)
        if is_parquet(path):
            header, records = read_records(path, cls.LINES, cls.RECORD)
            header.setdefault("shape", [len(records)])
        else:
            header, records = read_lines(path, cls.LINES, cls.RECORD.from_dict)
        with damaged(path, 1):
            return cls(records, header["shape"])


def _for_tables(value: Any) -> Any:
    """Tables are written to files, for which half of a surrogate pair is no text."""
    return well_formed(value) if isinstance(value, str) else value
