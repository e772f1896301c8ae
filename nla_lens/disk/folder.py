"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from nla_lens.checks import to_path
from nla_lens.disk.writing import writing
from nla_lens.errors import NLAError


def write_folder(
    directory: str | Path,
    fill: Callable[[Path], Any],
    *,
    ours: Collection[str],
    overwrite: bool = False,
) -> Path:
    """Writes a directory beside its place and moves it there when it is complete.

    Args:
        directory: Where; it may be empty or not there.
        fill: Writes into the directory it is given.
        ours: Names of what an earlier call wrote: a directory with nothing else is replaced.
        overwrite: Replace any directory, with all that is in it.

    Returns:
        The path.

    Raises:
        NLAError: Something else is there, or it cannot be written; what was there before still is.
    """
    path = Path(os.path.abspath(to_path(directory)))
    _check_free(path, ours, overwrite)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.parent / f".nla-lens-{secrets.token_hex(8)}.partial"
        made.mkdir()
        try:
            fill(made)
            _settle(made)
            _move(made, path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return path


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a while, gone afterwards.

    Raises:
        NLAError: None can be made.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="nla-lens-", ignore_cleanup_errors=True)
    except OSError as error:
        raise NLAError(
            f"no temporary folder can be made ({error}); set TMPDIR to one that can be written"
        ) from error
    with made as folder:
        yield Path(folder)


def _check_free(path: Path, ours: Collection[str], overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise NLAError(f"{path} is there already, and no directory: name another place")
    foreign = sorted(set(os.listdir(path)) - set(ours))
    if foreign and not overwrite:
        raise NLAError(
            f"{path} is not empty, and holds what nla_lens did not write: {foreign[:5]}; name "
            "another directory, or pass overwrite=True to lose what is in it"
        )


def _settle(made: Path) -> None:
    """The usual permissions for every file (safetensors' are 0600), and all of it on the disk."""
    usual = stat.S_IMODE(os.stat(made).st_mode) & 0o666
    for path in made.rglob("*"):
        if path.is_file():
            os.chmod(path, usual)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _move(made: Path, path: Path) -> None:
    """Puts one directory in the place of another; in no moment is neither there in full."""
    aside = None
    if path.is_dir():
        aside = path.parent / f".nla-lens-{secrets.token_hex(8)}.old"
        os.rename(path, aside)
    try:
        os.rename(made, path)
    except BaseException:
        if aside is not None:
            with contextlib.suppress(OSError):
                os.rename(aside, path)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
