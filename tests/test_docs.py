"""README and manual are true: snippets run, commands work, the transcript is what comes out."""

import re
import subprocess
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest

from .snippets import PAGES, ROOT, blocks, check_transcript, missing, run_page
from .test_rooms import house

HAS_BRIDGE = not version("transformer-lens").startswith("2.")


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


# The cells of the course's pages are run by test_course.py.
RUN = [
    page
    for page in PAGES
    if page.parent.name != "course" and any(block.is_run for block in blocks(page))
]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_snippets_run_one_after_the_other(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if without := missing(page):
        pytest.skip(f"its snippets need {', '.join(without)}")
    names = run_page(page, tmp_path, monkeypatch, capfd)
    if page.name == "explaining.md":
        assert (tmp_path / "explanations.jsonl").is_file()
    if page.name == "steering.md":
        swept = names["swept"]
        assert swept[2].toward > 0.4 > 0.01 > swept[0].toward
    if page.name == "servers.md":
        local = names["nla_lens"].NLA.from_pretrained("tiny")
        found = names["explanations"]
        assert [e.text for e in found] == [e.text for e in local.explain(names["vectors"])]
        assert all(e.cos is not None for e in found)


def test_a_snippet_that_fails_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\na = 1\n```\n\n```python\nassert a == 2\n```\n")
    with pytest.raises(AssertionError) as failed:
        run_page(page, tmp_path, monkeypatch, capfd)
    assert failed.traceback[-1].lineno == 7  # from 0
    page.write_text("```sh\nnla-lens info nowhere\n```\n")
    with pytest.raises(AssertionError, match="no checkpoint"):
        run_page(page, tmp_path, monkeypatch, capfd)


def test_make_runs_what_the_readme_promises() -> None:
    for target, needed in (("demo", "tutorials/demo.py"), ("test", "pytest")):
        printed = run("make", "--dry-run", "--always-make", target).stdout
        assert needed in printed


@pytest.mark.skipif(not HAS_BRIDGE, reason="the demo loads a TransformerBridge")
def test_the_transcript_is_what_the_demo_prints(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """That of the README is tested where its model is: `tests/smol_pair`."""
    check_transcript(ROOT / "docs" / "index.md", monkeypatch, capfd)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


# --- what is written down, here and in docstrings, is where it says -------------------------------

WRITTEN = [
    *PAGES,
    *(ROOT / name for name in ("AGENTS.md", "CONTRIBUTING.md", "tests/README.md", "Makefile")),
    *(
        path
        for folder in ("nla_lens", "adapters", "tutorials", "benchmarks", "tests/outside_package")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".ipynb", ".md", ".toml", ".txt")
    ),
]
TESTS = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}


def names_nothing(name: str, modules: dict[str, str]) -> bool:
    """Whether a dotted name of ours is neither a module nor stands in the one it begins with."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        module = ".".join(parts[:n])
        if module in modules:
            return n < len(parts) and not re.search(rf"\b{parts[n]}\b", modules[module])
        # A package without an `__init__`, or a group of entry points.
        if n == len(parts) and any(m.startswith(f"{module}.") for m in modules):
            return False
    return True


def test_names_of_ours_lead_somewhere() -> None:
    modules = house()
    # Names of loggers, file formats and entry points stand somewhere by themselves.
    others = set(re.findall(r'"(nla_lens(?:\.\w+)+)"', "".join(modules.values())))
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in WRITTEN
        for name in re.findall(r"\bnla_lens(?:\.\w+)+", path.read_text(encoding="utf-8"))
        if name not in others | {"nla_lens.egg"} and names_nothing(name, modules)
    ]
    assert not wrong, "\n".join(wrong)
    gone = ("flags", "verbalizer", "results.flaggs", "cli.main.gone", "stream.residual.Orgin")
    assert all(names_nothing(f"nla_lens.{name}", modules) for name in gone)


def test_files_that_are_named_are_there() -> None:
    rooms = [ROOT, ROOT / "nla_lens", ROOT / "adapters", ROOT / "tests"]
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in WRITTEN
        if path.suffix == ".md"
        for name in re.findall(r"`([\w/.*]+\.py)", path.read_text(encoding="utf-8"))
        if not any(any(room.glob(name)) for room in [path.parent, *rooms])
        and not any((ROOT / "nla_lens").rglob(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_list_of_tests_is_whole() -> None:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    table = text[: text.index("## Traps")]
    listed = re.findall(r"`(test_[\w*]+\.py)`", table)
    here = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in here if not any(fnmatch(name, each) for each in listed)] == []
    assert [each for each in listed if not any(fnmatch(name, each) for name in here)] == []


def test_the_tests_that_are_named_are_there() -> None:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    file, wrong = None, []
    for name, test in re.findall(r"`(test_\w+\.py)?(?:::(\w+))?", text):
        file = name or file
        if test and file and f"def {test}(" not in TESTS[file].read_text(encoding="utf-8"):
            wrong.append(f"{file}::{test}")
    assert not wrong, "\n".join(wrong)
