"""What transformers calls the key-value cache: `cache` since 5.24, `past_key_values` before.

A module that is handed the other name warns, renames it, or, where it takes any keyword, decodes
without its cache and says nothing. So nobody here writes either name down.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

from torch import nn

NAMES: Final = ("cache", "past_key_values")
"""Newest first."""
STATES: Final = "cache_params"
"""What families call it that keep states alone (Mamba)."""


def cache_keyword(taker: nn.Module | Callable[..., Any]) -> str:
    """The keyword by which a module, or the first module in it that says so, takes its cache.

    A wrapper that passes on any keyword (PEFT's, DataParallel) says nothing by itself.
    """
    return _keyword(taker) or NAMES[-1]


def takes_cache(taker: nn.Module | Callable[..., Any]) -> bool:
    """Whether it takes any."""
    return _keyword(taker) is not None


def _keyword(taker: nn.Module | Callable[..., Any]) -> str | None:
    for named in _named(taker):
        for name in (*NAMES, STATES):
            if name in named:
                return name
    return None


def taken_by(taker: nn.Module, options: Collection[str]) -> set[str]:
    """Which options of a pass a module takes.

    One that takes any keyword may hand it on, so those count that a module in it names; what none
    of them names would be ignored, or be an error (`logits_to_keep` in Bloom before transformers
    5).
    """
    named = inspect.signature(taker.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values()):
        return set(options) & set(named)
    found: set[str] = set()
    for inside in _named(taker):
        found |= set(options) & set(inside)
        if len(found) == len(options):
            break
    return found


def _named(taker: nn.Module | Callable[..., Any]) -> Iterator[Mapping[str, inspect.Parameter]]:
    """The parameters of a module's forward, and of those in it, or of a function."""
    for inside in taker.modules() if isinstance(taker, nn.Module) else [taker]:
        forward = inside.forward if isinstance(inside, nn.Module) else inside
        yield inspect.signature(forward).parameters


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments of a forward pass, under either name; None: there is none.

    >>> cache_among({"input_ids": ids, "past_key_values": cache}) is cache
    True
    """
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
