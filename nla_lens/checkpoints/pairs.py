"""Opening both halves of a pair, each with the base that a caller names for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.folders import Name
from nla_lens.errors import NLAError

Bases: TypeAlias = "str | Path | Mapping[str, str | Path] | None"


def open_halves(
    av: Name,
    ar: Name | None,
    *,
    bases: Bases,
    opening: Mapping[str, Callable[..., Checkpoint]],
) -> tuple[Checkpoint, Checkpoint | None]:
    """Opens a pair, each half with the base that a caller named for it.

    Args:
        av: The verbalizer.
        ar: The reconstructor, where there is one.
        bases: What adapters go onto: one for both, or {"av": ..., "ar": ...}.
        opening: `open_checkpoint`, or something like it, for each half.

    Raises:
        NLAError: A base for a half that is no adapter; or as `open_checkpoint`.
    """
    named = dict(bases) if isinstance(bases, Mapping) else dict.fromkeys(("av", "ar"), bases)
    for value in named.values():
        if not isinstance(value, (str, Path, type(None))) or set(named) - {"av", "ar"}:
            raise NLAError(
                f'base={bases!r:.80} must be a directory or hub repository, or {{"av": ..., '
                '"ar": ...}'
            )
    opened_av = opening["av"](av, role="av", base=named.get("av"))
    opened_ar = None if ar is None else opening["ar"](ar, role="ar", base=named.get("ar"))
    there = {"av": opened_av, "ar": opened_ar}
    adapters = [half for half, opened in there.items() if opened and opened.is_adapter]
    unused = {half for half, value in named.items() if value is not None} - set(adapters)
    if unused and (isinstance(bases, Mapping) or not adapters):
        opened = there[min(unused)]
        what = opened.name if opened else f"the {min(unused).upper()}"
        raise NLAError(f"base={bases!r:.200}: {what} is no adapter, so nothing goes onto a base")
    return opened_av, opened_ar
