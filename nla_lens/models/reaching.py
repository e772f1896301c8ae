"""Whether the hub is there, asked once before transformers asks for file after file.

Without a network each file is tried six times, for 23 seconds, also where it was fetched before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from nla_lens.errors import NLAError
from nla_lens.foreign import harmless

_SECONDS: Final = 10.0
_there: set[str] = set()
"""Of these the hub has answered; what it answered is told by who loads them."""


def reached(name: str | Path) -> str | Path:
    """A directory, or a repository of a hub that can be reached, as it is named.

    Without a network: the directory of what was fetched of it before.

    Raises:
        NLAError: No network, and nothing was fetched.
    """
    from huggingface_hub import HfApi, constants

    repo = str(name)
    if os.path.isdir(repo) or constants.HF_HUB_OFFLINE or repo in _there:
        return name
    try:
        HfApi().model_info(repo, timeout=_SECONDS)
    # huggingface_hub lets through what its HTTP library raises, another one in each major version.
    except Exception as error:
        if isinstance(error, ValueError) or getattr(error, "response", None) is not None:
            return name
        fetched = _fetched(repo)
        if fetched is None:
            reason = harmless(" ".join(str(error).split()))[:200]
            raise NLAError(
                f"{repo} is no directory here, and the hub cannot be reached "
                f"({type(error).__name__}: {reason}). It was asked once: `hf download {repo}` asks "
                "again for a while, and what it fetched is found here without a network"
            ) from error
        return fetched
    _there.add(repo)
    return name


def _fetched(repo: str) -> str | None:
    from huggingface_hub import snapshot_download

    try:
        # No pattern, no file that could be missing.
        return str(snapshot_download(repo, allow_patterns=[], local_files_only=True))
    except Exception:
        return None
