"""Which folder of a repository is which half.

Public NLAs come in several layouts: `av/` and `ar/`; `av_rl_lora_step400/` and
`rl_critic_step400/` under one sidecar; `av_base/`, `av_rl_adapters/iter_000300/` and
`ar_reconstructor/`. What counts, in this order: a value head makes a reconstructor, then the
folder's name, then the role in its own sidecar (which has to be fetched first;
`Checkpoint.check_role` holds it against the name later). Where more than one folder is left, the
caller is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nla_lens.checkpoints.sidecar import SIDECAR_NAME, Role
from nla_lens.errors import NLAError
from nla_lens.models.lora import CONFIG_NAME

HEAD_NAME: Final = "value_head.safetensors"
MODEL_CONFIG: Final = "config.json"
CALIBRATION_NAME: Final = "nla_calibration.json"
_DEEPEST: Final = 2
"""Folders under folders that are looked at; deeper ones have to be named."""
_MOST_FILES: Final = 20_000
_WORDS: Final[dict[Role, frozenset[str]]] = {
    "av": frozenset({"av", "actor", "verbalizer", "verbaliser"}),
    "ar": frozenset({"ar", "critic", "reconstructor"}),
}
_WHAT: Final[dict[Role, str]] = {"av": "verbalizers (AV)", "ar": "reconstructors (AR)"}
_STEP: Final = re.compile(r"(checkpoint|global_?step|step|iter|epoch)[-_]?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Folder:
    """A folder that holds a model or an adapter.

    Attributes:
        path: Relative to the repository, with "/"; "" is the repository itself.
        is_adapter: A PEFT adapter and not a full model.
        role: Which half it is; None where nothing tells.
        named: The role is what its name says, and not a file in it.
    """

    path: str
    is_adapter: bool
    role: Role | None
    named: bool = False


def parent(path: str) -> str:
    """The folder of a path with "/"; "" at the top."""
    return path.rpartition("/")[0]


def join(folder: str, name: str) -> str:
    """A path with "/" under a folder; either may be ""."""
    return "/".join(part for part in (folder, name) if part)


def upward(folder: str) -> Iterator[str]:
    """A folder and those it lies in, the repository itself last."""
    while folder:
        yield folder
        folder = parent(folder)
    yield ""


def files_below(root: Path) -> list[str]:
    """The files of a directory, as a hub lists those of a repository, as deep as halves lie."""
    found: list[str] = []
    for directory, folders, files in os.walk(root):
        relative = Path(directory).relative_to(root).as_posix()
        folder = "" if relative == "." else relative
        found += [join(folder, name) for name in files]
        if folder.count("/") + bool(folder) >= _DEEPEST or len(found) > _MOST_FILES:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return found


def find_folders(files: Iterable[str], role_in: Callable[[str], Role | None]) -> list[Folder]:
    """Every folder with a model or an adapter in it.

    Args:
        files: Paths in the repository.
        role_in: Reads the role out of a folder's own sidecar; asked only where files are silent.
    """
    there = set(files)
    homes = sorted({parent(f) for f in there if f.split("/")[-1] in (MODEL_CONFIG, CONFIG_NAME)})
    return [
        _folder(path, there, role_in)
        for path in homes
        if path.count("/") + bool(path) <= _DEEPEST and not path.startswith(".")
    ]


def _folder(path: str, there: set[str], role_in: Callable[[str], Role | None]) -> Folder:
    is_adapter = join(path, CONFIG_NAME) in there
    if join(path, HEAD_NAME) in there:
        return Folder(path, is_adapter, "ar")
    name = role_by_name(path)
    if name is None and join(path, SIDECAR_NAME) in there:
        # A data set's sidecar names no role: beside a model without a value head it is an AV's.
        return Folder(path, is_adapter, role_in(path) or "av")
    return Folder(path, is_adapter, name, named=name is not None)


def role_by_name(path: str) -> Role | None:
    """What a folder's name says it is, the innermost folder that says something first."""
    for part in reversed(path.split("/")):
        words = set(re.split(r"[^a-z]+", part.lower()))
        fitting = [role for role, known in _WORDS.items() if words & known]
        if len(fitting) == 1:
            return fitting[0]
    return None


def pick(
    name: str,
    folders: Sequence[Folder],
    role: Role,
    base_of: Callable[[Folder], str | None],
    scope: str = "",
) -> str | None:
    """The one folder that is a half; None where there is none.

    Args:
        name: The repository, for messages.
        folders: What `find_folders` found.
        role: Which half.
        base_of: The folder of the repository that an adapter there goes onto, if it is one.
        scope: Only what lies in this folder.

    Raises:
        NLAError: More than one; names them, and the call that picks one.
    """
    fitting = [f for f in folders if f.role == role and scope in {"", *upward(f.path)}]
    exact = [f for f in fitting if f.path == join(scope, role)]
    if exact:
        return exact[0].path
    fitting = [f for f in fitting if not _is_leftover(f, fitting)]
    fitting = _without_base(fitting, base_of)
    at_root = [f for f in fitting if not f.path]
    if at_root and not any(f.named for f in fitting):
        return ""
    if len(fitting) > 1:
        raise _ambiguous(name, folders, fitting, role)
    return fitting[0].path if fitting else None


def _is_leftover(folder: Folder, fitting: Sequence[Folder]) -> bool:
    """Whether it is a step of the training of another one that it lies in."""
    if not _STEP.fullmatch(folder.path.rpartition("/")[2]):
        return False
    outer = set(upward(parent(folder.path)))
    return any(f.path in outer for f in fitting if f.path and f.is_adapter == folder.is_adapter)


def _without_base(fitting: list[Folder], base_of: Callable[[Folder], str | None]) -> list[Folder]:
    """Leaves out the full model that the one adapter beside it goes onto."""
    adapters = [f for f in fitting if f.is_adapter]
    if len(adapters) != 1 or len(fitting) == 1:
        return fitting
    base = base_of(adapters[0])
    return [f for f in fitting if f.is_adapter or f.path != base]


def is_base(path: str) -> bool:
    """Whether a folder's name says that adapters go onto what is in it."""
    return "base" in re.split(r"[^a-z]+", path.rpartition("/")[2].lower())


def _ambiguous(
    name: str, folders: Sequence[Folder], fitting: Sequence[Folder], role: Role
) -> NLAError:
    other: Role = "ar" if role == "av" else "av"
    there = [f.path for f in folders if f.role == other]
    call = f'{role}="{join(name, fitting[-1].path)}"'
    if there:
        pair = f'{other}="{join(name, there[-1])}"'
        call = f"{call}, {pair}" if role == "av" else f"{pair}, {call}"
    listed = ", ".join(repr(f.path or ".") for f in fitting[:20])
    return NLAError(
        f"{name} holds {len(fitting)} {_WHAT[role]}: {listed}; say which one is meant: "
        f"NLA.from_pretrained({call})"
    )
