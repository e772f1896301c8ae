"""English text out of packages of Debian: a folder for a kind, a file for a source.

``python debian.py --out DIR`` fetches the packages by apt and writes ``DIR/KIND/SOURCE.txt``, one
document a line. None of it is part of this repository, and none of it is shipped: the manual is
under the GPL or CC-BY-SA, the dictionary under a licence like BSD's, the quotations are from
everywhere.
"""

from __future__ import annotations

import argparse
import html
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("fortunes", "fortunes-min", "debian-handbook", "wordnet-base")
LICENCES = Path("/usr/share/common-licenses")
FEWEST_WORDS, MOST_WORDS = 12, 120
"""Of a document; longer ones are cut at the end of a sentence, shorter ones left out."""
GLOSSES = 260
"""Most documents of one file of the dictionary, so that it does not outweigh the rest."""


def main() -> None:
    """Fetches the packages and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--packages", type=Path, help="folder with the .deb files, if fetched")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root, folder = Path(scratch) / "root", args.packages
        if folder is None:
            folder = Path(scratch) / "packages"
            folder.mkdir()
            subprocess.run(["apt-get", "--quiet", "download", *PACKAGES], cwd=folder, check=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True)
        write(args.out, "quotation", quotations(root / "usr/share/games/fortunes"))
        write(args.out, "manual", manual(root / "usr/share/doc/debian-handbook/html/en-US"))
        write(args.out, "dictionary", dictionary(root / "usr/share/wordnet"))
        write(args.out, "licence", licences(LICENCES))


def write(out: Path, kind: str, sources: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Writes one file for each source that holds documents."""
    (out / kind).mkdir(parents=True, exist_ok=True)
    for name, texts in sources:
        lines = list(dict.fromkeys(line for text in texts if (line := document(text))))
        if lines:
            (out / kind / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def document(text: str) -> str:
    """One line of plain text, or nothing where it is too short or hardly prose."""
    words = text.split()
    if len(words) > MOST_WORDS:
        words = words[:MOST_WORDS]
        ends = [i for i, word in enumerate(words) if word[-1] in ".!?"]
        words = words[: ends[-1] + 1] if ends else words
    line = " ".join(words)
    letters = sum(c.isalpha() or c == " " for c in line)
    is_prose = line.isascii() and letters > 0.85 * len(line)
    return line if len(words) >= FEWEST_WORDS and is_prose else ""


def quotations(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """What fortune(6) says: a file for each subject, entries between lines of `%`."""
    for path in sorted(p for p in folder.iterdir() if not p.suffix):
        yield path.name, path.read_text(encoding="utf-8", errors="replace").split("\n%\n")


def manual(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The paragraphs of the Debian handbook, a file for each page."""
    for path in sorted(folder.glob("*.html")):
        page = path.read_text(encoding="utf-8")
        found = re.findall(r'<(?:p|div class="para")[^>]*>(.*?)</(?:p|div)>', page, re.DOTALL)
        yield path.stem, [html.unescape(re.sub(r"<[^>]+>", "", each)) for each in found]


def dictionary(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The entries of WordNet, a file for each of its subjects."""
    entries: dict[str, list[str]] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            fields, _, gloss = line.partition(" | ")
            subject, word = fields.split()[1], fields.split()[4].replace("_", " ")
            entries.setdefault(f"{part}_{subject}", []).append(f"{word}: {gloss}")
    for name, found in entries.items():
        kept = [entry for entry in found if document(entry)]
        yield name, kept[:: max(1, len(kept) // GLOSSES)]


def licences(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The paragraphs of the licences that lie on every Debian."""
    for path in sorted(p for p in folder.glob("*") if p.is_file() and not p.is_symlink()):
        yield path.name, path.read_text(encoding="utf-8", errors="replace").split("\n\n")


if __name__ == "__main__":
    main()
