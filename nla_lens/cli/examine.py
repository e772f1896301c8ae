"""`nla-lens examine`: one explanation, claim by claim."""

from __future__ import annotations

from typing import Any

import click

from nla_lens.cli.command import Command
from nla_lens.cli.options import halves_options, load_nla, loading_options
from nla_lens.cli.output import print_json, print_table
from nla_lens.cli.stored import is_stored, read_stored


@click.command(
    cls=Command,
    short_help="Say what speaks for each sentence of an explanation.",
    takes_text=True,
    examples=[
        'nla-lens examine "Nora lives in Naples." --position 4',
        "nla-lens examine notes --row 12",
    ],
)
@click.argument("source")
@click.option("--position", default=-1, show_default=True, help="Of a text: which token.")
@click.option("--row", default=0, show_default=True, help="Of a store or file: which row.")
@click.option("--context", help="The text read so far, where it is not known.")
@click.option("--num-samples", default=0, show_default=True, help="Further samples to be asked.")
@click.option("--seed", default=0, show_default=True, help="Of these.")
@click.option("--model", help="Source model: directory or hub repository; default: the NLA's own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no table.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a page to this file.")
@halves_options
@loading_options
def examine(
    source: str,
    position: int,
    row: int,
    context: str | None,
    num_samples: int,
    seed: int,
    model: str | None,
    as_json: bool,
    html: str | None,
    **options: Any,
) -> None:
    """Say what speaks for each sentence and quotation of an explanation.

    SOURCE: a text, of which one token is explained; or a store of `explain-file`, or a file of
    `Explanations.save`, of which one row is taken. Support is how much fidelity falls without a
    sentence; a quotation that is not in the text read so far is marked "not there".
    """
    from nla_lens.evaluation.examine import examine as run
    from nla_lens.results.explanations import Explanations

    wished: dict[str, Any] = {"num_samples": num_samples, "seed": seed}
    stored = read_stored(source, row) if is_stored(source) else None
    nla = load_nla(**options)
    if stored is None:
        found = run(nla, source, position=position, model=model, context=context, **wished)
    else:
        known = stored.context if context is None else context
        found = run(nla, stored.explanation, vector=stored.vector, context=known, **wished)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(found.to_table())
    if html:
        Explanations([found.explanation], (1,)).to_html(html)
