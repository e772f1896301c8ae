"""Opens a dictionary by its name: finds the files on disk or on the hub, and who can read them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

from nla_lens.adapters.dictionaries.files import Files, UnsupportedDictionaryError, read_json
from nla_lens.adapters.dictionaries.formats import read_dictionary
from nla_lens.adapters.dictionaries.latents import check_dictionary
from nla_lens.errors import NLAError

_WEIGHTS: Final = ("*.safetensors", "*.pt", "*.pth")
_KNOWN_WEIGHTS: Final = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.safetensors",
    "ae.pt",
)


def load_dictionary(
    source: Any,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    hook_name: str | None = None,
) -> Any:
    """Opens a sparse dictionary; weights are read from the files as they are needed.

    Formats: qresearch, Goodfire, SAELens, Gemma Scope 2, sparsify, dictionary_learning; see
    `nla_lens.adapters.dictionaries.formats`. What of SAELens is not read here sae-lens reads, where
    it is installed.

    Args:
        source: A directory, a weights file, a hub repository `owner/name`, or any object with
            `W_dec` `[d_sae, d]`, `encode` and `decode`, which is handed back as it is.
        subfolder: Which dictionary, where there are several.
        revision: Branch, tag or commit on the hub.
        hook_name: Where it reads, where the files do not say, or say it wrongly.

    Returns:
        A `Dictionary`, the object given, or a `sae_lens.SAE`.

    Raises:
        NLAError: Not found, no known format, not the shapes of its format, NaN or infinity, cut
            short, or a pickle of more than tensors.
    """
    if not isinstance(source, (str, Path)):
        check_dictionary(source)
        if subfolder or revision or hook_name:
            raise NLAError(
                f"a {type(source).__name__} is taken as it is: subfolder=, revision= and "
                "hook_name= are for files; set the object's own cfg.metadata.hook_name"
            )
        return source
    name = str(source) if subfolder is None else f"{source}/{subfolder}"
    local = Path(source).expanduser()
    if not local.exists():
        local = _download(str(source), subfolder, revision)
    files = _files(local if subfolder is None else local / subfolder, name)
    try:
        return read_dictionary(files, hook_name)
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
        return sae_lens.SAE.load_from_disk(folder)
    # Whatever its many loaders raise: our own refusal says more.
    except Exception:
        return None


def _files(path: Path, name: str) -> Files:
    """The files of the one dictionary at a path.

    Raises:
        NLAError: None, or several.
    """
    if path.is_file():
        return Files(path.parent, name, path, read_json(_config_path(path)))
    if not path.is_dir():
        raise NLAError(f"{path} does not exist")
    found = sorted({p for pattern in _WEIGHTS for p in path.glob(pattern)})
    known = [p for p in found if p.name in _KNOWN_WEIGHTS]
    candidates = known or found
    if len(candidates) == 1:
        weights = candidates[0]
        return Files(path, name, weights, read_json(_config_path(weights)))
    if candidates:
        raise NLAError(
            f"{path} has several weights files: {[p.name for p in candidates]}; name one"
        )
    inside = sorted(
        str(p.parent.relative_to(path)) for pattern in _WEIGHTS for p in path.rglob(pattern)
    )
    hint = f"; there are some in {inside[:6]}, name one with subfolder=" if inside else ""
    raise NLAError(f"{path} has no dictionary: no {', '.join(_WEIGHTS)}{hint}")


def _config_path(weights: Path) -> Path:
    cfg = weights.parent / "cfg.json"
    return cfg if cfg.is_file() else weights.parent / "config.json"


def _download(repo: str, subfolder: str | None, revision: str | None) -> Path:
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise NLAError(
            f"no dictionary {repo!r}: not a directory here, and not a hub repository (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Repositories of hundreds of dictionaries are common: only the folder asked for is fetched.
    start = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[start + pattern for pattern in (*_WEIGHTS, "*.json")],
                ignore_patterns=[f"{start}*/*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise NLAError(
            f"{repo} cannot be fetched from the hub ({type(error).__name__}: {reason}); check the "
            "name, the network and, for gated repositories, `hf auth login`"
        ) from error


def opened(sae: Any) -> Any:
    """A dictionary from a name; anything else as it is."""
    return load_dictionary(sae) if isinstance(sae, (str, Path)) else sae
