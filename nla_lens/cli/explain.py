"""`nla-lens explain TEXT`: what the source model holds at each position of a text."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from nla_lens.checks import is_unicode
from nla_lens.cli.command import Command
from nla_lens.cli.options import halves_options, load_nla, loading_options, parse_positions
from nla_lens.cli.output import print_json, print_table
from nla_lens.errors import NLAError


@click.command(
    cls=Command,
    short_help="Say what a model holds at each token of TEXT.",
    takes_text=True,
    examples=[
        'nla-lens explain "Nora lives in Naples."',
        'nla-lens explain "Nora lives in Naples." --positions -1 --json',
        'nla-lens explain "Nora lives in" --generate 3 --html nora.html',
        "nla-lens explain - < story.txt",
    ],
)
@click.argument("text")
@click.option(
    "--positions",
    help='Which tokens: "3", "-1", "0,5,-2", "2:8"; default: all.',
)
@click.option("--model", help="Source model: directory or hub repository; default: the NLA's own.")
@click.option(
    "--generate",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Also explain N tokens it writes.",
)
@click.option("--max-new-tokens", default=200, show_default=True, help="Longest explanation.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is argmax.")
@click.option("--num-samples", default=1, show_default=True, help="Best of N; needs a temperature.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--batch-size", type=int, help="Most vectors at once; default: from free memory.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no table.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a page to this file.")
@halves_options
@loading_options
def explain(
    text: str,
    positions: str | None,
    model: str | None,
    generate: int,
    as_json: bool,
    html: str | None,
    **options: Any,
) -> None:
    """Run the source model on TEXT and say what it holds at each position.

    TEXT "-" reads standard input. Columns: cos and fve_nrm compare the vector with what the
    explanation alone reconstructs; fve_nrm 1 is perfect, 0 no better than the mean vector.
    """
    from nla_lens.results.display import to_table

    if not text.strip():
        raise NLAError('TEXT is empty; give a sentence in quotes, or "-" to read standard input')
    if os.path.isfile(text):
        raise NLAError(
            f"{text!r} is a file here, and TEXT is explained as it stands: "
            f"`nla-lens explain - < {text}` reads it, explain-file many of them"
        )
    if html and not Path(html).absolute().parent.is_dir():
        raise NLAError(f"--html {html!r}: there is no such folder")
    if text == "-":
        text = _standard_input()
    wished = {k: options.pop(k) for k in _EXPLAIN_OPTIONS}
    picked = parse_positions(positions)
    nla = load_nla(**options)
    stopped: BaseException | None = None
    try:
        found = nla.explain_text(text, picked, model=model, generate=generate, **wished)
    except KeyboardInterrupt as interrupt:
        found, stopped = getattr(interrupt, "explanations", None), interrupt
        if not found:
            raise
        click.echo(f"{len(found)} explanations were finished", err=True)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(to_table(found.flat))
    if html:
        found.to_html(html)
    if stopped is not None:
        raise stopped


def _standard_input() -> str:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:
        text = "\udcff"
    if not is_unicode(text):
        raise NLAError("standard input is no UTF-8; convert it first, as by iconv -t UTF-8")
    if not text.strip():
        raise NLAError("standard input is empty; there is no text to explain")
    return text


_EXPLAIN_OPTIONS = ("max_new_tokens", "temperature", "num_samples", "seed", "batch_size")
