"""The Hugging Face hub: what a repository holds, the files of it that are needed, writing one.

Which files there are is asked first, so that nothing is fetched that is not needed. Without a
network, what was fetched before is what there is.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nla_lens.checkpoints.layout import upward
from nla_lens.errors import NLAError
from nla_lens.foreign import harmless

_PART: Final = re.compile(r"[\w-][\w.-]*")
_LIBRARY: Final = "nla-lens"


@dataclass(frozen=True)
class HubFolder:
    """A folder of a hub repository.

    Attributes:
        repo: `owner/name`.
        folder: Path in it, "" for the repository itself.
    """

    repo: str
    folder: str = ""

    @classmethod
    def parse(cls, name: str) -> HubFolder | None:
        """From `owner/name` or `owner/name/sub/folder`; None where a name cannot be one."""
        parts = name.removeprefix("hf://").split("/")
        if len(parts) < 2 or not all(_PART.fullmatch(part) for part in parts):
            return None
        return cls("/".join(parts[:2]), "/".join(parts[2:]))


@dataclass(frozen=True)
class Listing:
    """What a repository holds.

    Attributes:
        files: Paths, with "/".
        cached: The snapshot on this machine, where the hub was not asked.
    """

    files: frozenset[str]
    cached: Path | None = None


class NotOnHub(NLAError):
    """There is no such repository, or not for this token; or it cannot be reached.

    Attributes:
        is_absent: Another name may do: nothing says that there is such a repository.
    """

    is_absent = True


def list_files(repo: str, revision: str | None) -> Listing:
    """The files of a repository, from the hub or, without a network, from the cache.

    Raises:
        NotOnHub: Neither; says which it was.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi(library_name=_LIBRARY).model_info(repo, revision=revision)
        return Listing(frozenset(f.rfilename for f in info.siblings or ()))
    # huggingface_hub lets through what its HTTP library raises, another one in each major version.
    except Exception as error:
        cached = _cached(repo, revision)
        if cached is None:
            raise refusal(repo, revision, error) from error
        files = (p.relative_to(cached).as_posix() for p in cached.rglob("*") if p.is_file())
        return Listing(frozenset(files), cached)


def download(repo: str, revision: str | None, files: Iterable[str]) -> Path:
    """Fetches files of a repository; those that are there already are not fetched again.

    Returns:
        The snapshot's directory, named after its commit.

    Raises:
        NotOnHub: Not to be had; says why.
    """
    from huggingface_hub import snapshot_download

    wanted = [glob.escape(name) for name in sorted(files)]
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=wanted, library_name=_LIBRARY)
        )
    except Exception as error:
        raise refusal(repo, revision, error) from error


def download_one(repo: str, revision: str | None, file: str) -> Path:
    """Fetches one file.

    Raises:
        NotOnHub: Not to be had; says why.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:
        raise refusal(f"{file} of {repo}", revision, error) from error


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a repository on this machine."""
    from huggingface_hub import snapshot_download

    try:
        # No pattern, no file that could be missing.
        found = snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True)
    except Exception:
        return None
    return Path(found)


def refusal(what: str, revision: str | None, error: Exception) -> NotOnHub:
    """What the hub, or the way to it, said, in our words."""
    from huggingface_hub import errors

    reason = harmless(" ".join(str(error).split()))[:300]
    made = NotOnHub(
        f"{what} cannot be fetched from the hub: {_cause(error, revision)} "
        f"({type(error).__name__}: {reason}); check the name, the network and, for gated models, "
        "`hf auth login`; a verbalizer without a reconstructor is passed as av="
    )
    made.is_absent = not isinstance(error, (errors.GatedRepoError, errors.RevisionNotFoundError))
    return made


def _cause(error: BaseException, revision: str | None) -> str:
    """One clause for what happened; the library wraps the first cause once or twice."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "it is gated, and this token (or none) was not let in: ask for access on its page"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private and no token for it is set (HF_TOKEN)"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it was not fetched before"
    if status in (401, 403):
        return f"the hub refuses this token (HTTP {status})"
    if status == 404:
        return "there is no such file"
    if status is not None and status >= 500:
        return f"the hub is out of order (HTTP {status})"
    if error.__cause__ is not None:
        return _cause(error.__cause__, revision)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the hub cannot be reached, and it was not fetched before"
    return "the hub cannot be reached, or what came was cut off"


def inside(files: Iterable[str], folder: str) -> bool:
    """Whether a repository with these files has such a folder."""
    return not folder or any(name.startswith(f"{folder}/") for name in files)


def nearest(files: frozenset[str], folder: str, *names: str) -> str | None:
    """The folder itself or the nearest one around it that holds one of these files."""
    for home in upward(folder):
        if any((f"{home}/{name}" if home else name) in files for name in names):
            return home
    return None


def check_repo(repo: object) -> None:
    """Refuses what is not the name of a repository.

    Raises:
        NLAError: Not owner/name.
    """
    named = HubFolder.parse(repo) if isinstance(repo, str) else None
    if named is None or named.folder:
        raise NLAError(f"{repo!r:.200} is not the name of a hub repository: owner/name")


def push(
    folder: Path, repo: str, *, token: str | bool | None, private: bool | None, message: str
) -> str:
    """Creates a repository where there is none, and makes its halves those of a folder.

    Returns:
        The address of the commit.

    Raises:
        NLAError: Not allowed, or not reached; says why.
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    api: Any = HfApi(token=token, library_name=_LIBRARY)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        # What an earlier upload left in the halves (another number of shards, say) goes.
        done = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            commit_message=message,
            delete_patterns=["av/*", "ar/*"],
        )
    except Exception as error:
        reason = harmless(" ".join(str(error).split()))[:300]
        raise NLAError(
            f"{repo} cannot be written to on the hub: {_push_cause(error)} "
            f"({type(error).__name__}: {reason}); check the name, the network and the token "
            "(`hf auth login`, or token=): it needs the right to write"
        ) from error
    return str(done.commit_url)


def _push_cause(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the token (or none) may not (HTTP {status})"
    return _cause(error, None)
