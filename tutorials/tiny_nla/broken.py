"""NLAs that are broken on purpose, in ways that still write fluent text: what measures are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

from nla_lens import NLA
from nla_lens.models.block_reader import BlockReader

CONSTANT = "It reads like a story. It ends with “the dog”. Next comes a full stop."


def injection_one_off(name: str = "tiny") -> NLA:
    """The vector is injected one position behind the marker."""
    nla = NLA.from_pretrained(name)
    verbalizer: Any = nla.verbalizer
    prompt = verbalizer._prompt
    verbalizer._prompt = replace(prompt, marker=verbalizer.marker_position + 1)
    return nla


def reconstructor_of_another_layer(name: str = "tiny") -> NLA:
    """The reconstructor is read at block 1, and its head was trained on the last one."""
    nla = NLA.from_pretrained(name)
    engine: Any = nla.reconstructor and nla.reconstructor.engine
    engine.reader = BlockReader(engine.model, 1)
    return nla


def constant_verbalizer(name: str = "tiny") -> NLA:
    """The verbalizer writes one text, whatever the vector."""
    nla = NLA.from_pretrained(name)
    verbalizer: Any = nla.verbalizer
    original = verbalizer.answers

    def answers(_: Any, *args: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        for row, answer in original(*args, **{**options, "max_new_tokens": 1}):
            yield row, replace(answer, text=CONSTANT, complete=True)

    verbalizer.answers = MethodType(answers, verbalizer)
    return nla


BROKEN: dict[str, Callable[[], NLA]] = {
    "injected one position off": injection_one_off,
    "reconstructor of another layer": reconstructor_of_another_layer,
    "verbalizer writes a constant": constant_verbalizer,
}
