"""What the package is made of: what an import loads, who imports whom, what is in the wheel."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
ADAPTERS = REPO / "adapters"
CORE_MODULES = sorted(
    path
    for path in (REPO / "nla_lens").rglob("*.py")
    if "adapters" not in path.relative_to(REPO).parts
)
MODULES = CORE_MODULES + sorted(ADAPTERS.rglob("*.py"))

TOOLS = {"transformer_lens", "nnsight", "sae_lens"}
HEAVY = TOOLS | {"transformers", "pandas", "peft"}


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def each(modules: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", modules, ids=relative)


# --- what `import nla_lens` loads -------------------------------------------------------------


def loaded_by(statement: str, cwd: Path) -> set[str]:
    """The packages of HEAVY that a fresh interpreter has loaded after `statement`."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    )
    return HEAVY & set(json.loads(run.stdout))


def test_importing_the_package_loads_no_heavy_library(tmp_path: Path) -> None:
    assert loaded_by("import nla_lens", tmp_path) == set()


def test_the_import_check_can_fail(tmp_path: Path) -> None:
    assert loaded_by("import nla_lens, transformers", tmp_path) >= {"transformers"}


# --- adapters -----------------------------------------------------------------------------------


def test_entry_points_name_adapters_that_exist() -> None:
    found = {point.name: point.module for point in entry_points(group="nla_lens.adapters")}
    assert found["transformer_lens"] == "nla_lens.adapters.transformer_bridge"
    for module in found.values():
        assert importlib.util.find_spec(module) is not None, module


def test_adapters_is_one_folder_seen_twice() -> None:
    link = REPO / "nla_lens" / "adapters"
    assert link.is_symlink()
    assert link.resolve() == ADAPTERS
    assert not (ADAPTERS / "__init__.py").exists()


def test_no_adapter_bears_the_name_of_its_tool() -> None:
    assert not {path.stem for path in ADAPTERS.glob("*.py")} & HEAVY


# --- rules on the source, each read from the syntax tree ------------------------------------------


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of all that is imported, `import_module("name")` included.

    Args:
        tree: A parsed module.
        package: The package it is in, which relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join((parts if node.level else []) + ([node.module] if node.module else []))
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and name_of(node.func).split(".")[-1] in {"import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def name_of(node: ast.expr) -> str:
    """`a.b.c` for a dotted name, an empty string for any other expression."""
    if isinstance(node, ast.Attribute):
        base = name_of(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def last_of(node: ast.expr) -> str:
    """`c` of `a().b.c`."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None where there is none, or no constant."""
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def is_under(module: str, roots: set[str]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


def adapter_imports(tree: ast.AST, path: str) -> list[int]:
    package = ".".join(Path(path).parent.parts)
    roots = {"nla_lens.adapters", "adapters"}
    return [line for line, module in imported(tree, package) if is_under(module, roots)]


def tool_imports(tree: ast.AST, path: str) -> list[int]:
    if path.startswith("nla_lens/engines/"):
        return []
    return [line for line, module in imported(tree, "nla_lens") if is_under(module, TOOLS)]


def asserts(tree: ast.AST, path: str) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def prints(tree: ast.AST, path: str) -> list[int]:
    if path.startswith("nla_lens/cli/"):
        return []
    return [call.lineno for call in calls(tree) if name_of(call.func) == "print"]


def pickles(tree: ast.AST, path: str) -> list[int]:
    roots = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    lines = [line for line, module in imported(tree, "nla_lens") if is_under(module, roots)]
    allowed = [call.lineno for call in calls(tree) if keyword(call, "allow_pickle") is True]
    # What libraries beneath us call unpickling, and what widens what torch.load takes.
    names = {
        "unpickle",
        "read_pickle",
        "add_safe_globals",
        "safe_globals",
        "unsafe_load",
        "full_load",
    }
    called = [call.lineno for call in calls(tree) if last_of(call.func) in names]
    loaders = {"torch.jit.load", "jit.load", "torch.hub.load", "torch.export.load", "yaml.load_all"}
    return lines + allowed + called + [c.lineno for c in calls(tree) if name_of(c.func) in loaders]


def unsafe_torch_loads(tree: ast.AST, path: str) -> list[int]:
    bare = [line for line, module in imported(tree, "nla_lens") if module == "torch.load"]
    return bare + [
        call.lineno
        for call in calls(tree)
        if name_of(call.func) == "torch.load" and keyword(call, "weights_only") is not True
    ]


def remote_code(tree: ast.AST, path: str) -> list[int]:
    lines = [call.lineno for call in calls(tree) if keyword(call, "trust_remote_code") is True]
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            pairs = list(zip(positional[::-1], node.defaults[::-1], strict=False))
            pairs += list(zip(node.kwonlyargs, node.kw_defaults, strict=True))
            lines += [
                argument.lineno
                for argument, default in pairs
                if argument.arg == "trust_remote_code"
                and isinstance(default, ast.Constant)
                and default.value is True
            ]
    return lines


Rule = Callable[[ast.AST, str], list[int]]
CORE_RULES: list[Rule] = [adapter_imports, tool_imports]
RULES: list[Rule] = [asserts, prints, pickles, unsafe_torch_loads, remote_code]


def broken(rule: Rule, source: str, path: str) -> list[str]:
    return [f"{path}:{line}" for line in rule(ast.parse(source), path)]


def all_broken(rules: list[Rule], path: Path) -> list[str]:
    """What a file breaks, each with its rule; the file is parsed once."""
    tree, name = ast.parse(path.read_text(encoding="utf-8")), relative(path)
    return [f"{name}:{line}: {rule.__name__}" for rule in rules for line in rule(tree, name)]


@each(CORE_MODULES)
def test_the_core_imports_no_adapter_and_no_tool(path: Path) -> None:
    assert all_broken(CORE_RULES, path) == []


@each(MODULES)
def test_the_library_keeps_its_rules(path: Path) -> None:
    assert all_broken(RULES, path) == []


def test_all_rules_of_a_file_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPO", tmp_path)
    path = tmp_path / "module.py"
    path.write_text("import pickle\nprint(torch.load(x))\nassert x\nload(trust_remote_code=True)\n")
    assert all_broken(RULES, path) == [
        "module.py:3: asserts",
        "module.py:2: prints",
        "module.py:1: pickles",
        "module.py:2: unsafe_torch_loads",
        "module.py:4: remote_code",
    ]


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (adapter_imports, "import nla_lens.adapters.sae"),
        (adapter_imports, "from nla_lens.adapters.sae import load_dictionary"),
        (adapter_imports, "from nla_lens import adapters"),
        (adapter_imports, "from . import adapters"),
        (adapter_imports, "from .adapters import sae"),
        (adapter_imports, "def f():\n    from .adapters.sae import load_dictionary"),
        (adapter_imports, "importlib.import_module('nla_lens.adapters.sae')"),
        (tool_imports, "import transformer_lens"),
        (tool_imports, "def f():\n    from transformer_lens.model_bridge import TransformerBridge"),
        (tool_imports, "from nnsight import LanguageModel as LM"),
        (tool_imports, "if x:\n    module = import_module('sae_lens')"),
        (asserts, "def f(x):\n    assert x, 'x'"),
        (prints, "print('loaded')"),
        (pickles, "import pickle"),
        (pickles, "from joblib import load"),
        (pickles, "np.load(path, allow_pickle=True)"),
        (pickles, "ResponseModel.unpickle(message)"),
        (pickles, "from pickle import loads"),
        (pickles, "pandas.read_pickle(path)"),
        (pickles, "with torch.serialization.safe_globals([X]): pass"),
        (pickles, "torch.jit.load(path)"),
        (unsafe_torch_loads, "torch.load(path)"),
        (unsafe_torch_loads, "torch.load(path, weights_only=False)"),
        (unsafe_torch_loads, "from torch import load"),
        (remote_code, "AutoModel.from_pretrained(path, trust_remote_code=True)"),
        (remote_code, "def load(path, *, trust_remote_code: bool = True): ..."),
        (remote_code, "def load(path, trust_remote_code=True, device=None): ..."),
    ],
)
def test_the_rules_catch_what_they_are_for(rule: Rule, source: str) -> None:
    assert broken(rule, source, "nla_lens/nla.py")


@pytest.mark.parametrize(
    ("rule", "source", "path"),
    [
        (adapter_imports, "from .. import adaptersize", "nla_lens/engines/base.py"),
        (adapter_imports, "from .spec import NLASpec", "nla_lens/nla.py"),
        (tool_imports, "import nnsight", "nla_lens/engines/nnsight_engine.py"),
        (tool_imports, "bridge = sys.modules.get('transformer_lens')", "nla_lens/extract.py"),
        (prints, "print('a table')", "nla_lens/cli/main.py"),
        (prints, "console.print('a table')", "nla_lens/results/explanation.py"),
        (
            unsafe_torch_loads,
            "torch.load(path, weights_only=True)",
            "nla_lens/checkpoints/files.py",
        ),
        (
            remote_code,
            "load(path, trust_remote_code=trust_remote_code)",
            "nla_lens/checkpoints/files.py",
        ),
        (remote_code, "def load(p, q=True, trust_remote_code=False): ...", "nla_lens/nla.py"),
    ],
)
def test_the_rules_let_the_rest_pass(rule: Rule, source: str, path: str) -> None:
    assert broken(rule, source, path) == []


def test_no_backend_unpickles_as_nnsight_does() -> None:
    """nnsight's own `finalize` and `parse` run the code that a server sends."""
    pytest.importorskip("nnsight")
    pytest.importorskip("tenacity")
    from nnsight.intervention.backends.remote import RemoteBackend

    from nla_lens.adapters.nnsight_remote import ExplainingBackend
    from nla_lens.engines.ndif.backend import NDIFBackend

    for kind in (NDIFBackend, ExplainingBackend):
        for name in ("finalize", "parse"):
            assert name in vars(kind)
            assert getattr(kind, name).__qualname__ != getattr(RemoteBackend, name).__qualname__
            assert "super" not in getattr(kind, name).__code__.co_names


@each(MODULES)
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 302


# --- what is committed --------------------------------------------------------------------------

# Spelled in two pieces, so that this file passes its own test.
MACHINE_PATH = re.compile(
    r"(?<![\w.~)}\]>-])/" + r"(root|work|opt|tmp|home/\w+|Users/\w+)(?![\w.-])"
)


@pytest.fixture(scope="module")
def committed() -> list[str]:
    """The files git knows, as paths from the repository's root."""
    if shutil.which("git") is None or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    run = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True
    )
    return [name for name in run.stdout.split("\0") if name and (REPO / name).exists()]


def test_no_committed_file_names_a_path_of_one_machine(committed: list[str]) -> None:
    found = []
    for name in committed:
        path = REPO / name
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}")
    assert found == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("cd /" + "root/project", True),
        ('"file:///' + "home/ann/x.pt" + '"', True),
        ("in /" + "tmp/ipykernel_12/1.py", True),
        ("see tests/" + "work/x and ../" + "opt/y", False),
        ("and /" + "workshop", False),
    ],
)
def test_the_path_check_catches_paths(text: str, caught: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is caught


def test_every_environment_runs_what_is_about_it() -> None:
    """Files that the Makefile leaves out of an environment do not name what is other there."""
    makefile = (REPO / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    named = {
        path.stem.removeprefix("test_"): path.read_text(encoding="utf-8")
        for path in (REPO / "tests").glob("test_*.py")
    }

    def listed(variable: str) -> set[str]:
        (names,) = re.findall(rf"^{variable} = (.+)$", makefile, re.MULTILINE)
        return set(names.split())

    left_out, taken = listed("IN_ONE_ENVIRONMENT"), listed("WITH_SAE_LENS")
    assert left_out | taken <= set(named)
    lenses = {name for name, text in named.items() if re.search(r"transformer_lens|sae_lens", text)}
    assert not lenses - taken, f"belongs into WITH_SAE_LENS: {lenses - taken}"
    assert not lenses & left_out, f"names a framework's tool: {lenses & left_out}"

    def pinned(name: str) -> dict[str, str]:
        lines = (REPO / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        return dict(line.split("==", 1) for line in lines if "==" in line and ";" not in line)

    here, there = pinned("current"), pinned("sae-lens")
    other = {name for name in here.keys() & there.keys() if here[name] != there[name]}
    assert other == {"transformer-lens"}, "more has to run there, see WITH_SAE_LENS"


# --- what is shipped ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(committed: list[str], tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built, by way of an sdist, from the committed files alone."""
    tree = tmp_path_factory.mktemp("tree")
    out = tmp_path_factory.mktemp("dist")
    for name in committed:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target, follow_symlinks=False)
    build = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"

    def run(what: str, cwd: Path) -> Path:
        command = [sys.executable, "-c", build, what, str(out)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out / done.stdout.splitlines()[-1]

    sdist = run("build_sdist", tree)
    shutil.unpack_archive(sdist, out)
    return set(zipfile.ZipFile(run("build_wheel", out / sdist.name[: -len(".tar.gz")])).namelist())


def test_the_wheel_has_all_that_is_committed(wheel: set[str], committed: list[str]) -> None:
    adapters = {f"nla_lens/{n}" for n in committed if re.fullmatch(r"adapters/[\w/]+\.py", n)}
    package = {n for n in committed if n.startswith("nla_lens/") and n != "nla_lens/adapters"}
    assert adapters | package <= wheel
    assert "nla_lens/adapters/transformer_bridge.py" in wheel
    assert any(n.startswith("nla_lens/tiny/") and n.endswith(".safetensors") for n in wheel)
    halves = {f"nla_lens/smol/{half}/adapter_model.safetensors" for half in ("av", "ar")}
    assert halves <= set(wheel) and not any("SmolLM2" in name for name in wheel)


def test_the_wheel_has_nothing_else(wheel: set[str]) -> None:
    extra = {n for n in wheel if not n.startswith(("nla_lens/", "nla_lens-"))}
    assert extra == set()


def test_the_citation_is_of_this_version() -> None:
    version = re.search(r'^version = "(.+)"$', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert version and cited["version"] == version[1]
