"""What writes the documents of the embedded pair's world: `tutorials/tiny_nla/corpus.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "tutorials" / "tiny_nla"


def tiny_world() -> Any:
    """The module; it imports its neighbours by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        return __import__("corpus")
    finally:
        sys.path.remove(str(FOLDER))
