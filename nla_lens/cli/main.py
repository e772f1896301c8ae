"""The entry point `nla-lens`: its commands, and how errors leave it."""

from __future__ import annotations

import difflib
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import click

from nla_lens.cli.command import usage_hint, write_examples
from nla_lens.cli.surroundings import open_streams, stopped_by_signals
from nla_lens.errors import NLAError
from nla_lens.foreign import harmless
from nla_lens.plugins import load_plugin

_GROUP: Final = "nla_lens.commands"
_OWN: Final = [
    EntryPoint(name.replace("_", "-"), f"nla_lens.cli.{name}:{name}", _GROUP)
    for name in (
        "explain",
        "explain_file",
        "view",
        "examine",
        "compare",
        "evaluate",
        "calibrate",
        "info",
        "check",
    )
]

_EXAMPLES: Final = (
    'nla-lens explain "Nora lives in Naples."',
    "nla-lens explain-file notes.txt --out notes",
    "nla-lens view notes --open",
)


class _Commands(click.Group):
    """The commands here, and those of adapters: entry points of the group `nla_lens.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_known())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], known, 1)
            remedy = (
                f'a text is explained by: nla-lens explain "{args[0]}"'
                if " " in args[0]
                else f"did you mean {near[0]}?"
                if near
                else f"there are {', '.join(known)}"
            )
            raise NLAError(f"there is no command {args[0]!r}; {remedy}")
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(_EXAMPLES, formatter)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _known().get(cmd_name)
        if entry is None:
            return None
        try:
            command: click.Command = load_plugin(entry)
        except NLAError as error:
            return _Unusable(cmd_name, error)
        return command


class _Unusable(click.Command):
    """Stands for a command that cannot be loaded, so that the others are listed and work."""

    def __init__(self, name: str, error: NLAError) -> None:
        super().__init__(name, short_help="(cannot be loaded)")
        self._error = error

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        raise self._error


def _known() -> dict[str, EntryPoint]:
    """In the order in which one meets them; those of other packages come last, and hide none."""
    added = sorted(entry_points(group=_GROUP), key=lambda entry: entry.name)
    own = {entry.name: entry for entry in _OWN}
    return own | {entry.name: entry for entry in added if entry.name not in own}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nla-lens")
def cli() -> None:
    """Read a model's residual stream in words, with a number that says how far to trust each line.

    An NLA of a small model is included, so that everything works offline.
    """


def main() -> None:
    """Entry point: bad input is one line on stderr and exit status 2."""
    open_streams()
    try:
        with stopped_by_signals() as stopped:
            sys.exit(cli.main(prog_name="nla-lens", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message(), err=True)
        sys.exit(2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail(*stopped.said())
    except click.UsageError as error:
        _fail(f"{error.format_message().rstrip('.')}{usage_hint(error)}", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (NLAError, OSError) as error:
        _fail(str(error), 2)


def _fail(message: str, status: int) -> None:
    # A message may quote a file of a stranger's; nothing of it may steer the terminal.
    click.echo(f"nla-lens: {harmless(' '.join(message.split()))}", err=True)
    sys.exit(status)
