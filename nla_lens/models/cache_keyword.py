"""What transformers calls the key-value cache: `cache` since 5.24, `past_key_values` before.

A module that is handed the other name warns, renames it, or, where it takes any keyword, decodes
without its cache and says nothing. So nobody here writes either name down.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

NAMES: Final = ("cache", "past_key_values")
"""Newest first."""
_STATES: Final = "cache_params"
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
    insides = taker.modules() if isinstance(taker, nn.Module) else [taker]
    for inside in insides:
        forward = inside.forward if isinstance(inside, nn.Module) else inside
        named = inspect.signature(forward).parameters
        for name in (*NAMES, _STATES):
            if name in named:
                return name
    return None


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments of a forward pass, under either name; None: there is none.

    >>> cache_among({"input_ids": ids, "past_key_values": cache}) is cache
    True
    """
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
