"""A store's manifest: what it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from nla_lens.checks import is_int, naming
from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError
from nla_lens.results.rows import USER_TYPES

MANIFEST: Final = "manifest.json"
FORMAT: Final = "nla_lens.store"
VERSION: Final = 1


def read_manifest(path: Path) -> dict[str, Any]:
    """A store's manifest, checked.

    Raises:
        NLAError: Of another format, or damaged.
    """
    with naming(f"{path.parent} is no store"):
        manifest = read_json(path)
    version = manifest.get("version")
    if manifest.get("format") == FORMAT and is_int(version) and (version or 0) > VERSION:
        raise NLAError(f"{path} is of version {version}: it needs a newer nla-lens than this one")
    if (manifest.get("format"), version) != (FORMAT, VERSION):
        raise NLAError(f"{path} is not of {FORMAT} version {VERSION}")
    if not all(is_int(manifest.get(k)) for k in ("n_rows", "n_documents")) or not (
        isinstance(manifest.get("columns"), dict)
        and all(kind in USER_TYPES for kind in manifest["columns"].values())
    ):
        raise NLAError(f"{path} does not say n_rows, n_documents and columns as a store does")
    return dict(manifest)
