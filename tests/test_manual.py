"""The manual says what the code says: errors, releases, flags, extras, commands."""

import ast
import re
import runpy
import shlex
from functools import cache
from typing import Any

import click
import pytest
import yaml

from .snippets import PAGES, ROOT, blocks

DOCS = ROOT / "docs"
MESSAGES = runpy.run_path(str(DOCS / "site" / "messages.py"))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def first_column(text: str) -> list[str]:
    """What stands first in each row of the tables, their headings left out."""
    rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [row for row in rows if "`" in row]


# --- errors ---------------------------------------------------------------------------------------


@cache
def strings() -> str:
    """Every string of the code, one a line, with `…` for what is filled in."""
    found = []
    for folder in ("nla_lens", "adapters"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Constant, ast.JoinedStr)):
                    found.append(" ".join(MESSAGES["template"](node).split()))
    found += [" ".join(message.split()) for _, message in MESSAGES["messages"](ROOT)]
    return "\n".join(found)


def is_said(quoted: str) -> bool:
    """Whether the code says it: `…` stands for what is filled in, or for words left out."""
    pattern = ".*?".join(map(re.escape, filter(None, re.split(r"\s*…\s*", quoted))))
    return re.search(pattern, strings()) is not None


def test_errors_that_are_quoted_are_said() -> None:
    quoted = [q for row in first_column(page("errors.md")) for q in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 80
    wrong = [q for q in quoted if not is_said(q)]
    assert not wrong, "\n".join(wrong)
    assert not is_said("vectors have shape …; this NLA reads vectors of depth d_model=…")


def test_the_errors_a_caller_meets_first_are_explained() -> None:
    """Each error that `nla.explain` raises of a vector, and `from_pretrained` of a spec."""
    quoted = [q for row in first_column(page("errors.md")) for q in re.findall(r"`([^`]+)`", row)]
    patterns = [
        ".*?".join(map(re.escape, filter(None, re.split(r"\s*…\s*", quote)))) for quote in quoted
    ]
    rooms = ("nla_lens/stream/vectors.py", "nla_lens/stream/injection.py", "nla_lens/nla.py")
    said = [message for path, message in MESSAGES["messages"](ROOT) if path in rooms]
    assert len(said) > 8
    unexplained = [m for m in said if not any(re.search(p, m) for p in patterns)]
    assert unexplained == ["expected one explanation per position, found …"]  # of ours alone


def test_every_message_is_listed() -> None:
    text = MESSAGES["as_page"](ROOT)
    assert "this NLA has no reconstructor; load one with ar=" in text
    assert text.count("\n* ") > 500
    assert "## adapters/nnsight_model.py" in text
    # Said by way of a name, a function, a server's client.
    assert "the reconstructor failed (…: …); the texts are there, their scores are not" in text
    assert "the server at … answered without a list of answers" in text
    anchors = re.findall(r"\{#([^}]+)\}$", text, re.MULTILINE)
    assert len(anchors) == len(set(anchors)) == text.count("\n* ")
    assert "this-nla-has-no-reconstructor-load-one" in anchors


def test_no_message_escapes_the_list() -> None:
    """What is raised without words of its own passes on what was said elsewhere."""
    silent = {
        (path, said)
        for path, module, call in MESSAGES["raised"](ROOT)
        for said in MESSAGES["spelled"](call.args[0], module)
        if not said.strip(" …:")
    }
    assert silent == {
        ("nla_lens/checks.py", "…: …"),
        ("nla_lens/cli/view.py", "……"),
        ("nla_lens/engines/served/channel.py", "…"),
        ("nla_lens/engines/served/server.py", "…"),
        ("nla_lens/engines/served/verbalizer.py", "…"),
        ("nla_lens/evaluation/compare.py", "…: …"),
        ("nla_lens/models/limited.py", "…"),
        ("nla_lens/results/store.py", "…: …"),
        ("adapters/ray_jobs.py", "…"),
        ("adapters/ray_workers.py", "…"),
    }


def test_every_class_of_errors_is_listed() -> None:
    made = {
        (node.name, ast.unparse(base))
        for folder in ("nla_lens", "adapters")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }
    ours = {"NLAError"}
    while more := {name for name, base in made if base in ours} - ours:
        ours |= more
    assert {"NLARemoteError", "NotOnHub"} < ours
    assert ours <= MESSAGES["_RAISED"]


# --- tables ---------------------------------------------------------------------------------------


def test_the_table_of_releases_is_the_one_in_the_code() -> None:
    from nla_lens.checkpoints.releases import KNOWN_RELEASES

    rows: dict[str, list[str]] = {}
    for row in page("releases.md").splitlines():
        if row.startswith("| `"):  # in two tables
            name, *cells = (cell.strip(" `") for cell in row.split("|")[1:-1])
            rows.setdefault(name, []).extend(cells)
    assert len(rows) == len(KNOWN_RELEASES)
    for release in KNOWN_RELEASES:
        name = release.stem if release.ar else release.av
        scale, reported = release.injection_scale, release.reported_fve_nrm
        assert rows[name] == [
            release.source_model,
            str(release.layer),
            str(release.d_model),
            "AV + AR" if release.ar else "AV",
            release.injection,
            "none" if scale is None else f"{scale:g}",
            f"{release.var_nrm:g}",
            "not given" if reported is None else f"{reported:g}",
        ]


def test_the_flags_are_those_of_the_code() -> None:
    from nla_lens.results import flags

    text = page("index.md")
    table = text[text.index("| flag |") :].split("\n\n")[0]
    names = {v for k, v in vars(flags).items() if k.isupper() and isinstance(v, str)}
    assert {row.strip("`") for row in first_column(table)} == names - {flags.PADDING}


def test_the_extras_are_those_of_the_package() -> None:
    import sys

    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    described = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(described["project"]["optional-dependencies"])
    text = page("index.md")
    table = text[text.index("| extra |") :].split("\n\n")[0]
    assert {name for row in first_column(table) for name in re.findall(r"`(.+?)`", row)} == extras
    for source in PAGES:
        text = source.read_text(encoding="utf-8")
        for named in re.findall(r"(?:nla-lens|\.)\[([a-z,-]+)\]", text):
            assert set(named.split(",")) <= extras, (source.name, named)


# --- commands -------------------------------------------------------------------------------------


def cli() -> Any:
    from nla_lens.cli.main import cli

    return cli


def test_every_command_has_a_row() -> None:
    from nla_lens.cli.main import _OWN

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (section,) = re.findall(r'entry-points\."nla_lens\.commands"\]\n(.*?)\n\n', text, re.DOTALL)
    added = re.findall(r"^([a-z-]+) = ", section, re.MULTILINE)
    named = [row.strip("`").split()[1] for row in first_column(page("reference/command_line.md"))]
    assert sorted(named) == sorted([*added, *(entry.name for entry in _OWN)])


def test_commands_that_are_only_shown_would_be_taken() -> None:
    """What a block names is run, or at least its command and options are known."""
    shown = [
        (block.page, line)
        for source in PAGES
        for block in blocks(source)
        if not block.language
        for line in block.text.splitlines()
        if line.startswith("nla-lens ")
    ]
    assert shown
    group = cli()
    for source, line in shown:
        _, name, *arguments = shlex.split(line, comments=True)
        found = group.get_command(click.Context(group), name)
        assert found is not None, (source.name, line)
        known = {option for parameter in found.params for option in parameter.opts}
        assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= known, line


def test_targets_of_make_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    files = [*PAGES, ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"]
    for source in files:
        text = source.read_text(encoding="utf-8")
        for name in re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE):
            assert name in targets, (source.name, name)


# --- pages ----------------------------------------------------------------------------------------


def listed(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inside = nav.values() if isinstance(nav, dict) else nav
    return [name for each in inside for name in listed(each)]


def test_every_page_is_in_the_manual() -> None:
    """A new page goes into `nav` of mkdocs.yml, and with one line into docs/llms.txt."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [path for path in PAGES if path.is_relative_to(DOCS)]
    # Those of the course are listed by docs/site/hooks.py.
    here = {path.relative_to(DOCS).as_posix() for path in pages if path.parent.name != "course"}
    made = set(shown_elsewhere()) | {"every_message.md"}
    assert set(listed(config["nav"])) - made == here
    assert set(re.findall(r"\]\(([^)]+\.md)\)", page("llms.txt"))) == here


def test_what_publishes_the_manual_names_what_is_here() -> None:
    published = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text(encoding="utf-8"))
    named = [published["mkdocs"]["configuration"]]
    named += [step["requirements"] for step in published["python"]["install"]]
    assert all((ROOT / name).is_file() for name in named)


def shown_elsewhere() -> list[str]:
    """Pages that are files of the repository elsewhere, as docs/site/hooks.py lists them."""
    text = (DOCS / "site" / "hooks.py").read_text(encoding="utf-8")
    (shown,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SHOWN"
    )
    assert all((ROOT / source).is_file() for source in shown)
    return list(shown.values())


def test_the_readme_is_one_screen_and_links() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    snippets = [block for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert all(len(block.text.split("\n\n")[-1].splitlines()) <= 5 for block in snippets)
