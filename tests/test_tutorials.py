"""Every notebook in tutorials/ runs from top to bottom, offline."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))


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


@pytest.mark.parametrize("path", [*filter(can_run_here, NOTEBOOKS)], ids=lambda path: path.stem)
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": TUTORIALS}}
    ).execute()
    shown = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in shown if o.output_type == "error"]
    assert len(shown) >= 3, "a tutorial shows something"


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
