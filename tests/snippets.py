"""The blocks of README and manual, and a way to run those of a page one after the other.

    ```python           run, in one namespace and one folder a page
    ```sh               each line is a command `nla-lens ...`: run; it must succeed and print
    ```                 not run: other programs' commands, transcripts

A comment in the line before says what a block needs:

    <!-- with: server -->            a vLLM server at localhost:8000 that runs the small AV
    <!-- folder: tutorials/x -->     that folder of the repository, as `x`
    <!-- file: name -->              nothing is run: the block is that file
"""

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from .model_server import ModelServer

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(
        path
        for path in (ROOT / "docs").rglob("*.md")
        if path.relative_to(ROOT / "docs").parts[0] not in ("upstream", "site")
    ),
]
NEEDS = {
    r"\b(nnsight|ndif)\b": "nnsight",
    r"\btransformer_lens\b": "transformer_lens.model_bridge",
    r"to_pandas\(|\bpandas\b": "pandas",
    r"\.plots?\(": "matplotlib",
    r"\bcalibrate\(": "sklearn",
    **{rf"\b{name}\b": name for name in ("ray", "polars", "duckdb", "datasets", "peft", "jupyter")},
}
"""What a page's snippets say, and the package that must be there for it."""
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[a-z]+): (?P<of>\S+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_LANGUAGES = {"", "python", "sh", "yaml", "json", "toml", "text"}


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    of: str

    @property
    def is_run(self) -> bool:
        return self.language in ("python", "sh")


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(
            page,
            text.count("\n", 0, match.start("text")),
            match["language"],
            match["text"],
            match["mark"] or "",
            match["of"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]
    unknown = {block.language for block in found} - _LANGUAGES
    assert not unknown, f"{page.name}: blocks of {unknown} are neither run nor known"
    return found


def missing(page: Path) -> list[str]:
    """Packages that a page's snippets need and that are not here."""
    said = "\n".join(block.text for block in blocks(page) if block.is_run)
    wanted = {package for pattern, package in NEEDS.items() if re.search(pattern, said)}
    return sorted(package for package in wanted if not _is_here(package))


def _is_here(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def command(line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """What a command prints: the program as it is installed, in this process.

    Importing torch takes longest of all.
    """
    program = Path(sys.executable).with_name("nla-lens")
    name, *arguments = shlex.split(line)
    assert name == "nla-lens", line
    capfd.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [str(program), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(program), run_name="__main__")
    printed = capfd.readouterr()
    assert ended.value.code in (None, 0), f"{line}: {printed.err}"
    assert printed.out or "--out" in arguments, line
    return printed.out


def run_page(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Runs the blocks of a page in a folder; gives back the names they made."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.mark == "file":
            Path(block.of).write_text(block.text, encoding="utf-8")
        elif block.mark == "folder":
            shutil.copytree(ROOT / block.of, Path(block.of).name, dirs_exist_ok=True)
        if block.language == "python":
            with _surroundings(block) as text:
                # Errors name the page and its line.
                exec(compile("\n" * block.line + text, str(page), "exec"), names)
        elif block.language == "sh":
            for line in block.text.splitlines():
                command(line, monkeypatch, capfd)
    return names


@contextmanager
def _surroundings(block: Block) -> Iterator[str]:
    if block.mark != "with":
        yield block.text
        return
    import nla_lens

    assert block.of == "server", block
    verbalizer: Any = nla_lens.NLA.from_pretrained("tiny").verbalizer
    with ModelServer("vllm", verbalizer.engine.model, verbalizer.tokenizer, "tiny/av") as server:
        yield block.text.replace("http://localhost:8000", server.url)


def check_transcript(
    page: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *,
    may_differ: int = 0,
) -> None:
    """Runs the script that a page shows a transcript of, and holds its lines against it.

    Args:
        page: The page.
        monkeypatch: pytest's.
        capfd: pytest's.
        may_differ: How many lines of a natural model's texts another processor's rounding may
            change.
    """
    from transformers.utils import logging

    text = page.read_text(encoding="utf-8")
    shown = re.search(r"<!-- transcript: (.+?) -->\n```\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    script, *arguments = shlex.split(shown[1])
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        logging.enable_progress_bar()  # The demo shows none.
    printed = _words(capfd.readouterr().out)
    lines = [_words(line) for line in shown[2].splitlines() if _words(line)]
    assert len(lines) > 10
    missing = [line for line in lines if line != "…" and line not in printed]
    assert len(missing) <= may_differ, missing


def _words(text: str) -> str:
    """Text without table lines and spacing, which depend on the terminal's width."""
    return " ".join(re.sub(r"[─│┃━┏┓┗┛┡┩╇┳┻┼]", " ", text).split())
