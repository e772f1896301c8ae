"""Modules of `tutorials/tiny_nla`: what writes its documents, and what breaks the pair."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "tutorials" / "tiny_nla"


def tiny_world(name: str = "corpus") -> Any:
    """A module; it imports its neighbours by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(FOLDER))
