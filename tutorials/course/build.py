"""Makes the course out of its sources: `make course`.

Each `NN_name.py` here is a notebook as a jupytext percent script. From it come

* `tutorials/NN_name.ipynb`: exercises, without outputs. Answers are stubs that raise;
* `tutorials/solved/NN_name.ipynb`: the same solved, run, with outputs;
* `docs/course/NN_name.md`: a page to read, with what the solved notebook shows.

Tags of cells in a source:

| tag | what it is |
|---|---|
| none | is in all three as it stands |
| `solution` | an answer; from `# SOLUTION: what is to do` to `# END` the stub raises |
| `test` | the visible test under it; what it prints in the solved notebook is the expected output |
| `hint` | markdown, folded |
| `wrong` | a usual mistake instead of the answer above: in none of them; the test must refuse it |

A solved notebook is run again only where its source or this file changed (`--run`: in any case).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

COURSE = Path(__file__).resolve().parent
TUTORIALS = COURSE.parent
PAGES = TUTORIALS.parent / "docs" / "course"
# Where the repository is on GitHub, "owner/name": the one place that says it. Colab opens notebooks
# from there, and their first cell clones it. Then run `make course`.
REPOSITORY = "OWNER/REPOSITORY"

_SETUP = """\
# Run this first. On Colab it fetches the library and the course; elsewhere it finds the course.
import sys
from importlib.util import find_spec
from pathlib import Path

if "google.colab" in sys.modules:
    !git clone -q --depth 1 https://github.com/{repository} nla_lens_course
    %pip install -q "./nla_lens_course{extras}"
    %cd -q nla_lens_course/tutorials

TUTORIALS = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "course").is_dir()), None)
assert TUTORIALS, "open this notebook where it lies, in tutorials/ of a clone"
assert find_spec("torch") and find_spec("nla_lens"), (
    "this kernel has no nla_lens: see 'The course' in docs/index.md"
)
sys.path.insert(0, str(TUTORIALS / "course"))"""
_HOW = """

**How it goes.** Run the cells from the top, one after the other (Shift+Enter). A stub raises until
it is written: write it, run it, and then the cell under it, which says whether it is right, and if
not, what is wrong. Hints, the expected output and a solution are folded away below; where you go on
without an answer of your own, take the solution, as later cells may use it."""
_BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/tutorials/{stem}.ipynb)"
)
_WIDTH = 101  # of a line with its end, as everywhere here
_PLACE = re.compile(r"^( *)# SOLUTION: ([^\n]+)\n(.*?)^ *# END\n?", re.DOTALL | re.MULTILINE)


def sources() -> list[Path]:
    """The sources, in order."""
    return sorted(COURSE.glob("[0-9][0-9]_*.py"))


def parse(source: Path) -> list[NotebookNode]:
    """A source's cells: `cell_type`, `source`, and at most one tag in `metadata.tags`."""
    cells = [c for c in jupytext.read(source, fmt="py:percent").cells if c.source.strip()]
    # What stands before the title is about the file.
    return cells[[c.cell_type for c in cells].index("markdown") :]


def tag(cell: NotebookNode) -> str:
    """A cell's tag, "" for none."""
    return "".join(cell.metadata.get("tags", []))


def requires(source: Path) -> list[str]:
    """What a notebook needs to run, from the source's line `# requires: transformer-lens>=2.18`."""
    found = re.search(r"^# requires: (.+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    return [each.strip() for each in found[1].split(";")] if found else []


def is_slow(source: Path) -> bool:
    """Whether it takes minutes, from the source's line `# slow`."""
    return bool(re.search(r"^# slow\b", source.read_text(encoding="utf-8"), re.MULTILINE))


def digest(source: Path) -> str:
    """Of a source and of what makes a notebook of it."""
    made_of = source.read_bytes() + _SETUP.encode() + REPOSITORY.encode()
    return hashlib.sha256(made_of).hexdigest()[:16]


def stub(code: str) -> str:
    """An answer as it is given out: what is to be written raises."""
    return _PLACE.sub(_raising, code).rstrip()


def _raising(place: re.Match[str]) -> str:
    indent, todo = place[1], place[2]
    line = f'{indent}raise NotImplementedError("{todo}")\n'
    if len(line) <= _WIDTH:
        return line
    # As `ruff format` has it.
    return f'{indent}raise NotImplementedError(\n{indent}    "{todo}"\n{indent})\n'


def answer(code: str) -> str:
    """An answer without the marks around what is left out of the stub."""
    return _PLACE.sub(lambda m: m[3], code).rstrip()


def folded(title: str, text: str) -> NotebookNode:
    """A markdown cell that opens on a click."""
    return new_markdown_cell(f"<details><summary>{title}</summary>\n\n{text}\n\n</details>")


def fenced(text: str, language: str = "") -> str:
    """A block of code in markdown."""
    return f"```{language}\n{text.rstrip()}\n```"


def _begun(source: Path, cells: list[NotebookNode], how: str) -> Iterator[NotebookNode]:
    """The first cells: the title with the badge under it, and what installs."""
    title, _, rest = cells[0].source.partition("\n")
    badge = _BADGE.format(repository=REPOSITORY, stem=source.stem)
    yield new_markdown_cell(f"{title}\n\n{badge}\n{rest}{how}")
    names = (re.split(r"[<>=!~]", need)[0] for need in requires(source))
    extras = ",".join(name for name in names if name in ("transformer-lens", "nnsight", "trust"))
    extras = f"[{extras}]" if extras else ""
    yield new_code_cell(_SETUP.format(repository=REPOSITORY, extras=extras))


def _book(source: Path, cells: list[NotebookNode], how: str = "", **about: Any) -> NotebookNode:
    book = new_notebook(cells=[*_begun(source, cells, how), *cells[1:]])
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "requires": requires(source),
        "slow": is_slow(source),
        "made_by": f"tutorials/course/build.py from {source.name}",
        **about,
    }
    for n, cell in enumerate(book.cells):
        # Random ids would make another file each time.
        cell["id"] = f"{source.stem[:2]}-{n}"
    return book


def solved(source: Path) -> NotebookNode:
    """The solved notebook, not run."""
    cells = []
    for cell in parse(source):
        if tag(cell) in ("hint", "wrong"):
            continue
        if tag(cell) == "solution":
            cell.source = answer(cell.source)
        cells.append(cell)
    return _book(source, _without_tags(cells), source_digest=digest(source))


def exercises(source: Path, ran: NotebookNode) -> NotebookNode:
    """The notebook that is given out.

    Args:
        source: Its source.
        ran: The solved notebook; what its tests print is what is expected.
    """
    printed = {cell.source: printed_by(cell) for cell in ran.cells if cell.cell_type == "code"}
    cells: list[NotebookNode] = []
    solution, behind = "", []
    for cell in parse(source):
        kind, text = tag(cell), cell.source
        if kind == "wrong":
            continue
        if kind == "hint":
            cells.append(folded("Hint", text))
            continue
        # Below the test and the hints.
        cells += behind
        behind = []
        if kind == "solution":
            solution, cell.source = answer(text), stub(text)
        if kind == "test":
            behind = [
                folded("Expected output", fenced(printed[text], "text")),
                folded("Solution", fenced(solution, "python")),
            ]
        cells.append(cell)
    return _book(source, _without_tags([*cells, *behind]), how=_HOW)


def _without_tags(cells: list[NotebookNode]) -> list[NotebookNode]:
    for cell in cells:
        cell.metadata = {}
    return cells


def printed_by(cell: NotebookNode) -> str:
    """What a cell shows, as text."""
    parts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            parts.append(output.text)
        elif "text/plain" in output.get("data", {}):
            parts.append(output.data["text/plain"])
    return "\n".join(part.rstrip("\n") for part in parts)


def page(source: Path, ran: NotebookNode) -> str:
    """The notebook as a page of the documentation."""
    shown = {cell.source: printed_by(cell) for cell in ran.cells if cell.cell_type == "code"}
    cells = parse(source)
    title, _, rest = cells[0].source.partition("\n")
    parts = [
        f"<!-- Made by tutorials/course/build.py from {source.name}: change that. -->",
        title,
        f"To be done in `tutorials/{source.stem}.ipynb`; solved in `tutorials/solved/`. "
        "[How to open it](../index.md#the-course).",
        rest.strip(),
    ]
    solution, behind = "", []
    for cell in cells[1:]:
        kind, text = tag(cell), cell.source
        if kind == "wrong":
            continue
        if kind == "hint":
            parts.append(_admonition("tip", "Hint", text))
            continue
        parts += behind
        behind = []
        if kind == "solution":
            solution, text = answer(text), stub(text)
        parts.append(text if cell.cell_type == "markdown" else fenced(text, "python"))
        if output := shown.get(text):
            parts.append(fenced(output, "text"))
        if kind == "test":
            behind = [_admonition("success", "Solution", fenced(solution, "python"))]
    return "\n\n".join([*parts, *behind]) + "\n"


def _admonition(kind: str, title: str, text: str) -> str:
    lines = [f"    {line}".rstrip() for line in text.splitlines()]
    return "\n".join([f'??? {kind} "{title}"', "", *lines])


def run(book: NotebookNode, timeout: int = 900) -> NotebookNode:
    """The notebook with its outputs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore"
    NotebookClient(
        book, timeout=timeout, resources={"metadata": {"path": str(TUTORIALS)}}
    ).execute()
    for cell in book.cells:
        # Times, which change each run.
        cell.metadata = {}
    book.metadata["language_info"] = {"name": "python"}
    return book


def written(book: NotebookNode) -> str:
    """A notebook as its file has it."""
    return nbformat.writes(book, version=nbformat.NO_CONVERT) + "\n"


def files(source: Path, ran: NotebookNode) -> dict[Path, str]:
    """What is made of a source, by path."""
    return {
        TUTORIALS / f"{source.stem}.ipynb": written(exercises(source, ran)),
        TUTORIALS / "solved" / f"{source.stem}.ipynb": written(ran),
        PAGES / f"{source.stem}.md": page(source, ran),
    }


def kept(source: Path) -> NotebookNode | None:
    """The solved notebook as it is on disk, if it is of this source: with outputs that were run."""
    path = TUTORIALS / "solved" / f"{source.stem}.ipynb"
    if not path.is_file():
        return None
    ran = nbformat.read(path, as_version=4)
    if ran.metadata.get("source_digest") != digest(source):
        return None
    same = [c.source for c in ran.cells] == [c.source for c in solved(source).cells]
    return ran if same else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 01; all if none")
    parser.add_argument("--run", action="store_true", help="run those that did not change, too")
    wishes = parser.parse_args()
    for source in sources():
        if wishes.names and not source.name.startswith(tuple(wishes.names)):
            continue
        ran = None if wishes.run else kept(source)
        print(source.stem, "is run" if ran is None else "is current", flush=True)
        for path, text in files(source, ran or run(solved(source))).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
