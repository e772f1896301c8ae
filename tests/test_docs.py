"""The README is true: its snippets run, its commands work, its transcript is what comes out."""

import re
import runpy
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from .test_rooms import house

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HAS_BRIDGE = not version("transformer-lens").startswith("2.")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def words(text: str) -> str:
    """Text without table lines and spacing, which depend on the terminal's width."""
    return " ".join(re.sub(r"[─│┃━┏┓┗┛┡┩╇┳┻┼]", " ", text).split())


@pytest.mark.skipif(not HAS_BRIDGE, reason="the snippets load a TransformerBridge")
def test_the_snippets_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "explanations.jsonl").is_file()


@pytest.mark.parametrize("command", blocks("sh")[0].splitlines())
def test_the_commands_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The program as it is installed, in this process: importing torch takes longest of all."""
    program = Path(sys.executable).with_name("nla-lens")
    name, *arguments = shlex.split(command)
    assert name == "nla-lens"
    monkeypatch.setattr(sys, "argv", [str(program), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    printed = capfd.readouterr()
    assert ended.value.code in (None, 0), printed.err
    assert printed.out


def test_the_snippet_for_a_server_runs() -> None:
    import torch

    import nla_lens

    from .model_server import ModelServer

    local = nla_lens.NLA.from_pretrained("tiny")
    verbalizer: Any = local.verbalizer
    vectors = torch.randn(2, local.spec.d_model)
    with ModelServer("vllm", verbalizer.engine.model, verbalizer.tokenizer, "tiny/av") as server:
        (snippet,) = blocks("python server")
        names: dict[str, Any] = {"nla_lens": nla_lens, "vectors": vectors}
        exec(snippet.replace("http://localhost:8000", server.url), names)
    found = names["explanations"]
    assert [e.text for e in found] == [e.text for e in local.explain(vectors)]
    assert all(e.cos is not None for e in found)


def test_make_runs_what_the_readme_promises() -> None:
    for target, needed in (("demo", "tutorials/demo.py"), ("test", "pytest")):
        printed = run("make", "--dry-run", "--always-make", target).stdout
        assert needed in printed


@pytest.mark.skipif(not HAS_BRIDGE, reason="the demo loads a TransformerBridge")
def test_the_transcript_is_what_the_demo_prints(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = re.search(r"<!-- transcript: (\S+) -->\n```\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    monkeypatch.setattr(sys, "argv", [shown[1]])
    try:
        runpy.run_path(str(ROOT / shown[1]), run_name="__main__")
    finally:
        logging.enable_progress_bar()  # The demo shows none.
    printed = words(capfd.readouterr().out)
    lines = [words(line) for line in shown[2].splitlines() if words(line)]
    assert len(lines) > 10
    missing = [line for line in lines if line != "…" and line not in printed]
    assert not missing, missing


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_of_releases_is_the_one_in_the_code() -> None:
    from nla_lens.checkpoints.releases import KNOWN_RELEASES

    for release in KNOWN_RELEASES:
        name = release.stem if release.ar else release.av
        row = next(line for line in README.splitlines() if f"`{name}`" in line)
        assert release.source_model in row and f"| {release.layer} |" in row


# --- what is written down, here and in docstrings, is where it says -------------------------------

WRITTEN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md", "Makefile")),
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
