"""`nla-lens calibrate`: how often explanations like one are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nla_lens.cli.command import Command
from nla_lens.cli.options import halves_options, load_nla, loading_options
from nla_lens.cli.output import print_json
from nla_lens.errors import NLAError
from nla_lens.results.calibration import calibration_path


@click.command(
    cls=Command,
    short_help="Learn from known errors how far to trust others.",
    examples=[
        "nla-lens calibrate texts/*.txt --nla my-checkpoint",
        "nla-lens calibrate --table rated.parquet --label right --out my-checkpoint-av",
    ],
)
@click.argument("files", nargs=-1)
@click.option(
    "--table",
    type=click.Path(path_type=Path),
    help="Instead of FILES: explanations with a score (parquet, JSON lines, CSV, what .save wrote) "
    "or a store.",
)
@click.option(
    "--label",
    help="Column that is true or 1 where the explanation is right; default: it is right if all it "
    "quotes stands in the text read so far (of a table: in column context).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A checkpoint's folder, or a .json file; default: beside the checkpoint, if it is a "
    "folder of yours.",
)
@click.option("--support", is_flag=True, help="Also leave out each sentence once; takes longer.")
@click.option("--model", help="Source model: directory or hub repository; default: the NLA's own.")
@click.option("--budget", type=click.IntRange(min=1), help="Most vectors.")
@click.option("--positions", multiple=True, help="As in explain-file; default: 8 a document.")
@click.option("--store", help="A folder that keeps the explanations, to go on with.")
@click.option("--seed", default=0, show_default=True, help="Makes what is drawn repeatable.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a page to this file.")
@click.option("--plots", type=click.Path(file_okay=False), help="Also draw into this folder.")
@halves_options
@loading_options
def calibrate(
    files: tuple[str, ...],
    table: Path | None,
    label: str | None,
    out: Path | None,
    support: bool,
    model: str | None,
    budget: int | None,
    positions: tuple[str, ...],
    store: str | None,
    seed: int,
    as_json: bool,
    html: str | None,
    plots: str | None,
    **options: Any,
) -> None:
    """Learn from explanations whose errors are known how far to trust others.

    They are explanations of the texts in FILES, or those of --table, which needs no checkpoint.
    AUROC, ECE and Brier are measured on documents that were held out, beside length, cos and
    fve_nrm alone. What is learned is written to nla_calibration.json (--out): loaded with the
    checkpoint it lies beside, it gives every explanation its `trust`.
    """
    from nla_lens.evaluation.calibrate import calibrate as run
    from nla_lens.evaluation.labels import QUOTES

    labels = QUOTES if label is None else label
    if table is not None:
        if files:
            raise NLAError("--table is calibrated alone; leave FILES out")
        written = None if out is None else calibration_path(out)
        found = run(table, path=out, seed=seed, labels=labels)
    else:
        if not files:
            raise NLAError("name FILES with texts to explain, or --table")
        nla = load_nla(**options)
        where = nla.home if out is None else out
        written = None if where is None else calibration_path(where)
        found = run(
            nla,
            [Path(file) for file in files],
            path=out,
            support=support,
            model=model,
            budget=budget,
            positions=list(positions) or None,
            store=store,
            seed=seed,
            labels=labels,
        )
    if html:
        found.to_html(html)
    if plots:
        found.plot(plots)
    if as_json:
        print_json(found.to_dict())
        return
    click.echo(repr(found))
    click.echo(f"written to {written}" if written else "not written: say where with --out")
