"""The command line: `nla-lens explain`, `info`, `check`, and what adapters add."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from nla_lens.checks import harmless
from nla_lens.errors import NLAError

if TYPE_CHECKING:
    from nla_lens.checkup import Finding

_Command = TypeVar("_Command", bound=Callable[..., Any])

_HALVES = [
    click.option(
        "--nla",
        "name",
        help="Embedded pair, pair's stem on the hub or on disk, or a verbalizer; default: tiny.",
    ),
    click.option("--av", help="Verbalizer: directory or hub repository, instead of --nla."),
    click.option("--ar", help="Reconstructor: directory or hub repository."),
]
_SPEC = [
    click.option(
        "--injection",
        type=click.Choice(["replace", "norm_matched_add"]),
        help="The rule, where neither sidecar nor known release says it.",
    ),
    click.option("--injection-scale", type=float, help="The norm vectors are injected at."),
    click.option("--layer", type=int, help="K, where neither sidecar nor known release says it."),
]
_LOADING = [
    click.option("--dtype", help="float32, bfloat16 or float16; default: what config.json says."),
    click.option("--device", help="cpu, cuda, cuda:1, mps; default: cpu."),
    click.option("--device-map", help='"auto" spreads a large model over the devices there are.'),
    click.option("--revision", help="Branch, tag or commit on the hub."),
    *_SPEC,
    click.option(
        "--engine",
        default="transformers",
        show_default=True,
        help="Where the halves run: transformers, transformer_lens, nnsight, ndif, vllm, sglang.",
    ),
    click.option("--url", help="The vLLM or SGLang server: http://HOST:PORT."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code from the checkpoint."),
]


def _with(options: list[Any]) -> Callable[[_Command], _Command]:
    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


halves_options = _with(_HALVES)
"""Which NLA, for commands of others; `load_nla` takes what they give."""
loading_options = _with(_LOADING)
"""How it is loaded."""


class _Commands(click.Group):
    """The commands here, and those of adapters: entry points of the group `nla_lens.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_added()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in _added():
            found = _added()[cmd_name].load()
        return found


def _added() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="nla_lens.commands")}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nla-lens")
def cli() -> None:
    """Read a model's residual stream in words, with a number that says how far to trust them."""


@cli.command()
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
@_with(_HALVES + _LOADING)
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
    from nla_lens.display import to_table

    if html and not Path(html).absolute().parent.is_dir():
        raise NLAError(f"--html {html!r}: there is no such folder")
    if text == "-":
        text = sys.stdin.read()
    wished = {k: options.pop(k) for k in _EXPLAIN_OPTIONS}
    picked = parse_positions(positions)
    nla = load_nla(**options)
    try:
        found = nla.explain_text(text, picked, model=model, generate=generate, **wished)
    except KeyboardInterrupt as interrupt:
        found = getattr(interrupt, "explanations", None)
        if not found:
            raise
        click.echo(f"interrupted; {len(found)} explanations were finished", err=True)
    if as_json:
        click.echo(json.dumps(_finite(found.to_dict())))
    else:
        print_table(to_table(found.flat))
    if html:
        found.to_html(html)


def _finite(values: Any) -> Any:
    """The same with null for the numbers JSON does not have, such as the score of a NaN."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


_EXPLAIN_OPTIONS = ("max_new_tokens", "temperature", "num_samples", "seed", "batch_size")


@cli.command()
@click.argument("checkpoint", default="tiny")
@click.option("--ar", help="Reconstructor, where CHECKPOINT is a verbalizer alone.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@_with(_SPEC)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no table.")
def info(checkpoint: str, as_json: bool, **options: Any) -> None:
    """Say what CHECKPOINT is, and where each value comes from; loads no weights."""
    from nla_lens.display import spec_table
    from nla_lens.spec import read_spec

    spec = read_spec(checkpoint, **options)
    if as_json:
        rows = {name: (getattr(spec, name), origin) for name, _, origin in spec.rows()}
        described = {
            name: {"value": value, "from": origin} for name, (value, origin) in rows.items()
        }
        click.echo(json.dumps(described))
    else:
        print_table(spec_table(spec, title=checkpoint))


@cli.command()
@click.argument("checkpoint", default="tiny")
@click.option("--ar", help="Reconstructor, where CHECKPOINT is a verbalizer alone.")
@click.option(
    "--vectors",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="How many vectors are injected.",
)
@_with(_LOADING)
@click.pass_context
def check(context: click.Context, /, checkpoint: str, vectors: int, **options: Any) -> None:
    """Inject vectors into CHECKPOINT and verify that they are read.

    Exit status 1 if any finding failed.
    """
    from nla_lens.checkup import check_injection

    nla = load_nla(name=checkpoint, av=None, **options)
    findings = check_injection(nla, n_vectors=vectors)
    if not print_findings(findings):
        context.exit(1)


_MARKS = {True: ("ok  ", "green"), False: ("FAIL", "red"), None: ("    ", None)}


def print_findings(findings: Iterable[Finding]) -> bool:
    """Prints findings as they come; says whether none of them failed."""
    passed = True
    for finding in findings:
        mark, colour = _MARKS[finding.passed]
        click.echo(f"{click.style(mark, fg=colour)} {finding.name}: {finding.detail}")
        passed &= finding.passed is not False
    return passed


def load_nla(*, name: str | None, av: str | None, **options: Any) -> Any:
    """The NLA that the options of `halves_options` and `loading_options` name."""
    from nla_lens.nla import NLA

    if name is None and av is None:
        name = "tiny"
    return NLA.from_pretrained(name, av=av, **options)


def parse_positions(positions: str | None) -> list[int] | slice | None:
    """Reads "3", "-1", "0,5,-2" or "2:8".

    Raises:
        NLAError: Something else.
    """
    if positions is None:
        return None
    try:
        if ":" in positions:
            parts = [int(p) if p.strip() else None for p in positions.split(":")]
            if len(parts) <= 3:
                return slice(*parts)
        return [int(p) for p in positions.split(",")]
    except ValueError:
        pass
    raise NLAError(f'--positions {positions!r} is not of the form "3", "-1", "0,5,-2" or "2:8"')


def print_table(table: Any) -> None:
    """Prints a rich table, as wide as the terminal."""
    console = Console()
    # Piped into a file there is no width to fit: use a fixed one that keeps rows readable.
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=120)
    console.print(table)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit status 2."""
    try:
        sys.exit(cli.main(prog_name="nla-lens", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message(), err=True)
        sys.exit(2)
    except click.exceptions.Abort:
        _fail("interrupted", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (NLAError, OSError) as error:
        _fail(str(error), 2)


def _fail(message: str, status: int) -> None:
    # A message may quote a file of a stranger's; nothing of it may steer the terminal.
    click.echo(f"nla-lens: {harmless(' '.join(message.split()))}", err=True)
    sys.exit(status)
