"""Records in a file of JSON lines: a header, then one record a line.

A file is written whole, or grows at its end by whole lines; what is written is never written again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from nla_lens.disk.reading import open_regular, read_bytes
from nla_lens.disk.writing import make_folder, only_writer, write_whole, writing
from nla_lens.errors import NLAError
from nla_lens.foreign import to_json

__all__ = ["Format", "damaged", "growing", "json_line", "read_lines", "write_lines", "writing"]

R = TypeVar("R")
_MOST_BYTES: Final = 1 << 40
_LONGEST_HEADER: Final = 16 << 20
_SYNC_SECONDS: Final = 1.0
"""A power cut costs no more than what was written since."""


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
    return to_json(values) + "\n"


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
    return write_whole(path, form.header(about) + "".join(map(json_line, records)))


def read_lines(
    path: str | Path,
    form: Format,
    record: Callable[[Mapping[str, Any]], R],
    *,
    keep_torn: bool = True,
    lost: Callable[[NLAError], object] | None = None,
) -> tuple[dict[str, Any], list[R]]:
    """The header and the records of a file.

    Args:
        path: The file.
        form: What it must be.
        record: Makes a record of what stands in a line.
        keep_torn: Read a last line without a line break, too, and refuse it where it was cut off;
            else it is taken as not written.
        lost: Is told of a damaged line, which is then left out; None refuses the file.

    Raises:
        NLAError: Not such a file, or a damaged one; names the file and the line.
    """
    *whole, rest = read_bytes(path, most_bytes=_MOST_BYTES).split(b"\n")
    # Not splitlines: a text may hold U+2028 and other separators JSON leaves as they are.
    header, *lines = [*whole, rest] if (rest and keep_torn) or not whole else whole
    try:
        first = header.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise NLAError(f"{path} cannot be read: {error}") from error
    with damaged(path, 1):
        about: dict[str, Any] = json.loads(first)
        form.check(about)
    found = []
    for number, line in enumerate(lines, start=2):
        try:
            with damaged(path, number):
                found.append(record(json.loads(line.decode("utf-8", "surrogatepass"))))
        except NLAError as error:
            if lost is None:
                raise
            lost(error)
    return about, found


class Growing:
    """A file of lines that grows at its end, open for its only writer; see `growing`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_APPEND)
            self._size = _size_of_whole_lines(self._file)
            if self._size < os.fstat(self._file).st_size:
                # One call, in which nothing that is whole is touched.
                os.ftruncate(self._file, self._size)
        self._synced = time.monotonic()

    def append(self, record: Record) -> None:
        """Adds a record; of one that does not fit on the disk nothing stays.

        Raises:
            NLAError: It cannot be written.
        """
        line = json_line(record).encode("utf-8")
        with writing(self._path):
            try:
                done = 0
                while done < len(line):
                    done += os.write(self._file, line[done:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
            self._size += len(line)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def close(self) -> None:
        """Puts what was written on the disk."""
        try:
            with writing(self._path):
                os.fsync(self._file)
        finally:
            os.close(self._file)


@contextlib.contextmanager
def growing(path: Path, form: Format, about: Mapping[str, Any]) -> Iterator[Growing]:
    """A file that is gone on with, or begun; nobody else writes to it meanwhile.

    A last line that was cut short, and a header that was, are taken as not written.

    Args:
        path: The file.
        form: What it is.
        about: More for the header of a new one.

    Raises:
        NLAError: It is no such file, cannot be written, or is being written.
    """
    make_folder(path.parent)
    with only_writer(path):
        if not os.path.exists(path) or _is_only_begun(path, form):
            write_whole(path, form.header(about))
        _check_header(path, form)
        file = Growing(path)
        try:
            yield file
        finally:
            file.close()


def _size_of_whole_lines(file: int) -> int:
    """Bytes up to the last line break, looked for from the end."""
    end, piece = os.fstat(file).st_size, 1 << 16
    while end > 0:
        start = max(0, end - piece)
        os.lseek(file, start, os.SEEK_SET)
        found = os.read(file, end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _is_only_begun(path: Path, form: Format) -> bool:
    """Whether a file has no whole line, and what is there is a part of such a header."""
    with writing(path), open_regular(path) as file:
        found = file.read(1 << 20)
    if b"\n" in found:
        return False
    start = form.header({})[:-2].encode()
    # After a power cut some file systems leave zeros.
    return found.startswith(start) or start.startswith(found.rstrip(b"\0"))


def _check_header(path: Path, form: Format) -> None:
    """Raises an NLAError if a file is another one: nothing of that is cut off."""
    with writing(path), open_regular(path) as file:
        first = file.readline(_LONGEST_HEADER)
    with damaged(path, 1):
        form.check(json.loads(first.decode("utf-8", "surrogatepass")))


@contextlib.contextmanager
def damaged(path: str | Path, number: int) -> Iterator[None]:
    """Names the line at which what is read is not what was written."""
    try:
        yield
    # Whatever is in the file: JSON of another kind gives any of these.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NLAError(f"{path} is damaged at line {number}: {error}") from error
