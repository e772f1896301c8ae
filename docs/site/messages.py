"""The messages of nla_lens, read out of its code, with `…` for what is filled in."""

import ast
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


def messages(root: Path) -> Iterator[tuple[str, str]]:
    """(file, message) of each error and warning that is raised, in the order of the files."""
    for folder in ("nla_lens", "adapters"):
        for path in sorted((root / folder).rglob("*.py")):
            if path.is_relative_to(root / "nla_lens" / "adapters"):
                continue  # the same files by their other name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and node.args and _name(node.func) in _RAISED:
                    said = template(node.args[0])
                    if said.strip(" …"):
                        yield path.relative_to(root).as_posix(), said


def _name(called: ast.expr) -> str:
    return ast.unparse(called).split(".")[-1]


def template(node: ast.expr) -> str:
    """A string, with `…` for each value that is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(v) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


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
    file = None
    for path, message in messages(root):
        if path != file:
            file = path
            lines += ["", f"## {path}", ""]
        quoted = " ".join(message.split())
        ticks = "``" if "`" in quoted else "`"
        pad = " " if "`" in quoted else ""
        lines.append(f"* {ticks}{pad}{quoted}{pad}{ticks}")
    return "\n".join(lines) + "\n"
