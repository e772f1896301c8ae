"""`nla-lens toy-blocks`: a command of another package."""

from __future__ import annotations

from typing import Any

import click

from nla_lens.checkpoints.spec import read_spec
from nla_lens.cli.options import spec_options


@click.command()
@click.argument("checkpoint", default="tiny")
@spec_options
def toy_blocks(checkpoint: str, **options: Any) -> None:
    """Say which block CHECKPOINT reads."""
    click.echo(f"{checkpoint} reads block {read_spec(checkpoint, **options).layer}")
