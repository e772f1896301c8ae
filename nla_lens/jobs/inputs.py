"""Finds out what a corpus is: files, a list in memory, vectors."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

from nla_lens.errors import NLAError
from nla_lens.jobs.corpus import Corpus
from nla_lens.jobs.files import are_paths, open_files
from nla_lens.jobs.memory import open_values

Source: TypeAlias = Any
"""Paths, texts, chats, dicts, a data frame, tensors or arrays of vectors."""


def open_corpus(source: Source, *, column: str | None = None, limit: int | None = None) -> Corpus:
    """Looks through what is given, without reading more than it must.

    Args:
        source: A path or a list of paths (text, JSONL, parquet, safetensors, npy, or folders of
            these); a list of texts, chats or dicts; a data frame; vectors.
        column: Which column is read; None: `text`, else `messages`.
        limit: Only the first so many documents.

    Raises:
        NLAError: Nothing there, no such column, or of no kind that is known; names the file.
    """
    if isinstance(source, str) and not source.strip():
        # To pathlib it is the working directory, with whatever is there.
        raise NLAError(f"{source!r:.80} names no file; pass a path, or texts as a list")
    if isinstance(source, (str, os.PathLike)) or are_paths(source):
        parts, is_vectors = open_files(source, column)
    else:
        parts, is_vectors = open_values(source, column, limit)
    corpus = Corpus(parts, is_vectors=is_vectors, limit=limit)
    if not len(corpus):
        raise NLAError("there is nothing to explain: the input has no documents")
    return corpus
