"""What would go out, built from a checkout as every file system gives it, and installed afresh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SENTENCE = "The garlic sizzles in the pan."


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it sees nothing of the checkout that the tests run in."""
    # Nothing may be installed by the tests, these excepted.
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_NO_INDEX")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed files without symbolic links: git writes a link's target into a file there."""
    root = tmp_path_factory.mktemp("checkout")
    for name in run("git", "ls-files", "-z", cwd=REPO).split("\0")[:-1]:
        there = root / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if (REPO / name).is_symlink():
            there.write_text(os.readlink(REPO / name))
        else:
            shutil.copy2(REPO / name, there)
    assert (root / "nla_lens" / "adapters").is_file()
    return root


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nla_lens-*.tar.gz`, and the wheel that is built from it and from nothing else."""
    out = tmp_path_factory.mktemp("dist")
    backend = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", backend, out, cwd=checkout)
    (sdist,) = out.glob("nla_lens-*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out)
    run(*pip, sdist, cwd=out)
    return out


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with what the package asks for, without any extra."""
    root = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", root, cwd=root)
    return root / "bin" / "python"


@pytest.fixture(scope="module")
def installed(python: Path, dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    constraints = REPO / "constraints" / "current.txt"
    run(python, "-m", "pip", "install", "-q", wheel, "-c", constraints, cwd=dist)
    return python


def explained(python: Path, cwd: Path) -> dict[str, object]:
    command = [python.parent / "nla-lens", "explain", SENTENCE, "--positions", "-1", "--json"]
    (explanation,) = json.loads(run(*command, cwd=cwd))["explanations"]
    found: dict[str, object] = explanation
    return found


def test_sdist_and_wheel_hold_the_same_code(checkout: Path, dist: Path) -> None:
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    code = {
        path.relative_to(checkout).as_posix().replace("adapters/", "nla_lens/adapters/", 1)
        for root in ("nla_lens", "adapters")
        for path in (checkout / root).rglob("*")
        if path.is_file() and path.suffix in (".py", ".safetensors", ".json", ".yaml", ".typed")
    }
    assert len(code) > 100
    assert code <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_works_alone(installed: Path, tmp_path: Path) -> None:
    where = run(installed, "-c", "import nla_lens; print(nla_lens.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    assert run(installed.parent / "nla-lens", "--version", cwd=tmp_path).strip()
    found = explained(installed, tmp_path)
    assert found["complete"] and found["text"] and float(str(found["cos"])) > 0.8


def test_commands_start_without_the_extras(installed: Path, tmp_path: Path) -> None:
    command = installed.parent / "nla-lens"
    listed = run(command, "--help", cwd=tmp_path).split("Commands:")[1].split("Examples:")[0]
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    assert {"explain", "features", "doctor", "view"} <= set(names)
    for name in names:
        assert "Usage:" in run(command, name, "--help", cwd=tmp_path)
    assert "ok" in run(command, "check", "tiny", cwd=tmp_path).lower()


def test_a_job_and_its_page_without_the_extras(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SENTENCE)
    command = installed.parent / "nla-lens"
    run(command, "explain-file", "a.txt", "--out", "store", cwd=tmp_path)
    run(command, "view", "store", "--out", "page.html", cwd=tmp_path)
    assert "garlic" in (tmp_path / "page.html").read_text()


def test_what_needs_an_extra_names_it(installed: Path, tmp_path: Path) -> None:
    code = (
        "import nla_lens\n"
        "found = nla_lens.NLA.from_pretrained('tiny').explain_text('Garlic.')\n"
        "for call in (found.to_pandas, found.plot):\n"
        "    try: call()\n"
        "    except nla_lens.NLAError as error: print(error)\n"
    )
    said = run(installed, "-c", code, cwd=tmp_path).splitlines()
    assert len(said) == 2 and "pandas" in said[0] and "plots" in said[1]
