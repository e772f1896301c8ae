"""The command line: one file a command; adapters add theirs by entry points."""

from nla_lens.cli.main import cli, main

__all__ = ["cli", "main"]
