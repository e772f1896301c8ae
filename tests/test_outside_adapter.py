"""A framework and a command from another package, found through its entry points alone.

`outside_package/` is what such a package looks like. It is built and unpacked as pip would do it,
and only then can it be found.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import nla_lens
from nla_lens import NLA, NLAError, ResidualTensor
from nla_lens.models.weights import load_causal_lm, load_tokenizer

from .test_packaging import REPO

PACKAGE = Path(__file__).parent / "outside_package"
TEXT = "The garlic sizzles."


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `sys.path` with the package and its metadata, out of its wheel."""
    here = tmp_path_factory.mktemp("outside")
    shutil.copytree(PACKAGE, here / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(here)]
    done = subprocess.run(command, cwd=here / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(here / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(here / "site")
    return here / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package, importable in this process and forgotten afterwards."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(site)
        yield site
    for name in [n for n in sys.modules if n.split(".")[0] in ("toy_stream", "nla_toy")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def weights(source_dir: Callable[[str], Path]) -> tuple[Any, Any]:
    """A source model and its tokenizer."""
    path = source_dir("llama")
    return load_causal_lm(path), load_tokenizer(path)


@pytest.fixture
def stream(installed: Path, weights: tuple[Any, Any]) -> Any:
    from toy_stream import Stream

    return Stream(*weights)


def test_what_a_stream_keeps_can_be_explained(stream: Any, nla: NLA) -> None:
    ids_BT = torch.tensor([stream.tokenizer(TEXT)["input_ids"]])
    plain_logits, plain = stream.run(ids_BT, keep=[2, 3])
    with nla_lens.attach(stream, nla) as probe:
        logits, kept = stream.run(ids_BT, keep=[2, 3])
    assert type(probe) is nla_lens.Probe and not probe.attached
    assert torch.equal(logits, plain_logits)
    for block in (2, 3):
        assert isinstance(kept[block], ResidualTensor) and type(plain[block]) is torch.Tensor
        assert torch.equal(kept[block].as_ordinary(), plain[block])

    e = kept[3][0, -1].explain(max_new_tokens=4)
    wanted = nla.explain(plain[3][0, -1], max_new_tokens=4)
    assert (e.text, e.token_ids, e.cos) == (wanted.text, wanted.token_ids, wanted.cos)
    assert (e.hook_name, e.position) == ("blocks.3.hook_resid_post", ids_BT.shape[1] - 1)
    assert e.token == stream.tokenizer.decode(ids_BT[0, -1:])
    assert "other_layer" not in e.flags
    assert "other_layer" in kept[2][0, -1].explain(max_new_tokens=1).flags
    assert type(stream.run(ids_BT, keep=[3])[1][3]) is torch.Tensor, "detached"


def test_a_stream_is_a_source(stream: Any, weights: tuple[Any, Any], nla: NLA) -> None:
    texts = [TEXT, "Rain", "Two friends speak."]
    for positions in (None, [-1, 0]):
        found = nla_lens.extract(stream, texts, 3, positions=positions)
        wanted = nla_lens.extract(weights[0], texts, 3, positions, tokenizer=weights[1])
        for ours, theirs in zip(found, wanted, strict=True):
            # One batch runs whole, the other one cut and padded: the same but for rounding.
            torch.testing.assert_close(
                ours.as_ordinary(), theirs.as_ordinary(), rtol=1e-5, atol=1e-5
            )
            assert torch.equal(ours.origin.where_LX3, theirs.origin.where_LX3)
            assert ours.hook_name == theirs.hook_name == "blocks.3.hook_resid_post"
    ids = stream.tokenizer(TEXT)["input_ids"]
    alone = stream.run(torch.tensor([ids]), keep=[3])[1][3][0]
    assert torch.equal(nla_lens.extract(stream, TEXT, 3)[0].as_ordinary(), alone)

    found = nla.explain_text(TEXT, [-1], model=stream, generate=2, max_new_tokens=2)
    on = weights[0].generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)[0, len(ids) :]
    assert [e.token for e in found][1:] == [stream.tokenizer.decode([i]) for i in on.tolist()]


def test_what_does_not_fit_is_refused(stream: Any, nla: NLA) -> None:
    with pytest.raises(NLAError, match="layer 6 does not exist"):
        nla_lens.extract(stream, TEXT, 6)
    stream.width = 32
    with pytest.raises(NLAError, match="this Stream has d_model=32"):
        nla_lens.attach(stream, nla)


def test_without_the_package_there_is_no_adapter(
    site: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[Any, Any], nla: NLA
) -> None:
    """Nothing but the entry point brings it in."""
    shutil.copytree(site / "toy_stream", site.parent / "framework" / "toy_stream")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(site.parent / "framework")
        from toy_stream import Stream

        with pytest.raises(NLAError, match=r"no adapter for toy_stream\.Stream"):
            nla_lens.attach(Stream(*weights), nla)
    del sys.modules["toy_stream"]


def test_an_adapter_that_cannot_be_imported_is_named(
    stream: Any, installed: Path, monkeypatch: pytest.MonkeyPatch, nla: NLA
) -> None:
    monkeypatch.setitem(sys.modules, "nla_toy.adapter", None)
    for call in (lambda: nla_lens.attach(stream, nla), lambda: nla_lens.extract(stream, TEXT, 3)):
        with pytest.raises(NLAError, match=r"toy_stream \(nla-toy 0\.1\.0\) .* nla_toy\.adapter"):
            call()


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", "from nla_lens.cli import main; main()", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_command_of_the_package(site: Path, tmp_path: Path) -> None:
    listed = run(site, "--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "toy-blocks Say which block CHECKPOINT reads." in " ".join(listed.stdout.split())
    ran = run(site, "toy-blocks", "tiny")
    layer = nla_lens.checkpoints.spec.read_spec("tiny").layer
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"tiny reads block {layer}\n", "")
    bad = run(site, "toy-blocks", str(tmp_path))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("nla-lens: ") and len(bad.stderr.splitlines()) == 1


def test_a_command_that_cannot_be_loaded_hides_no_other(site: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(site, tmp_path / "site")
    (broken / "nla_toy" / "command.py").write_text("import no_such_module\n", encoding="utf-8")
    listed = run(broken, "--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "info " in listed.stdout and "toy-blocks" in listed.stdout
    ran = run(broken, "toy-blocks", "tiny")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert len(ran.stderr.splitlines()) == 1
    assert "toy-blocks (nla-toy 0.1.0)" in ran.stderr and "no_such_module" in ran.stderr


def test_it_needs_no_private_name() -> None:
    """And what it takes from the rooms is told to whoever writes the next one."""
    nodes = [
        node
        for path in (PACKAGE / "nla_toy").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    taken = {
        (str(node.module), alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nla_lens")
        for alias in node.names
    }
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert ("nla_lens.stream.residual", "Origin") in taken and "listeners" in used
    assert not [word for word in used | {f"{m}.{n}" for m, n in taken} if re.search(r"\b_", word)]
    told = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for module, name in taken:
        if module == "nla_lens":
            assert name in nla_lens.__all__
        else:
            assert re.search(rf"`{name}`|\b{name}\(", told), f"{name} of {module}"


def test_the_entry_points_are_those_of_the_documentation(installed: Path) -> None:
    (adapter,) = entry_points(group="nla_lens.adapters", name="toy_stream")
    (command,) = entry_points(group="nla_lens.commands", name="toy-blocks")
    assert adapter.dist is not None and adapter.dist.name == "nla-toy"
    assert command.value == "nla_toy.command:toy_blocks"
