"""Documents out of a folder of text, and which of them training may see.

The folder holds ``KIND/SOURCE.txt``, one document a line: `debian.py` writes one, and any other
will do. Sources are held out whole, so that a document to be tested on has no neighbour from the
same book among those trained on; and so are whole kinds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

UNSEEN_KINDS = ("licence",)
HELD_OUT_EVERY = 7
PARTS = ("train", "held", "unseen")


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: What it says.
        kind: Kind of text.
        source: Where it is from: a file of that kind.
    """

    text: str
    kind: str
    source: str


def read(folder: Path) -> list[Document]:
    """Reads every document of a folder, in the order of names.

    Raises:
        SystemExit: There are none.
    """
    found = [
        Document(line, path.parent.name, path.stem)
        for path in sorted(folder.glob("*/*.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    if not found:
        raise SystemExit(f"no documents in {folder}: expected KIND/SOURCE.txt, one a line")
    return found


def part_of(kind: str, source: str) -> str:
    """`train`, `held` (a source of a kind that is trained on) or `unseen` (a kind that is not)."""
    if kind in UNSEEN_KINDS:
        return "unseen"
    digest = hashlib.sha256(f"{kind}/{source}".encode()).digest()
    return "held" if int.from_bytes(digest[:4], "big") % HELD_OUT_EVERY == 0 else "train"


def draw(documents: Sequence[Document], part: str, count: int, seed: int) -> list[Document]:
    """Draws documents of a part, as many of each kind as far as there are that many.

    Args:
        documents: All of them.
        part: One of `PARTS`.
        count: How many in all.
        seed: Seed of the draw.
    """
    kinds: dict[str, list[Document]] = {}
    for document in documents:
        if part_of(document.kind, document.source) == part:
            kinds.setdefault(document.kind, []).append(document)
    rng = random.Random(f"{seed} {part}")
    drawn = []
    for i, kind in enumerate(sorted(kinds, key=lambda kind: len(kinds[kind]))):
        share = -(-(count - len(drawn)) // (len(kinds) - i))
        drawn.extend(rng.sample(kinds[kind], min(share, len(kinds[kind]))))
    rng.shuffle(drawn)
    return drawn
