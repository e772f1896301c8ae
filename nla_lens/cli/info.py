"""`nla-lens info CHECKPOINT`: what it is, and where each value comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from nla_lens.cli.command import Command
from nla_lens.cli.options import spec_options
from nla_lens.cli.output import print_json, print_table
from nla_lens.errors import NLAError
from nla_lens.foreign import harmless

if TYPE_CHECKING:
    from nla_lens.checkpoints.files import Checkpoint
    from nla_lens.checkpoints.spec import NLASpec


@click.command(
    cls=Command,
    short_help="Say what CHECKPOINT is; loads no weights.",
    examples=[
        "nla-lens info",
        "nla-lens info kitft/nla-qwen2.5-7b-L20 --json",
    ],
)
@click.argument("checkpoint", default="tiny")
@click.option("--ar", help="Reconstructor, where CHECKPOINT is a verbalizer alone.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@spec_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no table.")
def info(checkpoint: str, as_json: bool, **options: Any) -> None:
    """Say what CHECKPOINT is, and where each value comes from; loads no weights."""
    from nla_lens.checkpoints.spec import read_pair

    spec, av = read_pair(checkpoint, **options)
    if as_json:
        rows = {name: (getattr(spec, name), origin) for name, _, origin in spec.rows()}
        described = {
            name: {"value": value, "from": origin} for name, (value, origin) in rows.items()
        }
        print_json(described)
    else:
        print_table(spec_table(spec, title=checkpoint))
    warn_of_open_block(spec, av)


def warn_of_open_block(spec: NLASpec, av: Checkpoint) -> None:
    """Says on stderr that the prompt ends inside a block of thought, where it does."""
    from nla_lens.checkpoints.open_block import open_block_of, warning

    try:
        tag = open_block_of(spec, av)
    except NLAError:
        # A base's tokenizer may be elsewhere; what is wrong with a template loading will say.
        return
    if tag is not None:
        click.echo(f"nla-lens: warning: {warning(harmless(tag))}", err=True)


def spec_table(spec: NLASpec, *, title: str) -> Table:
    """What was loaded and where each value came from."""
    table = Table(title=Text(harmless(title)), title_justify="left", title_style="bold")
    table.add_column("field", style="bold cyan")
    table.add_column("value", overflow="fold")
    table.add_column("from", style="dim")
    for name, value, origin in spec.rows():
        table.add_row(name, Text(harmless(value)), Text(origin))
    return table
