"""What the manual is made of besides the pages in docs/. mkdocs calls these functions by name.

Some files of the repository are pages, too (CONTRIBUTING.md and others). Links to them lead to the
files, as on the repository's own page; here they are turned to the pages, and what a link to any
other file says stays without it.
"""

import posixpath
import re
import runpy
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SHOWN = {
    "CONTRIBUTING.md": "project/contributing.md",
    "tests/README.md": "project/tests.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
    "tutorials/tiny_nla/MODEL_CARD.md": "project/tiny.md",
    "tutorials/smol_nla/MODEL_CARD.md": "project/smol.md",
}
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1(?:>>>|\.\.\.) .*)*", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


@event_priority(100)
def on_config(config: MkDocsConfig) -> None:
    """Lists the course, and lets the reference be read from a copy.

    There `adapters` is a package: it is a link without an `__init__`, where griffe looks for no
    modules. And examples in docstrings are blocks of code, not quotations of quotations.
    """
    # Held by the config, and removed with it.
    config.extra["copy"] = copy = tempfile.TemporaryDirectory(prefix="nla-lens-docs-")
    package = Path(copy.name, "nla_lens")
    shutil.copytree(ROOT / "nla_lens", package, ignore=_not_code)
    shutil.copytree(ROOT / "adapters", package / "adapters", ignore=_not_code)
    (package / "adapters" / "__init__.py").touch()
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(_EXAMPLE.sub(_as_block, text), encoding="utf-8")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [copy.name]
    course = sorted((ROOT / "docs" / "course").glob("*.md"))
    config.nav.insert(2, {"Course": [{_title(page): f"course/{page.name}"} for page in course]})


def _title(page: Path) -> str:
    """A page's heading; mkdocs sees none below a comment, and would take the file's name."""
    return re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)[1]


def _as_block(match: re.Match[str]) -> str:
    lines = [line.removeprefix(match[1])[4:] for line in match[0].splitlines()]
    return "\n".join(match[1] + line for line in ["```python", *lines, "```"])


def _not_code(folder: str, names: list[str]) -> set[str]:
    return {n for n in names if n in ("adapters", "tiny", "smol", "templates", "__pycache__")}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not lie in docs/."""
    for source, place in SHOWN.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    listed = runpy.run_path(str(Path(__file__).with_name("messages.py")))["as_page"](ROOT)
    files.append(File.generated(config, "every_message.md", content=listed))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to their pages, or into names."""
    places = {place: source for source, place in SHOWN.items()}
    here = posixpath.dirname(places.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(here, target))
        place = SHOWN.get(path) or path.removeprefix("docs/")
        if place != path and files.get_file_from_path(place):
            relative = posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")
            return f"[{words}]({relative}{anchor})"
        # A missing one is mkdocs' to find.
        return words if (ROOT / path).exists() else match[0]

    return _LINK.sub(link, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Follows what the pages say when they are built, names of the reference included.

    mkdocs looks at the links of what was written, not at those that others made of it.

    Raises:
        PluginError: A link that leads nowhere, or a page that asks another host for something.
    """
    site = Path(config.site_dir)
    pages = {path: _Page.read(path) for path in site.rglob("*.html")}
    wrong = [
        f"{path.relative_to(site)}: {said}"
        for path, page in pages.items()
        for said in [
            *(f"loads {url} from elsewhere" for url in page.loaded if urlsplit(url).netloc),
            *(f"{url} leads nowhere" for url in page.links if not _leads(url, path, pages)),
        ]
        if path.name != "404.html"  # its links are for the root of a server
    ]
    if wrong:
        raise PluginError("\n".join(wrong))


def _leads(url: str, path: Path, pages: dict[Path, "_Page"]) -> bool:
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return True  # out of the site
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if target not in pages:
        return target.is_file()
    return not parts.fragment or unquote(parts.fragment) in pages[target].names


class _Page(HTMLParser):
    """Names, links, and what is loaded when the page is opened."""

    _NOT_LOADED = ("canonical", "prev", "next", "alternate", "license")

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = {"__skip", "__tabbed"}
        self.links: list[str] = []
        self.loaded: list[str] = []

    @classmethod
    def read(cls, path: Path) -> "_Page":
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names.update(filter(None, (given.get("id"), given.get("name"))))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in self._NOT_LOADED:
            self.loaded.append(given.get("href", ""))
        loaded = [given[name] for name in ("src", "data", "poster", "srcset") if name in given]
        self.loaded += loaded
        self.links += [*loaded, given["href"]] if tag == "link" and "href" in given else loaded
