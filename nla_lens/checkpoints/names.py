"""From what a caller writes to the two halves that are meant."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nla_lens.checkpoints import hub
from nla_lens.checkpoints.folders import (
    Name,
    Place,
    as_path,
    hub_folders,
    pick_local,
    pick_on_hub,
)
from nla_lens.checkpoints.hub import HubFolder
from nla_lens.checkpoints.layout import join
from nla_lens.checkpoints.releases import SMOL_DIR, TINY_DIR, find_release
from nla_lens.checkpoints.sidecar import SIDECAR_NAME
from nla_lens.checks import to_path
from nla_lens.errors import NLAError

_EMBEDDED: Final = {
    "smol": (SMOL_DIR / "av", SMOL_DIR / "ar"),
    "tiny": (TINY_DIR / "av", TINY_DIR / "ar"),
    "tiny-norm-matched": (TINY_DIR / "av_norm_matched", TINY_DIR / "ar"),
}


def name_halves(
    name: str | Path | None,
    av: str | Path | None,
    ar: str | Path | None,
    *,
    subfolder: str | Mapping[str, str] | None = None,
    revision: str | None = None,
) -> tuple[Name, Name | None]:
    """The two halves a caller means.

    Args:
        name: A pair, or a verbalizer alone; see `find_pair`.
        av: Instead of it, the verbalizer.
        ar: The reconstructor; also overrides the one `name` stands for.
        subfolder: The folder in what is named: one for all, or {"av": ..., "ar": ...}.
        revision: Branch, tag or commit on the hub.

    Raises:
        NLAError: No verbalizer is named, or two are; or it is not clear which folder is meant.
    """
    for given in (name, av, ar):
        if given is not None and not isinstance(given, (str, os.PathLike)):
            raise NLAError(f"a checkpoint is a name or a directory, found {given!r:.80}")
        if isinstance(given, str) and not given.strip():
            # To pathlib it is the working directory, whatever is there.
            raise NLAError(f"{given!r:.80} names no checkpoint; pass None for none")
    name, av, ar = (g if g is None or isinstance(g, str) else to_path(g) for g in (name, av, ar))
    if name is not None and av is not None:
        raise NLAError(f"two verbalizers are named: {str(name)!r} and av={str(av)!r}")
    folders = _per_half(subfolder)
    if av is not None:
        return _under(av, folders["av"]), None if ar is None else _under(ar, folders["ar"])
    if name is None:
        raise NLAError('name a pair, as in from_pretrained("tiny"), or a verbalizer with av=')
    if isinstance(subfolder, Mapping):
        found_av: Name | None = _under(name, folders["av"]) if folders["av"] else None
        found_ar: Name | None = _under(name, folders["ar"]) if folders["ar"] else None
        if found_av is None:
            found_av = find_pair(str(name), revision=revision)[0]
    else:
        found_av, found_ar = find_pair(str(_under(name, subfolder)), revision=revision)
    return found_av, ar if ar is not None else found_ar


def _per_half(subfolder: Any) -> dict[str, str | None]:
    if subfolder is None or isinstance(subfolder, str):
        return {"av": subfolder, "ar": subfolder}
    if not isinstance(subfolder, Mapping) or set(subfolder) - {"av", "ar"}:
        raise NLAError(
            f'subfolder={subfolder!r:.80} must be a folder, or {{"av": FOLDER, "ar": FOLDER}}'
        )
    return {half: subfolder.get(half) for half in ("av", "ar")}


def _under(name: str | Path, folder: str | None) -> Name:
    if folder is None:
        return name
    parts = folder.strip("/").split("/") if isinstance(folder, str) else [""]
    if not all(parts) or set(parts) & {".", ".."}:
        raise NLAError(f"subfolder={folder!r:.80} must be a folder in the repository, as in 'av'")
    if os.path.isdir(as_path(name)):
        return Place(as_path(name), "/".join(parts))
    return join(str(name), "/".join(parts))


def find_pair(name: str, *, revision: str | None = None) -> tuple[Name, Name | None]:
    """The AV and, where there is one, the AR that a single name stands for.

    Accepts an embedded pair, the stem of a pair (`NAME-av` and `NAME-ar`, on disk or on the hub), a
    directory or repository with both halves in it, a folder of one, or a verbalizer alone.

    Raises:
        NLAError: Nothing of that name; or more than one folder could be meant.
    """
    if name in _EMBEDDED:
        return _EMBEDDED[name]
    local = as_path(name)
    if os.path.isdir(local):
        return _in_directory(name, local)
    beside = Path(f"{local}-av"), Path(f"{local}-ar")
    if os.path.isdir(beside[0]):
        return beside[0], beside[1] if os.path.isdir(beside[1]) else None
    release = find_release(name)
    if release is not None and name == release.stem:
        return release.av, release.ar
    if release is not None and name == release.ar:
        raise NLAError(f"{name} is a reconstructor (AR); name the pair, {release.stem!r}, or av=")
    named = HubFolder.parse(name)
    if named is None:
        tried = f"{name}-av" if name.startswith(".") else name
        raise NLAError(
            f"no checkpoint {tried!r:.200}: not one of the embedded {sorted(_EMBEDDED)}, no "
            "directory here (nor with -av), and not a hub repository (owner/name)"
        )
    if not named.folder and (name.endswith("-av") or (release and name == release.av)):
        return name, None
    return _in_repository(name, named, revision)


def _in_directory(name: str, local: Path) -> tuple[Name, Name | None]:
    av = None if not name else pick_local(local, "av")
    if av is not None:
        ar = pick_local(local, "ar")
        return Place(local, av) if av else local, None if ar is None else Place(local, ar)
    if os.path.isfile(local / SIDECAR_NAME):
        return local, None
    beside = Path(f"{local}-av"), Path(f"{local}-ar")
    if os.path.isdir(beside[0]):
        return beside[0], beside[1] if os.path.isdir(beside[1]) else None
    hidden = ""
    if HubFolder.parse(name) is not None:
        hidden = (
            f'; the hub repository of this name is not looked at while it is here: "hf://{name}"'
        )
    raise NLAError(
        f"{local} has neither {SIDECAR_NAME} nor av/ and ar/, and there is no {local}-av: "
        f"name a verbalizer's directory, or the stem of a pair{hidden}"
    )


def _in_repository(name: str, named: HubFolder, revision: str | None) -> tuple[Name, Name | None]:
    try:
        folders, around = hub_folders(named.repo, revision)
    except hub.NotOnHub as error:
        if named.folder:
            raise NLAError(
                f"no checkpoint {name!r:.200}: not a directory here, and not a hub repository that "
                f"can be had: {error}"
            ) from error
        if not error.is_absent:
            raise
        return f"{name}-av", f"{name}-ar"
    scope = named.folder
    if any(f.path == scope for f in folders if scope) or not hub.inside(around.files, scope):
        return name, None
    av = pick_on_hub(named.repo, revision, "av", folders, around, scope)
    if av is not None:
        ar = pick_on_hub(named.repo, revision, "ar", folders, around, scope)
        return join(named.repo, av), None if ar is None else join(named.repo, ar)
    if any(not f.path for f in folders):
        # No half by any sign of the names: its sidecar has the last word.
        return named.repo, None
    there = ", ".join(repr(f.path) for f in folders[:20]) or "no model at all"
    raise NLAError(
        f"which folder of {name} is the verbalizer is not clear (it has {there}); say it: "
        f'NLA.from_pretrained(av="{named.repo}/FOLDER", ar="{named.repo}/FOLDER")'
    )
