"""Records in a file of JSON lines: a header, then one record a line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nla_lens.errors import NLAError

R = TypeVar("R")


class Record(Protocol):
    """What a line is made of."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        ...


@dataclass(frozen=True)
class Format:
    """What a file's header must say.

    Attributes:
        name: `nla_lens.` and what is in it.
        version: Of the format.
    """

    name: str
    version: int

    def header(self, about: Mapping[str, Any]) -> str:
        """The first line of a file."""
        return _line({"format": self.name, "version": self.version, **about})

    def check(self, header: Mapping[str, Any]) -> None:
        """Raises an NLAError if a header is another format's."""
        if header.get("format") != self.name or header.get("version") != self.version:
            raise NLAError(f"not written by nla_lens as {self.name}, version {self.version}")


def json_line(record: Record) -> str:
    """One record as a line of JSON."""
    return _line(record.to_dict())


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def write_lines(
    path: str | Path, form: Format, about: Mapping[str, Any], records: Iterable[Record]
) -> Path:
    """Writes a file, whole or not at all.

    Args:
        path: The file.
        form: What it is.
        about: More for its header.
        records: One a line.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    written = form.header(about) + "".join(map(json_line, records))
    with writing(path):
        # Half of a surrogate pair, as from broken bytes, has no UTF-8.
        partial.write_text(written, encoding="utf-8", errors="surrogatepass", newline="\n")
        return partial.replace(path)


def read_lines(
    path: str | Path,
    form: Format,
    record: Callable[[Mapping[str, Any]], R],
    *,
    keep_torn: bool = True,
) -> tuple[dict[str, Any], list[R]]:
    """The header and the records of a file.

    Args:
        path: The file.
        form: What it must be.
        record: Makes a record of what stands in a line.
        keep_torn: Read a last line without a line break, too, and refuse it where it was cut off;
            else it is taken as not written.

    Raises:
        NLAError: Not such a file, or a damaged one; names the file and the line.
    """
    whole, rest = whole_lines(path)
    header, *lines = [*whole, rest] if (rest and keep_torn) or not whole else whole
    with damaged(path, 1):
        about: dict[str, Any] = json.loads(header)
        form.check(about)
    found = []
    for number, line in enumerate(lines, start=2):
        with damaged(path, number):
            found.append(record(json.loads(line)))
    return about, found


def whole_lines(path: str | Path) -> tuple[list[str], str]:
    """The lines of a file, and what stands behind the last line break.

    Raises:
        NLAError: It cannot be read.
    """
    try:
        content = Path(path).read_bytes().decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError) as error:
        raise NLAError(f"{path} cannot be read: {error}") from error
    # Not splitlines: a text may hold U+2028 and other separators JSON leaves as they are.
    *lines, rest = content.split("\n")
    return lines, rest


@contextlib.contextmanager
def damaged(path: str | Path, number: int) -> Iterator[None]:
    """Names the line at which what is read is not what was written."""
    try:
        yield
    # Whatever is in the file: JSON of another kind gives any of these.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NLAError(f"{path} is damaged at line {number}: {error}") from error


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Says which file could not be written."""
    try:
        yield
    except OSError as error:
        raise NLAError(f"{path} cannot be written: {error}") from error
