"""toy_stream: `.explain()` on what `Stream.run` keeps, and a stream as a source of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from toy_stream import Stream

from nla_lens import NLA, NLAError, Probe, ResidPost, ResidualTensor
from nla_lens.models.tokens import token_text
from nla_lens.stream.explainer import check_fit
from nla_lens.stream.residual import Origin, locate


def attach(model: Stream, nla: NLA) -> Probe:
    """What the stream keeps from now on can be explained."""
    check_fit(nla, d_model=model.width, n_blocks=len(model), what="this Stream")
    to_token = token_text(model.tokenizer)

    def listener(ids_BT: Tensor, kept: dict[int, Tensor]) -> None:
        where_BT3 = locate(ids_BT)
        for block, resid_BTD in kept.items():
            origin = Origin(ResidPost(block).name, where_BT3, to_token, nla)
            kept[block] = ResidualTensor.wrap(resid_BTD, origin)

    model.listeners.append(listener)
    return Probe(model, nla, undo=lambda: model.listeners.remove(listener))


def as_source(model: Stream, tokenizer: Any = None) -> StreamSource:
    """The stream as a `nla_lens.stream.extraction.Source`."""
    return StreamSource(model, tokenizer or model.tokenizer)


class StreamSource:
    """Reads a `Stream`."""

    is_whole = True

    def __init__(self, model: Stream, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def check_place(self, place: ResidPost) -> None:
        if place.layer >= len(self.model):
            raise NLAError(
                f"layer {place.layer} does not exist: there are {len(self.model)} blocks"
            )

    def resid(self, ids_BT: Tensor, place: ResidPost) -> Tensor:
        return self.model.run(ids_BT, keep=[place.layer])[1][place.layer]

    def go_on(self, ids: Sequence[int], n: int) -> list[int]:
        grown = list(ids)
        for _ in range(n):
            logits_BTV, _ = self.model.run(torch.tensor([grown]))
            grown.append(int(logits_BTV[0, -1].argmax()))
        return grown[len(ids) :]
