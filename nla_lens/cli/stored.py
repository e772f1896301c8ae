"""An explanation that a command is pointed to: a row of a store, or of a file of explanations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nla_lens.errors import NLAError

if TYPE_CHECKING:
    from torch import Tensor

    from nla_lens.results.explanation import Explanation


@dataclass(frozen=True)
class Stored:
    """What is known of a row.

    Attributes:
        explanation: What was said.
        vector: Of what; None where vectors were not kept.
        context: The text read so far; None where it is not known.
    """

    explanation: Explanation
    vector: Tensor | None = None
    context: str | None = None


def is_stored(source: str) -> bool:
    """Whether an argument names a store or a file, and is no text to be read itself."""
    try:
        path = Path(source).expanduser()
        return path.is_file() or (path / "manifest.json").is_file()
    # Longer than a file's name may be, say.
    except (OSError, ValueError, RuntimeError):
        return False


def read_stored(source: str, row: int) -> Stored:
    """A row of a store, or the n-th explanation of a file that `save` wrote.

    Raises:
        NLAError: No such row, one that failed, or no such file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        from nla_lens.results.explanations import Explanations

        found = Explanations.load(path).flat
        if not 0 <= row < len(found):
            raise NLAError(f"{path} has no row {row}: it holds {len(found)} explanations")
        return Stored(found[row])
    from nla_lens.results.rows import to_explanations
    from nla_lens.results.store import open_store

    store = open_store(path)
    numbers = store.to_arrow(["row"])["row"].to_pylist()
    if row not in numbers:
        raise NLAError(f"{path} has no row {row}: it holds {len(numbers)}")
    (values,) = store.rows(row=row)
    if values["error"] is not None:
        raise NLAError(f"row {row} of {path} could not be explained: {values['error']}")
    try:
        vector = store.vectors()[numbers.index(row)]
    except NLAError:
        vector = None
    (explanation,) = to_explanations([values])
    return Stored(explanation, vector, store.read_so_far(row))
