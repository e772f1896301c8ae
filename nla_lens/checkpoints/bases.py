"""What an adapter goes onto: the model its adapter_config.json means, on this machine.

`base_model_name_or_path` is often a path of the machine it was trained on, or relative. It is
sought in the adapter's own repository first, then on this disk, then on the hub; where only its
last part is known from somewhere else, that is said in one line (`nla-lens info` shows it). A base
that nothing points to is never guessed: wrong weights of the right shape write fluent text.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nla_lens.checkpoints.hub import HubFolder
from nla_lens.checkpoints.layout import MODEL_CONFIG, is_base, join, parent
from nla_lens.errors import NLAError
from nla_lens.foreign import harmless
from nla_lens.models.lora import CONFIG_NAME


@dataclass(frozen=True)
class Base:
    """A base that was found.

    Attributes:
        where: A directory or a hub name; with `is_inside`, a folder of the adapter's repository.
        is_inside: It lies in the adapter's own repository.
        said: Which file names which base, in one line.
    """

    where: str
    is_inside: bool
    said: str


@dataclass(frozen=True)
class Neighbourhood:
    """Where an adapter lies.

    Attributes:
        name: The repository or directory, for messages.
        folder: The adapter's folder in it.
        files: The files there.
        disk: The directory, where it is one of this machine.
        repo: The hub's name of it, where it is a repository.
        source_model: The model that the sidecar says is read.
    """

    name: str
    folder: str
    files: frozenset[str]
    disk: Path | None = None
    repo: str | None = None
    source_model: Callable[[], str | None] = lambda: None


def find_base(named: str, around: Neighbourhood) -> Base:
    """Finds the model an adapter's config means.

    Args:
        named: `base_model_name_or_path`.
        around: Where the adapter lies.

    Raises:
        NLAError: Nothing here or on the hub can be meant; names the file, the base and the remedy.
    """
    says = f"{join(around.folder, CONFIG_NAME)} names {harmless(named)[:200]}"
    inside = folder_named(named, around)
    if inside is not None:
        return Base(inside, True, f"{says}: the folder {inside or '.'!r} of {around.name}")
    local = _on_disk(named, around)
    if local is not None:
        return Base(local, False, f"{says}: a directory of this machine")
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", named)
    if cached:
        repo = f"{cached[1]}/{cached[2]}"
        return Base(repo, False, f"{says}: {repo} in a cache of the hub")
    alike = _named_alike(named, around)
    if alike is not None:
        return Base(alike, True, f"{says}, not on this machine: the folder {alike!r} has its name")
    is_path = named.startswith((".", "/", "~", "\\")) or ":" in named
    if not is_path and (HubFolder.parse(named) or re.fullmatch(r"[\w.-]+", named)):
        return Base(named, False, f"{says}: a hub repository")
    source = around.source_model()
    if source and _last(source) == _last(named):
        return Base(source, False, f"{says}, not on this machine: the sidecar's source model")
    beside = [f for f in _models(around) if is_base(f)]
    if len(beside) == 1:
        how = f"the base beside it, {beside[0]!r}"
        return Base(beside[0], True, f"{says}, not on this machine: {how}")
    raise NLAError(
        f"{says}: {harmless(named)[:200]} cannot be loaded, being neither in {around.name} nor on "
        "this machine nor a hub repository; pass base= with a directory or a hub repository "
        "(owner/name)"
    )


def folder_named(named: str, around: Neighbourhood) -> str | None:
    """The folder of the adapter's own repository that a base's name stands for, if it does."""
    repo = around.repo
    if repo is not None and (named == repo or named.startswith(f"{repo}/")):
        return _model_at(posixpath.normpath(named[len(repo) :].lstrip("/") or "."), around)
    if posixpath.isabs(named):
        return None
    # Relative to the adapter, as its author's shell meant it, or to the repository.
    for start in (around.folder, ""):
        found = _model_at(posixpath.normpath(posixpath.join(start or ".", named)), around)
        if found is not None:
            return found
    return None


def _model_at(path: str, around: Neighbourhood) -> str | None:
    folder = "" if path == "." else path
    is_model = join(folder, MODEL_CONFIG) in around.files and folder != around.folder
    return folder if is_model else None


def _on_disk(named: str, around: Neighbourhood) -> str | None:
    homes = [Path(os.path.expanduser(named))]
    if around.disk is not None:
        homes.insert(0, around.disk / around.folder / named)
    return next((os.path.normpath(home) for home in homes if os.path.isdir(home)), None)


def _named_alike(named: str, around: Neighbourhood) -> str | None:
    """The one folder with a full model whose last part is the base's."""
    fitting = [folder for folder in _models(around) if folder and _last(folder) == _last(named)]
    return fitting[0] if len(fitting) == 1 else None


def _models(around: Neighbourhood) -> list[str]:
    """Folders with a full model."""
    homes = {parent(f) for f in around.files if f.rpartition("/")[2] == MODEL_CONFIG}
    return sorted(
        home
        for home in homes
        if join(home, CONFIG_NAME) not in around.files and home != around.folder
    )


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].lower()
