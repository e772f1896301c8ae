"""`nla-lens compare A B`: two residuals in words, and which sentences tell them apart."""

from __future__ import annotations

from typing import Any

import click

from nla_lens.cli.command import Command
from nla_lens.cli.options import halves_options, load_nla, loading_options, parse_positions
from nla_lens.cli.output import print_json, print_table
from nla_lens.cli.stored import is_stored, read_stored
from nla_lens.errors import NLAError


@click.command(
    cls=Command,
    short_help="Say what tells two texts, or two residuals, apart.",
    takes_text=True,
    examples=[
        'nla-lens compare "Nora lives in Naples." "The fox chased the dog."',
        "nla-lens compare notes other-notes --row-a 3 --row-b 5",
    ],
)
@click.argument("a")
@click.argument("b")
@click.option(
    "--positions",
    default="-1",
    show_default=True,
    help='Of texts: which tokens: "3", "-1", "0,5,-2", "2:8".',
)
@click.option("--row-a", default=0, show_default=True, help="Where A is a store: which row.")
@click.option("--row-b", default=0, show_default=True, help="Where B is a store: which row.")
@click.option("--model", help="Source model: directory or hub repository; default: the NLA's own.")
@click.option("--model-b", help="The model that reads B, a fine-tuned one, say; default: --model.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no table.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a page to this file.")
@halves_options
@loading_options
def compare(
    a: str,
    b: str,
    positions: str,
    row_a: int,
    row_b: int,
    model: str | None,
    model_b: str | None,
    as_json: bool,
    html: str | None,
    **options: Any,
) -> None:
    """Say what two residuals hold, and which sentences tell them apart.

    A and B: texts, of which the last tokens are compared; or stores that keep vectors (explain-file
    --vectors), of which one row each is. Each text is scored against both vectors.
    """
    from nla_lens.evaluation.compare import compare as run

    listed = parse_positions(positions)
    picked = listed[0] if isinstance(listed, list) and len(listed) == 1 else listed
    side_a = _side(a, row_a, picked, model)
    side_b = _side(b, row_b, picked, model_b or model)
    found = run(load_nla(**options), side_a, side_b)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(found.to_table())
    if html:
        found.to_html(html)


def _side(source: str, row: int, positions: Any, model: str | None) -> Any:
    if not is_stored(source):
        return {"text": source, "positions": positions, "model": model}
    stored = read_stored(source, row)
    if stored.vector is None:
        raise NLAError(f"{source} holds no vectors to be compared; make it with --vectors")
    return stored.vector
