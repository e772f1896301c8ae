"""A folder of explanations that others read without us: parquet shards and a manifest.

```
store/
  manifest.json                                what it was made with: versions, settings, hashes
  rows-000000000-000000255.parquet             rows 0 to 255; a shard appears whole or not at all
  vectors-000000000-000000255.safetensors      `vectors` [256, d], where they were asked for
  texts-000000000-000000255.jsonl              tokens around them that were not explained
```

Rows are numbered through the whole job, so a shard's name says what it holds and what is missing
can be told from a listing. pandas, polars, duckdb and `datasets` read the shards as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nla_lens.checks import to_path
from nla_lens.disk.writing import write_whole
from nla_lens.errors import NLAError
from nla_lens.results.explanations import Explanations
from nla_lens.results.manifest import MANIFEST, read_manifest
from nla_lens.results.page import document, to_page
from nla_lens.results.rows import import_arrow, schema, to_explanations
from nla_lens.results.shards import read_around, read_rows, read_vectors, store_id

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from torch import Tensor

_SHARD: Final = re.compile(r"rows-(\d{9,})-(\d{9,})\.parquet")


def open_store(path: str | Path) -> Store:
    """Opens a store to read it; a job may go on writing meanwhile.

    Raises:
        NLAError: No store there, or a damaged one.
    """
    return Store(path)


class Store:
    """Explanations in a folder; `nla_lens.explain_corpus` writes one.

    Attributes:
        path: The folder.
        manifest: What it was made with.
    """

    def __init__(self, path: str | Path) -> None:
        """See `open_store`."""
        self.path = to_path(path)
        self.manifest = read_manifest(self.path / MANIFEST)
        self.user: dict[str, str] = dict(self.manifest["columns"])
        self.n_rows: int = self.manifest["n_rows"]
        self._id = store_id(self.manifest)

    # --- what is there ------------------------------------------------------------------------

    @property
    def shards(self) -> dict[range, Path]:
        """Rows and the file that holds them, in order."""
        found = {}
        with told(self.path):
            for path in self.path.iterdir():
                # A pipe of that name would be waited for.
                if (match := _SHARD.fullmatch(path.name)) and path.is_file():
                    found[range(int(match[1]), int(match[2]) + 1)] = path
        whole = [(rows, path) for rows, path in found.items() if len(rows)]
        listed = sorted(whole, key=lambda item: (item[0].start, item[0].stop))
        for (rows, path), (following, other) in itertools.pairwise(listed):
            if following.start < rows.stop:
                raise NLAError(
                    f"{path} and {other.name} hold the same rows: one of them does not belong to "
                    "this store; take it out of the folder"
                )
        if listed and listed[-1][0].stop > self.n_rows:
            raise NLAError(
                f"{listed[-1][1]} holds rows beyond the {self.n_rows} of this store: it does not "
                "belong to it; take it out of the folder"
            )
        return dict(listed)

    def missing(self) -> list[range]:
        """The stretches of rows that are still to be made."""
        gaps, at = [], 0
        for rows in [*self.shards, range(self.n_rows, self.n_rows)]:
            if rows.start > at:
                gaps.append(range(at, rows.start))
            at = max(at, rows.stop)
        return gaps

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return not self.missing()

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"of {self.n_rows}"
        failed = self.n_failed
        said = f", {failed} failed" if failed else ""
        n = self.manifest["n_documents"]
        return f"Store({str(self.path)!r}, {len(self)} rows ({state}){said}, {n} documents)"

    @property
    def n_failed(self) -> int:
        """Rows that hold an error instead of an explanation."""
        return sum(
            len(column) - column.null_count
            for column in (t["error"] for t in self._read(["error"]))
        )

    def _read(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for rows, path in self.shards.items():
            yield read_rows(path, rows, columns, self.user, self._id)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows in order, as an arrow table."""
        arrow = import_arrow()
        tables = list(self._read(columns))
        if not tables:
            whole = schema(self.user)
            picked = whole if columns is None else [whole.field(name) for name in columns]
            return arrow.schema(picked).empty_table()
        return arrow.concat_tables(tables)

    def to_pandas(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """All rows in order, as a data frame.

        Raises:
            NLAError: pandas is not installed.
        """
        try:
            import pandas  # noqa: F401
        except ImportError as error:
            raise NLAError("to_pandas needs pandas: pip install pandas") from error
        return self.to_arrow(columns).to_pandas()

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """Rows as dicts, in order; `document=3`, `complete=False` and so on pick some.

        Raises:
            NLAError: No such column.
        """
        unknown = sorted(set(wanted) - set(schema(self.user).names))
        if unknown:
            raise NLAError(f"{self.path} has no column {unknown[0]!r}")
        import pyarrow.compute as pc

        found = []
        for table in self._read():
            for name, value in wanted.items():
                column = table[name]
                try:
                    same = pc.is_null(column) if value is None else pc.equal(column, value)
                # Arrow's errors are of all of these.
                except (OverflowError, NotImplementedError, TypeError, ValueError) as error:
                    raise NLAError(f"{name}={value!r:.80} cannot be in that column") from error
                table = table.filter(same)
            found += table.to_pylist()
        return found

    def explanations(self, document: int | None = None, **wanted: Any) -> Explanations:
        """What was said, in order, without the rows that failed.

        Args:
            document: Of which document; None: of all.
            **wanted: As in `rows`.
        """
        picked = wanted if document is None else {"document": document, **wanted}
        rows = self.rows(**picked)
        return Explanations(to_explanations(map(self._ours, rows)))

    def _ours(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row without the user's own columns, which may be called as one of ours."""
        return {name: value for name, value in row.items() if name not in self.user}

    def vectors(self) -> Tensor:
        """The vectors, `[n, d]` float32, in the order of the rows.

        Raises:
            NLAError: They were not kept.
        """
        import torch

        paths = [self.vectors_path(rows) for rows in self.shards]
        if not all(path.is_file() for path in paths):
            raise NLAError(f"{self.path} holds no vectors; ask for them with vectors=True")
        ours = zip(map(len, self.shards), paths, strict=True)
        found = [read_vectors(p, n, self._id) for n, p in ours]
        if len({part_ND.shape[1] for part_ND in found}) > 1:
            raise NLAError(f"{self.path}: the vectors of its shards are of several widths")
        return torch.cat(found)

    def vectors_path(self, rows: range) -> Path:
        """Where the vectors of a shard are, if they were kept."""
        return self.path / f"vectors-{rows[0]:09d}-{rows[-1]:09d}.safetensors"

    def about(self) -> str:
        """A line on what it holds."""
        failed = f", {self.n_failed} failed" if self.n_failed else ""
        of = "" if self.complete else f" of {self.n_rows}"
        nla = self.manifest.get("nla")
        hook_name = nla.get("hook_name") if isinstance(nla, dict) else None
        return f"{len(self)}{of} rows{failed} · {hook_name or ''}"

    def page(self, *, limit: int | None = None, live: str | None = None) -> str:
        """The page that `to_html` writes.

        Args:
            limit: Only the first so many documents.
            live: See `results.page.to_page`.
        """
        title = self.path.resolve().name
        return to_page(self.documents(limit), title=title, about=self.about(), live=live)

    def documents(self, limit: int | None = None) -> list[dict[str, Any]]:
        """What the page shows of each document, see `results.page.document`."""
        between = self._between()
        found: dict[int, list[dict[str, Any]]] = {}
        for row in self.rows():
            if limit is None or row["document"] < limit:
                found.setdefault(row["document"], []).append(row)
        return [
            document(
                map(self._ours, rows),
                between=between,
                columns={name: rows[0][name] for name in self.user},
            )
            for rows in found.values()
        ]

    def to_html(self, path: str | Path, *, limit: int | None = None) -> Path:
        """Writes one HTML file that works from disk, everything escaped.

        Args:
            path: The file.
            limit: Only the first so many documents.
        """
        return write_whole(path, self.page(limit=limit))

    def read_so_far(self, row: int) -> str | None:
        """The text of a row's document up to the row's token; None where tokens are not known.

        Raises:
            NLAError: No such row.
        """
        own = self.rows(row=row)
        if not own:
            raise NLAError(f"{self.path} has no row {row}")
        between, tokens = self._between(), list[str | None]()
        for other in self.rows(document=own[0]["document"]):
            around = between.get(other["row"], {})
            tokens += [*around.get("before", ()), other["token"]]
            if other["row"] == row:
                break
            tokens += around.get("after", ())
        return None if None in tokens else "".join(map(str, tokens))

    def _between(self) -> dict[int, dict[str, list[str]]]:
        """Tokens that were not explained, by the row they stand at."""
        found: dict[int, dict[str, list[str]]] = {}
        for rows in self.shards:
            path = self.texts_path(rows)
            if path.is_file():
                found |= read_around(path, rows)
        return found

    def texts_path(self, rows: range) -> Path:
        """Where the tokens around a shard's rows are, if there are any."""
        return self.path / f"texts-{rows[0]:09d}-{rows[-1]:09d}.jsonl"


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Says which folder could not be looked at."""
    try:
        yield
    except OSError as error:
        raise NLAError(f"{path}: {error.strerror or error}") from error
