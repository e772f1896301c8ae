"""`nla-lens evaluate`: every measure of an NLA with its control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nla_lens.cli.command import Command
from nla_lens.cli.options import halves_options, load_nla, loading_options
from nla_lens.cli.output import print_json, print_table
from nla_lens.errors import NLAError


@click.command(
    cls=Command,
    short_help="Measure an NLA on FILES, each measure with its control.",
    examples=[
        "nla-lens evaluate texts/*.txt --budget 200",
        "nla-lens evaluate --table explanations.parquet --rows fve_nrm,retrieval",
    ],
)
@click.argument("files", nargs=-1)
@click.option("--table", help="Instead of FILES: explanations (parquet, JSON lines, CSV, a store).")
@click.option("--model", help="Source model: directory or hub repository; default: the NLA's own.")
@click.option("--rows", help="Which rows, separated by commas; default: all.")
@click.option("--budget", type=click.IntRange(min=1), help="Most vectors.")
@click.option("--positions", multiple=True, help="As in explain-file; default: 8 a document.")
@click.option("--store", help="A folder that keeps the explanations, to go on with.")
@click.option("--seed", default=0, show_default=True, help="Makes what is drawn repeatable.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no table.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a page to this file.")
@click.option("--plots", type=click.Path(file_okay=False), help="Also draw into this folder.")
@halves_options
@loading_options
def evaluate(
    files: tuple[str, ...],
    table: str | None,
    rows: str | None,
    positions: tuple[str, ...],
    as_json: bool,
    html: str | None,
    plots: str | None,
    model: str | None,
    budget: int | None,
    store: str | None,
    seed: int,
    **options: Any,
) -> None:
    """Measure an NLA on the texts in FILES so that generic text cannot pass.

    Each row stands beside its control, with an interval over documents and a verdict.
    """
    from nla_lens.evaluation.evaluate import evaluate as run

    named = None if rows is None else [name.strip() for name in rows.split(",")]
    if table is not None:
        if files:
            raise NLAError("--table is evaluated alone; leave FILES out")
        report = run(table=table, rows=named, seed=seed)
    else:
        if not files:
            raise NLAError("name FILES to evaluate on, or --table")
        report = run(
            load_nla(**options),
            [Path(file) for file in files],
            model=model,
            rows=named,
            budget=budget,
            positions=list(positions) or None,
            store=store,
            seed=seed,
        )
    if html:
        report.to_html(html)
    if plots:
        report.plot(plots)
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report.to_table())
