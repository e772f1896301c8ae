"""Which chat template is a half's own, as transformers takes it; needs no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.disk.reading import read_bytes, read_json
from nla_lens.errors import NLAError
from nla_lens.models.tokenizer_names import TEMPLATE_NAME, TEMPLATES_FOLDER, TOKENIZER_NAMES


def own_template(half: Checkpoint) -> str | None:
    """The chat template that is nearer to a half than its tokenizer; None where there is none.

    Raises:
        NLAError: It cannot be read.
    """
    home = half.nearest(TEMPLATE_NAME)
    is_nearer = home is not None and half.nearest(*TOKENIZER_NAMES, TEMPLATE_NAME) == home
    if home is None or not is_nearer or str(home) == half.tokenizer_path:
        return None
    return _read(home / TEMPLATE_NAME)


def template_of(home: Path) -> str | None:
    """The chat template that transformers takes of a tokenizer's files; None where there is none.

    Files come before what the config says; of several templates it is the one named default.

    Raises:
        NLAError: tokenizer_config.json is damaged.
    """
    said = read_tokenizer_config(home).get("chat_template")
    if isinstance(said, list):
        said = {t.get("name"): t.get("template") for t in said if isinstance(t, Mapping)}
    default, more = home / TEMPLATES_FOLDER / "default.jinja", home / TEMPLATES_FOLDER
    if default.is_file():
        said = _read(default)
    elif (home / TEMPLATE_NAME).is_file():
        said = _read(home / TEMPLATE_NAME)
    elif more.is_dir() and any(more.glob("*.jinja")):
        said = None
    if isinstance(said, Mapping):
        said = said.get("default")
    return said if isinstance(said, str) else None


def read_tokenizer_config(home: Path) -> Mapping[str, Any]:
    """tokenizer_config.json; empty where there is none.

    Raises:
        NLAError: It is damaged.
    """
    path = home / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _read(template: Path) -> str:
    try:
        return read_bytes(template).decode("utf-8")
    except UnicodeDecodeError as error:
        raise NLAError(f"{template} is no UTF-8: {error}") from error
