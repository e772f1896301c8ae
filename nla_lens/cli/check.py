"""`nla-lens check CHECKPOINT`: does the injection work?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import click

from nla_lens.cli.command import Command
from nla_lens.cli.options import load_nla, loading_options
from nla_lens.cli.output import Finding, print_findings


@click.command(
    cls=Command,
    short_help="Verify that CHECKPOINT reads what is injected.",
    examples=[
        "nla-lens check",
        "nla-lens check my-checkpoint --vectors 32",
        "nla-lens check my-checkpoint --schema",
    ],
)
@click.argument("checkpoint", required=False)
@click.option("--ar", help="Reconstructor, where CHECKPOINT is a verbalizer alone.")
@click.option(
    "--vectors",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="How many vectors are injected.",
)
@click.option(
    "--schema",
    is_flag=True,
    help="Hold CHECKPOINT's nla_meta.yaml, or a file, against the JSON schema, and load nothing; "
    "without CHECKPOINT, print the schema.",
)
@loading_options
@click.pass_context
def check(
    context: click.Context,
    /,
    checkpoint: str | None,
    vectors: int,
    schema: bool,
    **options: Any,
) -> None:
    """Inject vectors into CHECKPOINT (default: tiny) and verify that they are read.

    Exit status 1 if any finding failed.
    """
    if schema and checkpoint is None:
        from nla_lens.checkpoints.schema import SCHEMA_PATH

        click.echo(SCHEMA_PATH.read_text(encoding="utf-8").rstrip())
        return
    findings: Iterable[Finding]
    if schema:
        findings = check_sidecars(str(checkpoint), options["ar"], options["revision"])
    else:
        from nla_lens.cli.injection_check import check_injection

        nla = load_nla(name=checkpoint or "tiny", av=None, **options)
        findings = check_injection(nla, n_vectors=vectors)
    if not print_findings(findings):
        context.exit(1)


def check_sidecars(checkpoint: str, ar: str | None, revision: str | None) -> Iterator[Finding]:
    """One finding for each complaint about a sidecar; one for a sidecar without any."""
    from nla_lens.checkpoints.schema import findings, sidecars_of

    for path in sidecars_of(checkpoint, ar=ar, revision=revision):
        wrong = findings(path)
        yield from (Finding(str(path), False, complaint) for complaint in wrong)
        if not wrong:
            yield Finding(str(path), True, "as the schema has it")
