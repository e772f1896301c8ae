"""Tables of explanations that commands are handed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nla_lens.errors import NLAError


def read_table(path: Path) -> Any:
    """A store, what `Explanations.save` wrote, or rows of parquet or JSON lines.

    Raises:
        NLAError: It cannot be read.
    """
    from nla_lens.jobs.files import read_records
    from nla_lens.results.explanations import Explanations
    from nla_lens.results.store import open_store

    if path.is_dir():
        return open_store(path)
    if not path.is_file():
        raise NLAError(f"{path}: there is no such file")
    rows = read_records(path)
    is_ours = bool(rows) and rows[0].get("format") == Explanations.LINES.name
    return Explanations.load(path) if is_ours else rows
