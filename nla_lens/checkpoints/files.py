"""One half's files on this machine: a directory, or a folder of a Hugging Face hub repository."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from nla_lens.checkpoints import hub
from nla_lens.checkpoints.bases import Base, Neighbourhood, find_base
from nla_lens.checkpoints.folders import (
    Name,
    Place,
    as_path,
    hub_folders,
    pick_local,
    pick_on_hub,
)
from nla_lens.checkpoints.hub import HubFolder
from nla_lens.checkpoints.layout import (
    CALIBRATION_NAME,
    HEAD_NAME,
    MODEL_CONFIG,
    files_below,
    join,
    parent,
)
from nla_lens.checkpoints.needed import (
    TOKENIZER_FILES,
    WEIGHTS,
    files_of,
    matching,
    templates_of,
)
from nla_lens.checkpoints.sidecar import SIDECAR_NAME, Role, Sidecar, read_sidecar
from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError
from nla_lens.models.lora import CONFIG_NAME, named_base
from nla_lens.models.tokenizer_names import TEMPLATE_NAME, TOKENIZER_NAMES

_MOST_UPWARD: Final = 2


@dataclass(frozen=True)
class Checkpoint:
    """One half on disk.

    Attributes:
        name: What the caller called it.
        path: Its directory.
        revision: Branch, tag or commit of a hub repository, where one was asked for.
        root: The directory of its repository: what `path` lacks may lie there.
        base: Of an adapter: the model it goes onto, a directory or a hub repository.
        base_said: Which file names which base, in one line.
    """

    name: str
    path: Path
    revision: str | None = None
    root: Path | None = None
    base: str | None = None
    base_said: str = ""

    @cached_property
    def sidecar(self) -> Sidecar:
        """The parsed `nla_meta.yaml`, its own or the nearest one above it."""
        return read_sidecar(self.nearest(SIDECAR_NAME) or self.path)

    @property
    def sidecar_path(self) -> Path | None:
        """Its own sidecar, or the nearest one above it."""
        home = self.nearest(SIDECAR_NAME)
        return None if home is None else home / SIDECAR_NAME

    @property
    def calibration_path(self) -> Path | None:
        """`nla_calibration.json`, its own or the nearest one above it."""
        home = self.nearest(CALIBRATION_NAME)
        return None if home is None else home / CALIBRATION_NAME

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json; the nested text config where the model is a multimodal wrapper.

        Empty for a LoRA adapter, which comes without one.
        """
        path = self.path / MODEL_CONFIG
        if self.is_adapter and not path.is_file():
            return {}
        config = read_json(path)
        nested = config.get("text_config")
        return nested if isinstance(nested, Mapping) else config

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter and not a full model."""
        return (self.path / CONFIG_NAME).is_file()

    @property
    def tokenizer_path(self) -> str:
        """Where its tokenizer is: beside it, above it in its repository, or with its base."""
        found = self.nearest(*TOKENIZER_NAMES)
        return str(found or self.base or self.path)

    def check_role(self, role: Role) -> None:
        """Refuses an AR where an AV belongs, and the other way round.

        Raises:
            NLAError: Its own sidecar, or a value head beside it, says it is the other half.
        """
        found, by = self.sidecar.role, f"role in {self.sidecar.path}"
        if self.sidecar.path.parent != self.path:
            # One sidecar for both halves says of neither which it is.
            found = None
        if found is None and (self.path / HEAD_NAME).is_file():
            found, by = "ar", f"it has a {HEAD_NAME}"
        if found is not None and found != role:
            what = {"av": "a verbalizer (AV)", "ar": "a reconstructor (AR)"}
            raise NLAError(
                f"{self.name} is {what[found]}, not {what[role]} ({by}); pass it as {found}="
            )

    def nearest(self, *names: str) -> Path | None:
        """Its own directory or the nearest one above it, up to the root, with one of these."""
        homes = [self.path]
        while self.root is not None and homes[-1] != self.root and homes[-1].parent != homes[-1]:
            homes.append(homes[-1].parent)
        return next((home for home in homes if any((home / n).is_file() for n in names)), None)


def open_checkpoint(
    name: Name,
    *,
    role: Role | None = None,
    revision: str | None = None,
    weights: bool = True,
    foreign_code: bool = False,
    base: str | Path | None = None,
) -> Checkpoint:
    """Makes the files of one half available on this machine.

    Args:
        name: A directory, or a hub repository `owner/name` or a folder of one.
        role: Which half is meant, where the name is that of a repository with both.
        revision: Branch, tag or commit on the hub.
        weights: Download the weights, too; without them only the small files are fetched.
        foreign_code: Download Python files, too (`trust_remote_code`).
        base: The model an adapter goes onto, instead of what adapter_config.json says.

    Raises:
        NLAError: Neither a directory nor a repository that can be had; or an adapter whose base
            is not known.
    """
    place = name if isinstance(name, Place) else Place(as_path(name), "")
    # Not Path.is_dir, which raises on a name too long to be a file's.
    if os.path.isdir(place.root):
        bare = not isinstance(name, Place)
        opened, found = _open_local(str(name), place, role, bare=bare, given=base is not None)
    else:
        named = HubFolder.parse(str(name))
        if named is None:
            raise NLAError(
                f"no checkpoint {str(name)!r:.200}: not a directory here, and not a hub repository "
                "(owner/name, or owner/name/folder)"
            )
        patterns = (*(WEIGHTS if weights else ()), *(("*.py",) if foreign_code else ()))
        opened, found = _open_hub(named, role, revision, patterns, given=base is not None)
    if base is not None and opened.is_adapter:
        return replace(opened, base=_given_base(base, weights), base_said=f"base={str(base)!r}")
    return replace(opened, base=found.where, base_said=found.said) if found else opened


def _given_base(base: str | Path, weights: bool) -> str:
    """A base that the caller names: a directory, a repository, or a folder of one."""
    if os.path.isdir(as_path(base)):
        return str(as_path(base))
    named = HubFolder.parse(str(base))
    if named is None:
        raise NLAError(
            f"base={str(base)!r:.200} is neither a directory here nor a hub repository "
            "(owner/name, or owner/name/folder)"
        )
    if not named.folder:
        return named.repo
    listing = hub.list_files(named.repo, None)
    wanted = files_of(named.folder, listing.files, WEIGHTS if weights else ())
    if join(named.folder, MODEL_CONFIG) not in wanted:
        raise NLAError(f"base={str(base)!r}: {named.repo} has no model in {named.folder!r}")
    return str(hub.download(named.repo, None, wanted) / named.folder)


# --- on this machine ------------------------------------------------------------------------------


def _open_local(
    name: str, place: Place, role: Role | None, *, bare: bool, given: bool
) -> tuple[Checkpoint, Base | None]:
    root, folder = place
    path = root / folder
    if bare and role is not None and not _is_half(path):
        folder = pick_local(root, role) or ""
        path = root / folder
    elif bare:
        path = Path(os.path.abspath(path))
        root = _home_of(path)
        folder = _relative(path, root)
    opened = Checkpoint(name if not folder or bare else str(path), path, None, root)
    named = None if given else named_base(path)
    if named is None:
        return opened, None
    around = Neighbourhood(
        str(root),
        folder,
        frozenset()
        if os.path.isabs(named) and os.path.isdir(named)
        else frozenset(files_below(root)),
        disk=root,
        source_model=lambda: opened.sidecar.source_model,
    )
    base = find_base(named, around)
    return opened, replace(base, where=str(root / base.where)) if base.is_inside else base


def _is_half(path: Path) -> bool:
    return any((path / name).is_file() for name in (MODEL_CONFIG, CONFIG_NAME))


def _relative(path: Path, root: Path) -> str:
    """A folder's path in its repository, "" for the repository itself."""
    relative = path.relative_to(root).as_posix()
    return "" if relative == "." else relative


def _home_of(path: Path) -> Path:
    """The directory with the sidecar of a half named by itself: its own, or one a little above."""
    around = (path, *list(path.parents)[:_MOST_UPWARD]) if _is_half(path) else ()
    return next((home for home in around if (home / SIDECAR_NAME).is_file()), path)


# --- on the hub -----------------------------------------------------------------------------------


def _open_hub(
    named: HubFolder,
    role: Role | None,
    revision: str | None,
    patterns: tuple[str, ...],
    *,
    given: bool,
) -> tuple[Checkpoint, Base | None]:
    repo, folder = named.repo, named.folder
    listing = hub.list_files(repo, revision)
    files = listing.files
    if not hub.inside(files, folder):
        there = sorted({parent(f) for f in files} - {""})
        raise NLAError(f"{repo} has no folder {folder!r}; it has {there[:20]}")
    is_half = any(join(folder, n) in files for n in (MODEL_CONFIG, CONFIG_NAME))
    if role is not None and not folder and not is_half:
        folder = pick_on_hub(repo, revision, role, *hub_folders(repo, revision)) or ""
    wanted = files_of(folder, files, patterns)
    for name in (SIDECAR_NAME, CALIBRATION_NAME, TEMPLATE_NAME):
        home = hub.nearest(files, folder, name)
        if home is not None:
            wanted.add(join(home, name))
    tokenizer = hub.nearest(files, folder, *TOKENIZER_NAMES)
    if tokenizer not in (None, folder):
        wanted |= matching(tokenizer, files, TOKENIZER_FILES) | templates_of(tokenizer, files)
    root = hub.download(repo, revision, wanted)
    opened = Checkpoint(join(repo, folder), root / folder, revision, root)
    _fetch_mean(opened, root, repo, revision, files)
    found = None if given else named_base(opened.path)
    if found is None:
        return opened, None
    around = Neighbourhood(
        repo, folder, files, repo=repo, source_model=lambda: opened.sidecar.source_model
    )
    base = find_base(found, around)
    if not base.is_inside:
        return opened, base
    inside = files_of(base.where, files, patterns)
    # Once more what is there already: the snapshot must be the one of the adapter.
    root = hub.download(repo, revision, wanted | inside)
    opened = replace(opened, path=root / folder, root=root)
    return opened, replace(base, where=str(root / base.where))


def _fetch_mean(
    opened: Checkpoint, root: Path, repo: str, revision: str | None, files: frozenset[str]
) -> None:
    """Fetches the mean that a sidecar names, which lies beside it."""
    path = opened.sidecar_path
    mean = opened.sidecar.centre_mean if path else None
    if path is None or mean is None:
        return
    beside = join(_relative(path.parent, root), mean)
    if beside in files:
        hub.download(repo, revision, [beside])
