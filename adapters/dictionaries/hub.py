"""A dictionary on the hub: the list of files first, then the config, and the weights alone last.

Suites have hundreds of dictionaries in one repository, of a gigabyte each: nothing large is fetched
to be refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nla_lens.adapters.dictionaries.files import Files, read_json
from nla_lens.adapters.dictionaries.formats import Format, format_of
from nla_lens.adapters.dictionaries.locate import INDEX, locate
from nla_lens.adapters.dictionaries.tensor_files import shard_names
from nla_lens.errors import NLAError
from nla_lens.foreign import harmless

_LARGE: Final = 256 << 20
"""Bytes of weights that are not fetched to find out what they are."""
_LONGEST_JSON: Final = 64 << 20


@dataclass(frozen=True)
class Repository:
    """What is on the hub, at one commit.

    Attributes:
        name: `owner/name`.
        revision: As it was asked for: what is fetched by it is found by it without a network.
        commit: What that was.
        sizes: Bytes of each file, by its path; None where the hub does not say.
    """

    name: str
    revision: str | None
    commit: str
    sizes: Mapping[str, int | None]

    def fetch(self, path: str) -> Path:
        """Downloads one file.

        Raises:
            NLAError: The hub does not give it.
        """
        from huggingface_hub import hf_hub_download

        try:
            found = Path(hf_hub_download(self.name, path, revision=self.revision))
        except Exception as error:
            raise not_fetched(f"{path} of {self.name}", error) from error
        # Of the snapshot's folder.
        if self.commit not in found.parts:
            raise NLAError(f"{self.name} changed while it was fetched; try again")
        return found


def not_fetched(what: str, error: Exception) -> NLAError:
    """What the hub's client says, with the remedy; its own errors are of several libraries."""
    reason = harmless(" ".join(str(error).split())[:300])
    return NLAError(
        f"{harmless(what)} cannot be fetched from the hub ({type(error).__name__}: {reason}); "
        "check the name, the network and, for gated repositories, `hf auth login`"
    )


def open_repository(name: str, revision: str | None) -> Repository | Path:
    """A repository's list of files; without a network, the folder of what was fetched before.

    Raises:
        NLAError: No such repository, and nothing of it here.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    try:
        info = api.repo_info(name, revision=revision)
        tree = api.list_repo_tree(name, recursive=True, revision=info.sha)
        sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
        return Repository(name, revision, str(info.sha), sizes)
    except (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    ) as error:
        raise not_fetched(name, error) from error
    # Offline, or any of the errors of the hub's HTTP libraries.
    except Exception as error:
        return _fetched_before(name, revision, error)


def _fetched_before(name: str, revision: str | None, error: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        none: list[str] = []
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=none, local_files_only=True)
        )
    except Exception:
        raise not_fetched(name, error) from error


def fetch_dictionary(
    repository: Repository, wanted: str, name: str, format: Format | None
) -> Files:
    """Fetches one dictionary's files.

    Args:
        repository: Where.
        wanted: A folder or file in it; "" is the repository.
        name: What messages call it.
        format: As the caller names it.

    Raises:
        NLAError: None or several there, or what its config refuses.
    """
    found = locate(repository.sizes, repository.name, wanted)
    config: Mapping[str, Any] = {}
    if found.config is not None:
        _check_small(repository, found.config)
        config = read_json(repository.fetch(found.config))
    # Not there yet: names and config are all that is looked at.
    planned = Path(name) / Path(found.weights).name
    folder = Path(repository.name) / Path(found.weights).parent
    files = Files(folder, name, folder / planned.name, config)
    known = format or format_of(files)
    if known is not None:
        known.refuse(files)
    shards = []
    if found.weights.endswith(INDEX):
        _check_small(repository, found.weights)
        index = repository.fetch(found.weights)
        there = Path(found.weights).parent
        shards = [
            (there / shard).as_posix()
            for shard in set(shard_names(index, read_json(index)).values())
        ]
    size = sum(repository.sizes.get(path) or 0 for path in (found.weights, *shards))
    if known is None and size > _LARGE and not _is_named(files):
        raise NLAError(
            f"{found.weights} of {repository.name} has {size / 1e9:.1f} GB, and nothing says that "
            "it is a dictionary of a known format; say which with format="
        )
    for shard in shards:
        repository.fetch(shard)
    weights = repository.fetch(found.weights)
    return Files(weights.parent, name, weights, config)


def _is_named(files: Files) -> bool:
    """Whether the name alone is that of a dictionary."""
    from nla_lens.adapters.dictionaries.linear_files import is_qresearch

    return is_qresearch(files) or files.weights.name == "ae.pt"


def _check_small(repository: Repository, path: str) -> None:
    size = repository.sizes.get(path) or 0
    if size > _LONGEST_JSON:
        raise NLAError(f"{path} of {repository.name} has {size} bytes: no config of a dictionary")
