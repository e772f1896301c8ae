"""What a command's help looks like: examples, its own options, those that many commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


class SharedOption(click.Option):
    """An option that many commands have.

    Attributes:
        section: The heading that help shows it under.
    """

    def __init__(self, *args: Any, section: str, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.section = section


class Command(click.Command):
    """A command with examples, and with shared options apart from its own.

    Attributes:
        examples: Whole lines, as they are typed.
        takes_text: Whether an argument is a text of several words, to be put in quotes.
    """

    def __init__(
        self, *args: Any, examples: Sequence[str], takes_text: bool = False, **extra: Any
    ) -> None:
        super().__init__(*args, **extra)
        self.examples = tuple(examples)
        self.takes_text = takes_text

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        write_examples(self.examples, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            # Of the arguments the text above tells.
            if not isinstance(option, click.Option):
                continue
            shown = option.get_help_record(ctx)
            if shown is not None:
                sections.setdefault(getattr(option, "section", "Options"), []).append(shown)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """Adds lines as they are: a command that is broken in two cannot be copied."""
    with formatter.section("Examples"):
        for line in examples:
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def usage_hint(error: click.UsageError) -> str:
    """What to do about arguments that were not understood: one clause, or "" without a command."""
    command = error.ctx.command if error.ctx else None
    if error.ctx is None or command is None:
        return ""
    # click has no class of its own for arguments that are too many.
    if type(error) is click.UsageError and getattr(command, "takes_text", False):
        return f'; a text goes in quotes: {error.ctx.command_path} "Nora lives in Naples."'
    return f"; see {error.ctx.command_path} --help"
