"""The benchmarks run; what they measure is not judged here, since no test depends on a clock."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "benchmarks" / "run.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, RUN, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_page_is_printed_and_written(tmp_path: Path) -> None:
    out = tmp_path / "cpu.txt"
    parts = ("machine", "AV", "import")
    ran = run("--parts", *parts, "--vectors", "2", "--repeats", "1", "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    assert out.read_text(encoding="utf-8") == ran.stdout
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("commit ")
    for part in parts:
        assert part in (line.strip() for line in lines)
    (verbalizing,) = (line for line in lines if "20 to 150 tokens" in line)
    # Seconds, a rate and four ratios, each a positive number.
    numbers = [float(cell) for cell in verbalizing.split("│")[2:-1]]
    assert len(numbers) == 6
    assert all(number > 0 for number in numbers)


def test_bad_options_are_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(RUN.parent)
    monkeypatch.setattr(sys, "argv", [str(RUN), "--parts", "AV", "nothing"])
    monkeypatch.setattr("transformers.utils.logging.set_verbosity_error", lambda: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RUN), run_name="__main__")
    assert ended.value.code == 2
    assert "no part nothing" in capfd.readouterr().err


def test_what_evaluate_costs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts in both; that none is reconstructed twice is looked at there, too."""
    monkeypatch.syspath_prepend(RUN.parent)
    found = runpy.run_path(str(RUN.with_name("evaluating.py")))["measure"](16)
    assert found["vectors"] == 16 and found["texts reconstructed"] > 100
    needed = found["explaining, s"] + found["reconstructing, s"]
    assert found["ratio"] == pytest.approx(found["evaluate, s"] / needed, rel=0.1)
