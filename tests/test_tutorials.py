"""Every notebook in tutorials/ runs from top to bottom, offline."""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
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


def marks(path: Path) -> list[pytest.MarkDecorator]:
    """Of a notebook that takes minutes."""
    slow = nbformat.read(path, as_version=4).metadata.get("slow", False)
    return [pytest.mark.slow, pytest.mark.timeout(600)] if slow else []


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=marks(path))
        for path in filter(can_run_here, NOTEBOOKS)
    ],
)
def test_runs(path: Path, kernel: KernelManager) -> None:
    notebook = nbformat.read(path, as_version=4)
    # Nothing that another notebook named is there any more.
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=240).execute()
    shown = [o for cell in notebook.cells[1:] for o in cell.get("outputs", [])]
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
