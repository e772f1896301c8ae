"""Which files of a repository's folder are needed: of nothing else one byte is fetched."""

from __future__ import annotations

import fnmatch
from typing import Final

from nla_lens.checkpoints.layout import join, parent
from nla_lens.models.tokenizer_names import TEMPLATES_FOLDER

SMALL_FILES: Final = ("*.json", "*.yaml", "*.jinja", "*.txt", "*.model")
WEIGHTS: Final = ("*.safetensors",)
# Of the training, or another format of the same weights.
_NEVER: Final = (
    "trainer_state.json", "*_results.json", "requirements*.txt", "consolidated*", "optimizer*",
    "scheduler*", "random_states*", "rng_state*",
)  # fmt: skip
TOKENIZER_FILES: Final = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "*.model",
)  # fmt: skip


def files_of(folder: str, files: frozenset[str], patterns: tuple[str, ...]) -> set[str]:
    """What is needed of a folder: the files in it, and of the folders under it chat templates."""
    return matching(folder, files, (*SMALL_FILES, *patterns)) | templates_of(folder, files)


def templates_of(folder: str, files: frozenset[str]) -> set[str]:
    """Chat templates beside the one that is usual."""
    return matching(join(folder, TEMPLATES_FOLDER), files, ("*.jinja",))


def matching(folder: str | None, files: frozenset[str], patterns: tuple[str, ...]) -> set[str]:
    """The files right in a folder whose names fit one of the patterns."""
    found = set()
    for file in files:
        name = file.rpartition("/")[2]
        if (
            parent(file) == folder
            and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            and not any(fnmatch.fnmatch(name, pattern) for pattern in _NEVER)
        ):
            found.add(file)
    return found
