"""The messages of nla_lens, read out of its code, with `…` for what is filled in."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

_RAISED = {
    "DamagedWeightsError",
    "NLAError",
    "NLARemoteError",
    "NLAWarning",
    "NotOnHub",
    "UnsupportedDictionaryError",
}
_OF_A_SERVER = {"error", "_error"}


def messages(root: Path) -> Iterator[tuple[str, str]]:
    """(file, message) of each error and warning that is raised, in the order of the files."""
    for path, module, call in raised(root):
        begun = "the server at … " if _name(call.func) in _OF_A_SERVER else ""
        for said in spelled(call.args[0], module):
            if said.strip(" …:"):
                yield path, begun + said


def raised(root: Path) -> Iterator[tuple[str, ast.Module, ast.Call]]:
    """(file, what is in it, the call) of each error and warning that is made with a message."""
    for folder in ("nla_lens", "adapters"):
        for path in sorted((root / folder).rglob("*.py")):
            if path.is_relative_to(root / "nla_lens" / "adapters"):
                continue  # the same files by their other name
            module = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(module):
                if isinstance(node, ast.Call) and node.args and _is_raised(node.func, path):
                    yield path.relative_to(root).as_posix(), module, node


def _is_raised(called: ast.expr, path: Path) -> bool:
    # A client's own method, that says which server it was.
    served = path.parent.name == "served" and isinstance(called, ast.Attribute)
    return _name(called) in _RAISED or (served and _name(called) in _OF_A_SERVER)


def _name(called: ast.expr) -> str:
    return ast.unparse(called).split(".")[-1]


def spelled(node: ast.expr, module: ast.Module) -> list[str]:
    """A message, or several where a name or a function of the module says what it may be."""
    if isinstance(node, ast.IfExp):
        return spelled(node.body, module) + spelled(node.orelse, module)
    sources: list[ast.expr | None] = []
    if isinstance(node, ast.Name):
        sources = [
            each.value
            for each in ast.walk(module)
            if isinstance(each, ast.Assign) and node.id in map(ast.unparse, each.targets)
        ]
    elif isinstance(node, ast.Call):
        sources = [
            each.value
            for function in ast.walk(module)
            if isinstance(function, ast.FunctionDef) and function.name == _name(node.func)
            for each in ast.walk(function)
            if isinstance(each, ast.Return)
        ]
    found = [said for each in sources if _is_text(each) for said in spelled(each, module)]
    return list(dict.fromkeys(found)) or [template(node)]


def _is_text(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    return isinstance(node, (ast.JoinedStr, ast.BinOp, ast.IfExp))


def template(node: ast.expr) -> str:
    """A string, with `…` for each value that is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(v) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def _anchor(quoted: str, taken: set[str]) -> str:
    """What a link to a message ends with: its first words."""
    name = "-".join(re.findall(r"[a-z0-9_]+", quoted.lower())[:7]) or "message"
    same = (f"{name}-{n}" for n in itertools.count(2))
    while name in taken:
        name = next(same)
    taken.add(name)
    return name


def as_page(root: Path) -> str:
    """A page of all of them."""
    lines = [
        "---",
        "search: {boost: 3}",
        "---",
        "",
        "# Every message",
        "",
        "All errors and warnings of this version, read out of its code. `…` stands for what is",
        "filled in. Causes and remedies of those that are met most: [Errors](errors.md).",
    ]
    file, taken = None, set()
    for path, message in messages(root):
        if path != file:
            file = path
            lines += ["", f"## {path}", ""]
        quoted = " ".join(message.split())
        ticks = "``" if "`" in quoted else "`"
        pad = " " if "`" in quoted else ""
        lines.append(f"* {ticks}{pad}{quoted}{pad}{ticks}{{#{_anchor(quoted, taken)}}}")
    return "\n".join(lines) + "\n"
