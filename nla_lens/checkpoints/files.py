"""From a name to a checkpoint's files: embedded, a local directory, or the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from nla_lens.checkpoints.releases import TINY_DIR, find_release
from nla_lens.checkpoints.sidecar import SIDECAR_NAME, Role, Sidecar, read_sidecar
from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError
from nla_lens.models.lora import CONFIG_NAME

_EMBEDDED: Final = {
    "tiny": (TINY_DIR / "av", TINY_DIR / "ar"),
    "tiny-norm-matched": (TINY_DIR / "av_norm_matched", TINY_DIR / "ar"),
}
_SMALL_FILES: Final = ("*.json", "*.yaml", "*.jinja", "*.txt", "*.model")
_WEIGHTS: Final = ("*.safetensors",)
HEAD_NAME: Final = "value_head.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """One half on disk.

    Attributes:
        name: What the caller called it.
        path: Its directory.
        revision: Branch, tag or commit of a hub repository, where one was asked for.
    """

    name: str
    path: Path
    revision: str | None = None

    @cached_property
    def sidecar(self) -> Sidecar:
        """The parsed `nla_meta.yaml`."""
        return read_sidecar(self.path)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json; the nested text config where the model is a multimodal wrapper.

        Empty for a LoRA adapter, which comes without one.
        """
        path = self.path / "config.json"
        if self.is_adapter and not path.is_file():
            return {}
        config = read_json(path)
        nested = config.get("text_config")
        return nested if isinstance(nested, Mapping) else config

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter and not a full model."""
        return (self.path / CONFIG_NAME).is_file()

    def check_role(self, role: Role) -> None:
        """Refuses an AR where an AV belongs, and the other way round.

        Raises:
            NLAError: The sidecar, or a value head beside it, says it is the other half.
        """
        found, by = self.sidecar.role, f"role in {self.sidecar.path}"
        if found is None and (self.path / HEAD_NAME).is_file():
            found, by = "ar", f"it has a {HEAD_NAME}"
        if found is not None and found != role:
            what = {"av": "a verbalizer (AV)", "ar": "a reconstructor (AR)"}
            raise NLAError(
                f"{self.name} is {what[found]}, not {what[role]} ({by}); pass it as {found}="
            )


def find_pair(name: str) -> tuple[str | Path, str | Path | None]:
    """The AV and, where there is one, the AR that a single name stands for.

    Accepts an embedded pair, the stem of a pair (`NAME-av` and `NAME-ar`, on disk or on the hub), a
    directory with `av/` and `ar/`, or a verbalizer alone.
    """
    if name in _EMBEDDED:
        return _EMBEDDED[name]
    local = _as_path(name)
    if os.path.isfile(local / SIDECAR_NAME):
        return local, None
    for av, ar in ((local / "av", local / "ar"), (Path(f"{local}-av"), Path(f"{local}-ar"))):
        if os.path.isdir(av):
            return av, ar if os.path.isdir(ar) else None
    if os.path.isdir(local):
        raise NLAError(
            f"{local} has neither {SIDECAR_NAME} nor av/ and ar/, and there is no {local}-av: "
            "name a verbalizer's directory, or the stem of a pair"
        )
    release = find_release(name)
    if release is not None and name == release.stem:
        return release.av, release.ar
    if name.endswith("-av") or (release is not None and name == release.av):
        return name, None
    if release is not None and name == release.ar:
        raise NLAError(f"{name} is a reconstructor (AR); name the pair, {release.stem!r}, or av=")
    if name.count("/") != 1:
        raise NLAError(
            f"no checkpoint {name!r:.200}: not one of the embedded {sorted(_EMBEDDED)}, no "
            "directory here (nor with -av), and not a hub repository (owner/name)"
        )
    return f"{name}-av", f"{name}-ar"


def name_halves(
    name: str | Path | None, av: str | Path | None, ar: str | Path | None
) -> tuple[str | Path, str | Path | None]:
    """The two halves a caller means.

    Raises:
        NLAError: No verbalizer is named, or two are.
    """
    for given in (name, av, ar):
        if given is not None and not isinstance(given, (str, Path)):
            raise NLAError(f"a checkpoint is a name or a directory, found {given!r:.80}")
    if name is not None and av is not None:
        raise NLAError(f"two verbalizers are named: {str(name)!r} and av={str(av)!r}")
    if av is not None:
        return av, ar
    if name is None:
        raise NLAError('name a pair, as in from_pretrained("tiny"), or a verbalizer with av=')
    found_av, found_ar = find_pair(str(name))
    return found_av, ar if ar is not None else found_ar


def open_checkpoint(
    name: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    foreign_code: bool = False,
) -> Checkpoint:
    """Makes the files of one half available on this machine.

    Args:
        name: A directory, or a hub repository `owner/name`.
        revision: Branch, tag or commit on the hub.
        weights: Download the weights, too; without them only the small files are fetched.
        foreign_code: Download Python files, too (`trust_remote_code`).

    Raises:
        NLAError: Neither a directory nor a repository that can be had.
    """
    local = _as_path(name)
    # Not Path.is_dir, which raises on a name too long to be a file's.
    if os.path.isdir(local):
        return Checkpoint(str(name), local)
    wanted = [*_SMALL_FILES, *(_WEIGHTS if weights else ()), *(("*.py",) if foreign_code else ())]
    return Checkpoint(str(name), _download(str(name), revision, wanted), revision)


def fetch_file(checkpoint: Checkpoint, name: str) -> Path:
    """The path of one file of an open checkpoint, downloaded where that is on the hub.

    A directory on this machine is as it is: the file may be missing there.

    Raises:
        NLAError: The hub does not give it.
    """
    path = checkpoint.path / name
    if path.is_file() or os.path.isdir(_as_path(checkpoint.name)):
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # The snapshot's directory is named after its commit.
        return Path(hf_hub_download(checkpoint.name, name, revision=checkpoint.path.name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise NLAError(
            f"{name} of {checkpoint.name} cannot be fetched from the hub ({type(error).__name__}: "
            f"{reason}); check the name, the network and, for gated models, `hf auth login`"
        ) from error


def _as_path(name: str | Path) -> Path:
    # Path.expanduser raises where there is no such user; this leaves the name as it is.
    return Path(os.path.expanduser(name))


def _download(repo: str, revision: str | None, wanted: list[str]) -> Path:
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise NLAError(
            f"no checkpoint {repo!r}: not a directory here, and not a hub repository (owner/name) "
            f"or one of the embedded {sorted(_EMBEDDED)}"
        )
    # Imported late: `import nla_lens` stays quick, and local checkpoints never need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=wanted,
                # "*" matches "/", too: no checkpoints of the training, no optimizer states.
                ignore_patterns=["*/*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise NLAError(
            f"{repo} cannot be fetched from the hub ({type(error).__name__}: {reason}); check the "
            "name, the network and, for gated models, `hf auth login`; a verbalizer without a "
            "reconstructor is passed as av="
        ) from error
