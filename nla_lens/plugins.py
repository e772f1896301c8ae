"""What other packages add by entry points: adapters of frameworks, commands."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from nla_lens.errors import NLAError


def load_plugin(entry: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        NLAError: It cannot be imported; names it and its package.
    """
    try:
        return entry.load()
    except NLAError:
        raise
    # Code of strangers may raise anything.
    except Exception as error:
        origin = f" ({entry.dist.name} {entry.dist.version})" if entry.dist else ""
        raise NLAError(
            f"the entry point {entry.name}{origin} cannot be loaded from {entry.value}: "
            f"{type(error).__name__}: {error}; mend that package or uninstall it"
        ) from error
