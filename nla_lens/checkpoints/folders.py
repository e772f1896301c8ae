"""The halves in a directory or repository: from its files to the folder that is meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from nla_lens.checkpoints import hub
from nla_lens.checkpoints.bases import Neighbourhood, find_base, folder_named
from nla_lens.checkpoints.layout import Folder, files_below, find_folders, join, pick
from nla_lens.checkpoints.sidecar import SIDECAR_NAME, Role, read_sidecar
from nla_lens.checks import to_path
from nla_lens.errors import NLAError
from nla_lens.models.lora import CONFIG_NAME, named_base


class Place(NamedTuple):
    """A folder of a directory on this machine; the sidecar may lie in any between the two."""

    root: Path
    folder: str

    def __str__(self) -> str:
        return str(self.root / self.folder)


Name: TypeAlias = str | Path | Place


def as_path(name: str | Path) -> Path:
    """A name as a path of this machine."""
    return to_path(name)


def local_folders(root: Path) -> tuple[list[Folder], Neighbourhood]:
    """The models in a directory."""
    files = frozenset(files_below(root))
    folders = find_folders(files, lambda folder: read_sidecar(root / folder).role)
    if SIDECAR_NAME not in files:
        # A folder of checkpoints, and no repository: NAME-av and NAME-ar are a pair by their stem.
        folders = [f for f in folders if not f.path.endswith(("-av", "-ar"))]
    return folders, Neighbourhood(str(root), "", files, disk=root)


def pick_local(root: Path, role: Role) -> str | None:
    """The folder of a directory that is a half; see `layout.pick`."""
    folders, around = local_folders(root)
    return pick(str(root), folders, role, _reads_base(around, lambda f: root / f.path))


def hub_folders(repo: str, revision: str | None) -> tuple[list[Folder], Neighbourhood]:
    """The models in a repository; of the files, at most sidecars are fetched."""
    files = hub.list_files(repo, revision).files

    def role_in(folder: str) -> Role | None:
        name = join(folder, SIDECAR_NAME)
        return read_sidecar((hub.download(repo, revision, [name]) / name).parent).role

    return find_folders(files, role_in), Neighbourhood(repo, "", files, repo=repo)


def pick_on_hub(
    repo: str,
    revision: str | None,
    role: Role,
    folders: list[Folder],
    around: Neighbourhood,
    scope: str = "",
) -> str | None:
    """The folder of a repository that is a half; see `layout.pick`."""

    def path_of(folder: Folder) -> Path:
        wanted = join(folder.path, CONFIG_NAME)
        return (hub.download(repo, revision, [wanted]) / wanted).parent

    return pick(repo, folders, role, _reads_base(around, path_of), scope)


def _reads_base(
    around: Neighbourhood, path_of: Callable[[Folder], Path]
) -> Callable[[Folder], str | None]:
    """A function that reads which folder of its repository an adapter goes onto."""

    def base_of(folder: Folder) -> str | None:
        named = named_base(path_of(folder))
        if named is None:
            return None
        there = replace(around, folder=folder.path)
        inside = folder_named(named, there)
        if inside is not None:
            return inside
        try:
            found = find_base(named, there)
        except NLAError:
            return None
        return found.where if found.is_inside else None

    return base_of
