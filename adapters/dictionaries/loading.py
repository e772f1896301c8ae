"""Opens a dictionary by its name: finds the files on disk or on the hub, and who can read them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from nla_lens.adapters.dictionaries.files import Files, UnsupportedDictionaryError, read_json
from nla_lens.adapters.dictionaries.formats import Format, named_format, read_dictionary
from nla_lens.adapters.dictionaries.hub import fetch_dictionary, open_repository
from nla_lens.adapters.dictionaries.latents import check_dictionary
from nla_lens.adapters.dictionaries.locate import CHECKPOINTS, locate
from nla_lens.checks import to_path
from nla_lens.errors import NLAError

_MOST_LOOKED_AT: Final = 4096
_DEEPEST: Final = 4
_LONGEST_NAME: Final = 4096


def load_dictionary(
    source: Any,
    *,
    subfolder: str | None = None,
    filename: str | None = None,
    revision: str | None = None,
    hook_name: str | None = None,
    format: str | None = None,
) -> Any:
    """Opens a sparse dictionary; weights are read from the files as they are needed.

    >>> load_dictionary("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer20.sae.pt")

    Formats: qresearch, Goodfire, SAELens, Gemma Scope 2, Llama Scope, Qwen Scope, sparsify,
    dictionary_learning; see `nla_lens.adapters.dictionaries.formats`. What of SAELens is not read
    here sae-lens reads, where it is installed. From the hub the files of one dictionary are
    fetched, and none that its config refuses.

    Args:
        source: A directory, a weights file, a hub repository `owner/name` or a folder or file in
            it (`owner/name/folder`), or any object with `W_dec` `[d_sae, d]`, `encode` and
            `decode`, which is handed back as it is.
        subfolder: Which dictionary, where there are several.
        filename: Which weights file, where there are several.
        revision: Branch, tag or commit on the hub.
        hook_name: Where it reads, where the files do not say, or say it wrongly.
        format: Which format, where names and config do not prove one.

    Returns:
        A `Dictionary`, the object given, or a `sae_lens.SAE`.

    Raises:
        NLAError: Not found, no proven format, not the shapes of its format, NaN or infinity, cut
            short, or a pickle of more than tensors.
    """
    if not isinstance(source, (str, os.PathLike)):
        check_dictionary(source)
        if subfolder or filename or revision or hook_name or format:
            raise NLAError(
                f"a {type(source).__name__} is taken as it is: subfolder=, filename=, revision=, "
                "format= and hook_name= are for files; set the object's own "
                "cfg.metadata.hook_name"
            )
        return source
    source = source if isinstance(source, str) else to_path(source)
    asked = None if format is None else named_format(format)
    files = _files(source, _inside(subfolder, filename), revision, asked)
    try:
        return read_dictionary(files, hook_name, asked)
    except UnsupportedDictionaryError:
        if files.weights.name == "sae_weights.safetensors" and hook_name is None:
            found = _by_sae_lens(files.folder)
            if found is not None:
                return found
        raise


def _by_sae_lens(folder: Path) -> Any:
    """What sae-lens makes of it; None where sae-lens is not installed or does not know it."""
    if importlib.util.find_spec("sae_lens") is None:
        return None
    import sae_lens

    try:
        found = sae_lens.SAE.load_from_disk(folder)
        check_dictionary(found)
    # Whatever its many loaders raise: our own refusal says more.
    except Exception:
        return None
    return found


def _inside(subfolder: object, filename: object) -> str:
    """The folder or file within a source, with "/" between its parts; "" is the source itself.

    Raises:
        NLAError: It is no such path, or leads out of the source.
    """
    parts = []
    for name, value in (("subfolder", subfolder), ("filename", filename)):
        if value is None:
            continue
        if not isinstance(value, (str, Path)) or not _is_plain(value):
            raise NLAError(f"{name}={value!r:.200} is no path")
        text = str(value).replace("\\", "/")
        if text.startswith(("/", "~")) or ".." in text.split("/"):
            raise NLAError(f"{name}={value!r:.200} must lie within the source")
        parts += [part for part in text.split("/") if part not in ("", ".")]
    return "/".join(parts)


def _is_plain(source: str | Path) -> bool:
    text = str(source)
    return bool(text.strip()) and "\0" not in text and len(text) <= _LONGEST_NAME


def _files(source: str | Path, inside: str, revision: str | None, format: Format | None) -> Files:
    """The files of the one dictionary that a caller means.

    Raises:
        NLAError: None, or several.
    """
    if not _is_plain(source):
        raise NLAError(
            f"no dictionary {str(source)!r:.200}: a directory, file or repository is due"
        )
    local = to_path(source)
    name = f"{source}/{inside}" if inside else str(source)
    # Not Path.exists, which raises on a name too long to be a file's.
    if os.path.lexists(local):
        return _local(local, inside, name)
    repo, rest = _repository(str(source))
    inside = "/".join(part for part in (rest, inside) if part)
    found = open_repository(repo, revision)
    if isinstance(found, Path):
        return _local(found, inside, name)
    return fetch_dictionary(found, inside, name, format)


def _repository(source: str) -> tuple[str, str]:
    """`owner/name` and what is in it.

    Raises:
        NLAError: The source is no such name.
    """
    parts = source.rstrip("/").split("/")
    led_out = source.startswith((".", "/", "~")) or ".." in parts
    if len(parts) < 2 or not all(parts) or led_out or not source.isprintable():
        raise NLAError(
            f"no dictionary {source!r:.200}: not a directory here, and not a hub repository "
            "(owner/name, owner/name/folder)"
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def _local(path: Path, inside: str, name: str) -> Files:
    """The files of the one dictionary at a path of this machine.

    Raises:
        NLAError: None, or several.
    """
    target = path / inside if inside else path
    root = target if os.path.isdir(target) else target.parent
    # Llama Scope's config lies above the folder of its weights.
    root = root.parent if root.name == CHECKPOINTS else root
    if inside and not os.path.lexists(target):
        root, wanted = path, inside
    else:
        wanted = "" if target == root else target.relative_to(root).as_posix()
    found = locate(_names(root), str(root), wanted)
    weights = root / found.weights
    config = {} if found.config is None else read_json(root / found.config)
    return Files(weights.parent, name, weights, config)


def _names(root: Path) -> Iterator[str]:
    """Paths of the files below a folder; of a large tree, those that are near."""
    seen, level = 0, [root]
    for _ in range(_DEEPEST):
        below: list[Path] = []
        for folder in level:
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:
                continue
            for entry in entries:
                seen += 1
                if seen > _MOST_LOOKED_AT:
                    return
                if _is_folder(entry, follow=folder == root):
                    below.append(Path(entry.path))
                else:
                    yield Path(entry.path).relative_to(root).as_posix()
        level = below


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:
        # A link that leads to itself.
        return False


def opened(sae: Any) -> Any:
    """A dictionary from a name; anything else as it is."""
    return load_dictionary(sae) if isinstance(sae, (str, os.PathLike)) else sae
