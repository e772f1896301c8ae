"""`nla_meta.yaml` as a JSON schema (draft 2020-12): what a file's shape is held against.

What two values say together (layers that differ, a template without its marker) is not a matter of
shape: `sidecar.parse_sidecar` and `spec.build_spec` see to that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nla_lens.checkpoints.files import open_checkpoint
from nla_lens.checkpoints.folders import as_path
from nla_lens.checkpoints.layout import files_below
from nla_lens.checkpoints.names import name_halves
from nla_lens.checkpoints.sidecar import SIDECAR_NAME, parse_sidecar, read_raw
from nla_lens.errors import NLAError

SCHEMA_PATH: Final = Path(__file__).with_name("nla_meta.schema.json")


def schema() -> dict[str, Any]:
    """The schema itself."""
    read: dict[str, Any] = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    return read


def complaints(raw: Mapping[str, Any]) -> list[str]:
    """What a parsed sidecar has against the schema, one line each; empty for a valid one."""
    from jsonschema import Draft202012Validator

    errors = Draft202012Validator(schema()).iter_errors(_plain(raw))
    found = [(".".join(map(str, error.absolute_path)), error.message) for error in errors]
    return [f"{where or 'the file'}: {message:.200}" for where, message in sorted(found)]


def _plain(value: Any) -> Any:
    """As JSON would have it: YAML also knows dates, sets and keys that are no text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def sidecars_of(name: str, *, ar: str | None = None, revision: str | None = None) -> list[Path]:
    """The sidecar files that a name stands for.

    Args:
        name: A file; a directory, with all that lie in it; or a checkpoint, as in `NLA`.
        ar: Its reconstructor, where it is a verbalizer alone.
        revision: Branch, tag or commit on the hub.

    Raises:
        NLAError: No such file or checkpoint, or one without a sidecar.
    """
    local = as_path(name)
    if os.path.isfile(local):
        return [local]
    found: list[Path] = []
    if name and os.path.isdir(local):
        below = sorted(files_below(local))
        found = [local / f for f in below if f.rpartition("/")[2] == SIDECAR_NAME]
    for half in () if found else name_halves(name, None, ar, revision=revision):
        if half is not None:
            path = open_checkpoint(half, revision=revision, weights=False).sidecar_path
            found += [path] if path is not None else []
    if not found:
        raise NLAError(f"no {SIDECAR_NAME} in {name}")
    return list(dict.fromkeys(found))


def findings(path: Path) -> list[str]:
    """What is wrong with one file: its shape by the schema, then what reading it says."""
    raw = read_raw(path)
    wrong = complaints(raw)
    if not wrong:
        try:
            parse_sidecar(raw, path)
        except NLAError as error:
            wrong = [str(error)]
    return wrong
