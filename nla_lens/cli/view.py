"""`nla-lens view STORE|FILE`: a page to look at explanations in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nla_lens.cli.command import Command
from nla_lens.errors import NLAError

if TYPE_CHECKING:
    from nla_lens.results.store import Store


@click.command(
    cls=Command,
    short_help="Make a page to look at what explain-file wrote.",
    examples=[
        "nla-lens view notes",
        "nla-lens view notes --serve --open",
        "nla-lens view explanations.jsonl --out page.html",
    ],
)
@click.argument("source")
@click.option("--out", help="The page's file; default: SOURCE's name with .html, in this folder.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N documents.")
@click.option("--serve", is_flag=True, help="Show it on this machine and follow a running job.")
@click.option("--port", default=8021, show_default=True, help="Where --serve listens; 0: any.")
@click.option("--open", "open_it", is_flag=True, help="Open it in a browser.")
def view(
    source: str, out: str | None, limit: int | None, serve: bool, port: int, open_it: bool
) -> None:
    """Write one HTML file in which each token of SOURCE shows what it holds.

    SOURCE: the store of `explain-file`, or a file of `Explanations.save`. The page works from disk,
    asks nothing of any network, and is read by mouse, touch or keyboard.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise NLAError(f"{source} is not there")
    if serve:
        from nla_lens.cli.page_server import serve_store

        serve_store(_store(path), port=port, limit=limit, open_it=open_it)
        return
    target = Path(out) if out else Path(f"{_base(path)}.html")
    written = _write(path, target, limit)
    click.echo(str(written))
    if open_it:
        click.launch(str(written))


def _base(path: Path) -> str:
    """A name without the suffix of what `Explanations.save` writes."""
    return path.resolve().name.removesuffix(".jsonl").removesuffix(".parquet")


def _store(path: Path) -> Store:
    from nla_lens.results.store import open_store

    if not path.is_dir():
        raise NLAError(f"--serve shows a store, and {path} is a file; leave --serve out")
    return open_store(path)


def _write(path: Path, target: Path, limit: int | None) -> Path:
    if path.is_dir():
        return _store(path).to_html(target, limit=limit)
    from nla_lens.results.explanations import Explanations

    try:
        found = Explanations.load(path)
    except NLAError as error:
        remedy = f"; of a text, make a store first: nla-lens explain-file {path} --out STORE"
        raise NLAError(f"{error}{remedy}") from error
    return found.to_html(target)
