"""The entry point `nla-lens`: its commands, and how errors leave it."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import click

from nla_lens.errors import NLAError
from nla_lens.foreign import harmless
from nla_lens.plugins import load_plugin

_GROUP: Final = "nla_lens.commands"
_OWN: Final = [
    EntryPoint(name.replace("_", "-"), f"nla_lens.cli.{name}:{name}", _GROUP)
    for name in (
        *(
            "calibrate",
            "check",
            "compare",
            "evaluate",
            "examine",
            "explain",
            "explain_file",
            "info",
            "view",
        ),
    )
]


class _Commands(click.Group):
    """The commands here, and those of adapters: entry points of the group `nla_lens.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_known())

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
    return {entry.name: entry for entry in (*entry_points(group=_GROUP), *_OWN)}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nla-lens")
def cli() -> None:
    """Read a model's residual stream in words, with a number that says how far to trust them."""


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
