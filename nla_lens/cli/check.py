"""`nla-lens check CHECKPOINT`: does the injection work?"""

from __future__ import annotations

from typing import Any

import click

from nla_lens.cli.options import load_nla, loading_options
from nla_lens.cli.output import print_findings


@click.command()
@click.argument("checkpoint", default="tiny")
@click.option("--ar", help="Reconstructor, where CHECKPOINT is a verbalizer alone.")
@click.option(
    "--vectors",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="How many vectors are injected.",
)
@loading_options
@click.pass_context
def check(context: click.Context, /, checkpoint: str, vectors: int, **options: Any) -> None:
    """Inject vectors into CHECKPOINT and verify that they are read.

    Exit status 1 if any finding failed.
    """
    from nla_lens.cli.injection_check import check_injection

    nla = load_nla(name=checkpoint, av=None, **options)
    findings = check_injection(nla, n_vectors=vectors)
    if not print_findings(findings):
        context.exit(1)
