"""The course: notebooks are those of their sources, and run; answers pass, mistakes do not."""

import ast
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
COURSE = TUTORIALS / "course"
SOURCES = sorted(COURSE.glob("[0-9][0-9]_*.py"))
EACH = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
TITLE = re.compile(r'@check\("([^"]+)"\)')


def requirements(path: Path) -> list[Requirement]:
    """What a notebook's metadata says it needs, for instance `transformer-lens>=3.9`."""
    metadata = nbformat.read(path, as_version=4).metadata
    return [Requirement(line) for line in metadata.get("requires", [])]


def can_run_here(path: Path) -> bool:
    try:
        return all(
            r.specifier.contains(version(r.name), prereleases=True) for r in requirements(path)
        )
    except PackageNotFoundError:
        return False


# 10 to 20 seconds, and no framework's release shows in them.
TAKE_LONG = {"05_is_it_true", "07_injection_from_scratch"}
# A notebook that takes minutes says so in a line of its source.
RUNNABLE = [
    pytest.param(
        source,
        id=source.stem,
        marks=[pytest.mark.slow, pytest.mark.timeout(900)]
        if source.stem in TAKE_LONG
        or re.search(r"^# slow\b", source.read_text(encoding="utf-8"), re.MULTILINE)
        else [],
    )
    for source in SOURCES
    if can_run_here(TUTORIALS / f"{source.stem}.ipynb")
]


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One kernel for all notebooks: to import torch takes longer than to run one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONWARNINGS", "ignore")
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(TUTORIALS))
        yield manager
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    """`tutorials/course/build.py`."""
    spec = importlib.util.spec_from_file_location("course_build", COURSE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def cells_of(source: Path, build: Any, kind: str) -> list[str]:
    return [cell.source for cell in build.parse(source) if build.tag(cell) == kind]


def test_every_notebook_has_a_source() -> None:
    stems = {path.stem for path in SOURCES}
    assert stems == {path.stem for path in TUTORIALS.glob("*.ipynb")}
    assert stems == {path.stem for path in (TUTORIALS / "solved").glob("*.ipynb")}
    assert stems == {path.stem for path in (TUTORIALS.parent / "docs" / "course").glob("[0-9]*.md")}


@EACH
def test_what_is_made_of_a_source_is_current(source: Path, build: Any) -> None:
    ran = build.kept(source)
    assert ran is not None, "the solved notebook was run from another source: make course"
    for path, text in build.files(source, ran).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: make course"


@EACH
def test_a_changed_source_is_noticed(source: Path, build: Any, tmp_path: Path) -> None:
    changed = tmp_path / source.name
    changed.write_text(source.read_text(encoding="utf-8") + "\n# %%\n1 + 1\n", encoding="utf-8")
    assert build.digest(changed) != build.digest(source)
    assert build.kept(changed) is None


@EACH
def test_its_form(source: Path, build: Any) -> None:
    """Claim with evidence and control, aims, minutes, and four to six exercises."""
    first = build.parse(source)[0].source
    for needed in ("**Claim.**", "Evidence", "Control", "**You will**", "**You need**", "minutes"):
        assert needed in first, needed
    text = "\n".join(cells_of(source, build, ""))
    titles = [TITLE.search(test)[1] for test in cells_of(source, build, "test")]  # type: ignore[index]
    number = int(source.stem[:2])
    assert titles == [f"{number}.{n + 1}" for n in range(len(titles))]
    assert 4 <= len(titles) <= 6
    assert re.findall(r"^### Exercise ([\d.]+): ", text, re.MULTILINE) == titles
    rated = r"^> Difficulty [1-5] of 5 · importance [1-5] of 5 · \d+ minutes$"
    assert len(re.findall(rated, text, re.MULTILINE)) == len(titles)
    assert len(cells_of(source, build, "hint")) >= len(titles) - 1
    for solution in cells_of(source, build, "solution"):
        assert "raise NotImplementedError(" in build.stub(solution)
        assert "SOLUTION" not in build.answer(solution) + build.stub(solution)


@EACH
def test_nothing_stands_on_an_answer_but_tests(source: Path, build: Any) -> None:
    """So a notebook goes on below a stub, and runs as it does with the answer."""
    answers: set[str] = set()
    for cell in build.parse(source):
        if cell.cell_type != "code":
            continue
        kind, body = build.tag(cell), ast.parse(cell.source).body
        if kind == "solution":
            assert all(isinstance(node, ast.FunctionDef) for node in body)
            answers |= {node.name for node in body}  # type: ignore[attr-defined]
        elif kind == "test":
            body = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        if kind in ("", "test"):
            used = {n.id for node in body for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert used.isdisjoint(answers), used & answers


def steps(source: Path, build: Any) -> Iterator[tuple[str, str]]:
    """What to run, with what its test must say: "to do", "not yet", "passed"; "" for the rest.

    Without mistakes and answers it is the notebook as it is given out, from top to bottom.
    """
    solution, wrong = "", []
    for cell in build.parse(source):
        kind = build.tag(cell)
        if cell.cell_type != "code":
            continue
        if kind == "solution":
            solution, wrong = cell.source, []
            yield build.stub(solution), ""
        elif kind == "wrong":
            wrong.append(cell.source)
        elif kind == "test":
            assert wrong, f"no usual mistake is tried in {TITLE.search(cell.source)}"
            yield cell.source, "to do"
            for mistake in wrong:
                yield f"{mistake}\n\n\n{cell.source}", "not yet"
            yield f"{build.answer(solution)}\n\n\n{cell.source}", "passed"
        else:
            yield cell.source, ""


@pytest.mark.parametrize("source", RUNNABLE)
def test_stubs_and_mistakes_fail_and_answers_pass(
    source: Path, build: Any, kernel: KernelManager
) -> None:
    code, expected = zip(*steps(source, build), strict=True)
    begin = build.solved(source).cells[1].source
    # What an earlier notebook named is gone, its modules too.
    book = new_notebook(cells=[new_code_cell(text) for text in ("%reset -f", begin, *code)])
    NotebookClient(book, km=kernel, timeout=600).execute()
    shown = 0
    for cell, verdict in zip(book.cells[2:], expected, strict=True):
        printed = build.printed_by(cell)
        if verdict:
            title = TITLE.search(cell.source)[1]  # type: ignore[index]
            assert f"{title}: {verdict}" in printed, f"{cell.source}\n\n{printed}"
        outputs = cell.get("outputs", [])
        assert not [output for output in outputs if output.output_type == "error"]
        if verdict in ("", "to do"):
            shown += len(outputs)
    assert shown >= 3, "a tutorial shows something"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_only_what_needs_sae_lens_is_left_to_another_environment() -> None:
    """With the newest tools, so that no notebook is passed over by a misspelt requirement."""
    if version("transformer-lens").startswith("4."):
        for path in NOTEBOOKS:
            needed = {r.name for r in requirements(path)}
            assert can_run_here(path) or "sae-lens" in needed, (path.stem, needed)


def test_there_are_tutorials() -> None:
    assert "01_read_a_residual_stream" in {p.stem for p in NOTEBOOKS}
    assert os.access(TUTORIALS / "demo.py", os.R_OK)


@EACH
def test_what_is_stored_is_the_same_everywhere(source: Path) -> None:
    """No path of a machine, no warning, nothing that failed, every exercise passed."""
    book: NotebookNode = nbformat.read(TUTORIALS / "solved" / f"{source.stem}.ipynb", as_version=4)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    shown = repr(outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    places = (str(TUTORIALS.parent), str(Path.home()), tempfile.gettempdir(), "site-packages")
    for never in (*places, "Warning"):
        assert never not in shown, never
    assert not re.search(r"\d(ms| ms|it/s| s/it)\b", shown)
    titles = [m[1] for cell in book.cells if (m := TITLE.search(cell.source))]
    assert [t for t in titles if f"{t}: passed" not in shown] == []
