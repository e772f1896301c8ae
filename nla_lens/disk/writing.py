"""The one writer of files: whole or not at all, and one process at a time where a file grows.

A power cut, a full disk or a kill in any moment leaves what was there before, or what was to be
there; nothing in between, and no half of another saver's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nla_lens.checks import to_path
from nla_lens.errors import NLAError


def write_whole(path: str | Path, content: str | bytes | Callable[[IO[bytes]], Any]) -> Path:
    """Writes a file that appears whole, with the content on the disk, or not at all.

    Args:
        path: The file; where it is a link, what it points to.
        content: Text, written as UTF-8 (half of a surrogate pair is escaped with a backslash);
            bytes; or what writes them into a file it is given.

    Returns:
        The path.

    Raises:
        NLAError: It cannot be written; names the file. What was there before still is.
    """
    path = to_path(path)
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with writing(path):
        target = os.path.realpath(path)
        if os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode):
            # A terminal or pipe; of a directory this raises.
            with open(target, "wb") as file:
                _put(file, content)
            return path
        # A name of its own, beside the target: two savers never share one.
        partial = os.path.join(os.path.dirname(target), f".nla-lens-{secrets.token_hex(8)}.partial")
        try:
            with _new(partial) as file:
                _put(file, content)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.chmod(partial, stat.S_IMODE(os.stat(target).st_mode))
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        _sync_folder(os.path.dirname(target))
    return path


def _new(path: str) -> IO[bytes]:
    return open(path, "xb")


def _put(file: IO[bytes], content: bytes | Callable[[IO[bytes]], Any]) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content)


def _sync_folder(folder: str) -> None:
    """Puts a new name on the disk, where the file system can."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def make_folder(path: str | Path) -> Path:
    """A folder, made where it is not there, with those above it.

    Raises:
        NLAError: It cannot be made.
    """
    path = to_path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Says which file could not be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, NLAError):
            raise
        # ValueError: a name with a NUL in it.
        raise NLAError(f"{path} cannot be written: {error}{_advice(error)}") from error


def _advice(error: Exception) -> str:
    code = getattr(error, "errno", None)
    if code in (errno.EOPNOTSUPP, errno.ENOLCK):
        return "; its file system locks no files: name a place on another"
    full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "; make room, or name another place" if full else ""


@contextlib.contextmanager
def only_writer(path: str | Path) -> Iterator[None]:
    """While it lasts, nobody else here writes to a file that grows; killed processes let go.

    Raises:
        NLAError: Somebody does.
    """
    import filelock

    with writing(path):
        target = os.path.realpath(path)
        lock = filelock.FileLock(f"{target}.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise NLAError(
                f"{path} is being written by another process or thread: wait until it is done, or "
                "name another file"
            ) from None
    try:
        yield
    finally:
        lock.release()
