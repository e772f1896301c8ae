"""The README is true: its snippets run, its commands work, its transcript is what comes out."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

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
def test_the_snippets_run_one_after_the_other(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    ran = run(sys.executable, script, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "explanations.jsonl").is_file()


@pytest.mark.parametrize("command", blocks("sh")[0].splitlines())
def test_the_commands_work(command: str) -> None:
    program = Path(sys.executable).with_name("nla-lens")
    assert command.startswith("nla-lens ")
    ran = subprocess.run(
        f'"{program}" {command.removeprefix("nla-lens ")}',
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


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
def test_the_transcript_is_what_the_demo_prints() -> None:
    shown = re.search(r"<!-- transcript: (\S+) -->\n```\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    ran = run(sys.executable, shown[1])
    assert ran.returncode == 0, ran.stderr
    printed = words(ran.stdout)
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
