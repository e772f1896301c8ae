"""Checkpoints and loaded NLAs that several test files share; each is made once.

What starts the workers waits for this file: torch is not imported until a fixture is made.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nla_lens import NLA

    from .checkpoints import reference

# TransformerLens 4.3 installs torchvision, and with it another torch, when it is handed a
# multimodal model. Our code never lets it; should that break, a test must fail and not the
# environment.
os.environ["PIP_NO_INDEX"] = "1"

# How the rows of a product are shared out among threads changes its last bits: plain passes of
# transformers alone differ by 2e-6 with two threads and with one, twice what tests allow. And the
# models are small: one thread is as fast as many, and several times faster on a busy machine.
# torch reads this when it is imported, here and in processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    # Modules stay: to look through them for garbage again and again takes 3 % of the time.
    gc.freeze()


class Expected:
    """A verbalizer as `tests/checkpoints/reference.py` computes it, its answers kept."""

    N_TOKENS = 48

    def __init__(self, av: reference.AV) -> None:
        from .checkpoints import vectors

        self.av = av
        self.vectors = vectors()

    @cached_property
    def greedy(self) -> reference.Greedy:
        """48 tokens for each of six vectors, whose norms go from 1e-3 to 1e4."""
        return self.av.greedy(self.vectors, self.N_TOKENS)


@pytest.fixture(scope="session")
def pair_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """`pair_dirs(family, rule)` -> AV and AR directories."""
    from .checkpoints import build_pair

    return cache(
        lambda family, rule="replace": build_pair(
            tmp_path_factory.mktemp(f"{family}-{rule}"), family, injection=rule
        )
    )


@pytest.fixture(scope="session")
def source_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`source_dir(family)` -> a source model's directory, of the pairs' width and 6 blocks."""
    from .checkpoints import build_source

    return cache(lambda family: build_source(tmp_path_factory.mktemp(f"{family}-source"), family))


@pytest.fixture(scope="session")
def load_pair(pair_dirs: Callable[[str, str], tuple[Path, Path]]) -> Callable[[str, str], NLA]:
    """`load_pair(family, rule)` -> the NLA; not to be changed by a test."""
    from nla_lens import NLA

    def load(family: str, rule: str = "replace") -> NLA:
        av, ar = pair_dirs(family, rule)
        return NLA.from_pretrained(av=av, ar=ar, injection=None if rule == "replace" else rule)

    return cache(load)


@pytest.fixture(scope="session")
def nla(load_pair: Callable[..., NLA]) -> NLA:
    """A llama pair under the replace rule; not to be changed by a test."""
    return load_pair("llama", "replace")


@pytest.fixture(scope="session")
def expected(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[[str, str], Expected]:
    """`expected(family, rule)`: what the checkpoint computes, by independent arithmetic."""
    from .checkpoints import reference

    return cache(lambda family, rule: Expected(reference.AV(pair_dirs(family, rule)[0], rule)))
