"""The one writer of a store: shards are added, and what is written is never written again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nla_lens.checks import to_path
from nla_lens.disk.writing import make_folder, only_writer, write_whole
from nla_lens.errors import NLAError
from nla_lens.foreign import well_formed_in
from nla_lens.results.manifest import FORMAT, MANIFEST, VERSION, read_manifest
from nla_lens.results.parquet import write_table
from nla_lens.results.rows import to_table
from nla_lens.results.shards import STORE, check_rows
from nla_lens.results.store import Store


class GrowingStore(Store):
    """A store that a job adds shards to."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        about: Mapping[str, Any],
        *,
        n_rows: int,
        n_documents: int,
        user: Mapping[str, str],
    ) -> GrowingStore:
        """Begins a store, or goes on with one that was made with the same.

        Args:
            path: The folder; made where it is not there.
            about: What it is made with; values JSON has.
            n_rows: How many rows it will have when it is finished.
            n_documents: Of how many documents.
            user: Names and types of the user's own columns.

        Raises:
            NLAError: Another store is there, and what differs; or other files.
        """
        path = to_path(path)
        counts = {"n_rows": n_rows, "n_documents": n_documents, "columns": dict(user)}
        whole = json.dumps({**about, **counts})
        # File names need not be Unicode; what a reader takes is.
        wanted = well_formed_in(json.loads(whole))
        if os.path.exists(path / MANIFEST):
            store = cls(path)
            store.check_same(wanted)
            store.check_shards()
            return store
        _check_free(path)
        manifest = {"format": FORMAT, "version": VERSION, **wanted}
        make_folder(path)
        write_whole(path / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=2) + "\n")
        return cls(path)

    def check_same(self, wanted: Mapping[str, Any]) -> None:
        """Raises an NLAError that names what a store was made with otherwise."""
        for key in [*wanted]:
            if key == "versions" or key not in self.manifest:
                continue
            differs = _difference(key, wanted[key], self.manifest[key])
            if differs is not None:
                where, here, there = differs
                raise NLAError(
                    f"{self.path} was made with {where}={there!r:.200}, not {here!r:.200}; name "
                    "another folder, or ask for the same"
                )

    def check_shards(self) -> None:
        """Raises an NLAError that names a shard which would be taken for done and is not."""
        for rows, path in self.shards.items():
            check_rows(path, rows, self._id)
            if self.manifest.get("vectors") and not self.vectors_path(rows).is_file():
                raise NLAError(
                    f"{self.vectors_path(rows)} is not there: remove {path.name}, and the same "
                    "command makes both again"
                )

    @staticmethod
    @contextlib.contextmanager
    def writing(path: str | Path) -> Iterator[None]:
        """Held by the one job that writes to a folder; a lock of a job that died is free.

        Raises:
            NLAError: Another job is writing, or the folder holds something else.
        """
        path = to_path(path)
        _check_free(path)
        make_folder(path)
        with only_writer(path / ".store"):
            yield

    @staticmethod
    def seed_of(path: str | Path) -> int | None:
        """The seed a store's texts were sampled with; None where there is no store yet."""
        path = to_path(path) / MANIFEST
        return read_manifest(path).get("seed") if os.path.exists(path) else None

    def write(
        self,
        first: int,
        rows: Sequence[Mapping[str, Any]],
        vectors: Any = None,
        between: Sequence[Mapping[str, Any]] = (),
    ) -> Path:
        """Adds a shard; what belongs to it appears before it, so that none is without.

        Args:
            first: Number of its first row.
            rows: As `results.rows.to_row` makes them.
            vectors: `[n, d]`, where they are kept.
            between: Tokens that were not explained: `row` and those `before` and `after` it.

        Raises:
            NLAError: It cannot be written.
        """
        span = range(first, first + len(rows))
        path = self.path / f"rows-{span[0]:09d}-{span[-1]:09d}.parquet"
        if vectors is not None:
            from safetensors.torch import save

            write_whole(
                self.vectors_path(span), save({"vectors": vectors.contiguous()}, {STORE: self._id})
            )
        if between:
            lines = (json.dumps(around, ensure_ascii=False) + "\n" for around in between)
            write_whole(self.texts_path(span), "".join(lines))
        table = to_table(rows, self.user)
        return write_table(path, table.replace_schema_metadata({STORE: self._id}))


def _check_free(path: Path) -> None:
    """Raises an NLAError for a folder that holds something else than a store."""
    if not os.path.exists(path) or os.path.exists(path / MANIFEST):
        return
    # A job that died before its manifest was there may have left hidden files.
    if not path.is_dir() or any(not p.name.startswith(".") for p in path.iterdir()):
        raise NLAError(f"{path} is there already and is no store; name another folder")


def _difference(key: str, here: Any, there: Any) -> tuple[str, Any, Any] | None:
    """The first place at which two values differ, down through dicts; None where they are equal.

    What an earlier version did not write down cannot be compared.
    """
    if not (isinstance(here, dict) and isinstance(there, dict)):
        return None if here == there else (key, here, there)
    found = (_difference(f"{key}.{name}", here.get(name), there[name]) for name in sorted(there))
    return next((one for one in found if one is not None), None)
