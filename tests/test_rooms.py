"""The rooms of the house, in the order in which they may import; read from the imports themselves.

Imports for types, late ones inside functions and names handed to `import_module` count, too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from functools import cache

import networkx
import pytest

from .test_packaging import REPO, imported

ROOMS: list[set[str]] = [
    {"nla_lens.foreign"},
    {"nla_lens.errors"},
    {"nla_lens.checks", "nla_lens.plugins", "nla_lens.progress"},
    {"nla_lens.disk"},
    {"nla_lens.models"},
    {"nla_lens.stream"},
    {"nla_lens.checkpoints"},
    {"nla_lens.results", "nla_lens.engines"},
    {"nla_lens.halves"},
    {"nla_lens.nla"},
    {"nla_lens.jobs"},
    {"nla_lens.evaluation"},
    {"nla_lens"},
    {"nla_lens.cli"},
    {"nla_lens.adapters"},
]
"""From the ground up: a room imports from itself and from floors below it, never beside it."""
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
Files = Mapping[str, str]
"""Module names and their sources."""


def room_of(module: str) -> str:
    """The longest room a module is in."""
    return max((r for r in FLOORS if f"{module}.".startswith(f"{r}.")), key=len)


@cache
def house() -> Files:
    """Every module of the package."""
    found = {}
    for root, prefix in ((REPO / "nla_lens", "nla_lens"), (REPO / "adapters", "nla_lens.adapters")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if root.name == "nla_lens" and parts[0] == "adapters":
                continue
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found[name] = path.read_text(encoding="utf-8")
    return found


@cache
def names_in(source: str, package: str) -> frozenset[str]:
    """Everything that a module imports; read once for all tests."""
    return frozenset(name for _, name in imported(ast.parse(source), package))


def arrows(files: Files) -> set[tuple[str, str]]:
    """Who imports whom, as modules; `from a import b` goes to `a.b` where that is a module."""
    found = set()
    for module, source in files.items():
        is_package = any(other.startswith(f"{module}.") for other in files)
        package = module if is_package else module.rpartition(".")[0]
        named = names_in(source, package) & files.keys()
        whole = {name for name in named if any(n.startswith(f"{name}.") for n in named)}
        found |= {(module, name) for name in named - whole - {module}}
    return found


def climbs(files: Files) -> list[str]:
    """Imports from a floor above, or from a room beside."""
    return sorted(
        f"{a} imports {b}"
        for a, b in arrows(files)
        if room_of(a) != room_of(b) and FLOORS[room_of(b)] >= FLOORS[room_of(a)]
    )


def circles(links: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Groups of modules that import each other, however long the way round."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(list(links)))
    return [group for group in groups if len(group) > 1]


def test_no_import_climbs() -> None:
    assert climbs(house()) == []


def test_no_circle() -> None:
    assert circles(arrows(house())) == []


def test_the_rooms_of_the_engines_stand_in_order() -> None:
    """The local ones know no server; NDIF's and the other servers' do not know each other."""
    links = {(".".join(a.split(".")[:3]), ".".join(b.split(".")[:3])) for a, b in arrows(house())}
    assert ("nla_lens.engines.local", "nla_lens.engines.ndif") not in links
    assert ("nla_lens.engines.local", "nla_lens.engines.served") not in links
    assert ("nla_lens.engines.ndif", "nla_lens.engines.served") not in links
    assert ("nla_lens.engines.served", "nla_lens.engines.ndif") not in links


def test_every_module_is_in_a_room_of_the_table() -> None:
    at_the_top = {p.stem for p in (REPO / "nla_lens").glob("*.py")} - {"__init__"}
    assert {f"nla_lens.{name}" for name in at_the_top} <= set(FLOORS)
    assert len(at_the_top) < 8
    assert set(FLOORS) - {"nla_lens"} <= set(house()) | {"nla_lens.adapters"}


def test_contributing_shows_the_same_table() -> None:
    shown = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", shown, re.MULTILINE)
    assert [set(re.findall(r"`([\w.]+)`", rooms)) for _, rooms in rows] == ROOMS


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("nla_lens.stream.residual", "from nla_lens.nla import NLA"),
        (
            "nla_lens.errors",
            "if TYPE_CHECKING:\n    from nla_lens.results import flags",
        ),
        ("nla_lens.models.weights", "def f():\n    from nla_lens.engines.local import decoding"),
        ("nla_lens.results.flags", "from nla_lens.engines import Job"),
        ("nla_lens.checkpoints.spec", "from ..halves import verbalizer"),
        ("nla_lens.nla", "import_module('nla_lens.cli.main')"),
        ("nla_lens.halves.verbalizer", "from nla_lens.adapters.sae import load_dictionary"),
    ],
)
def test_a_climb_is_seen(module: str, line: str) -> None:
    files = house()
    assert len(climbs({**files, module: f"{files[module]}\n{line}\n"})) == 1


def test_a_circle_is_seen() -> None:
    links = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "a")]
    assert circles(links) == [{"a", "b", "c"}]
    files = house()
    line = "def f():\n    from nla_lens.stream.vectors import VectorBatch\n"
    wrong = {**files, "nla_lens.stream.residual": files["nla_lens.stream.residual"] + line}
    assert circles(arrows(wrong)) == [{"nla_lens.stream.residual", "nla_lens.stream.vectors"}]
