"""A framework that nla_lens has never heard of: models that tell listeners what they kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Listener = Callable[[Tensor, dict[int, Tensor]], None]
"""Called after each run with the token ids and what was kept, by number of the block."""


class Stream:
    """A language model whose runs keep what leaves the blocks that one asks for.

    Attributes:
        width: Of what leaves a block.
        tokenizer: The model's.
        listeners: Who is told of each run, in this order.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self.tokenizer = tokenizer
        self.width: int = model.config.hidden_size
        self.listeners: list[Listener] = []

    def __len__(self) -> int:
        return len(self._model.model.layers)

    def run(self, ids_BT: Tensor, keep: Iterable[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits `[B, T, vocab]`, and `[B, T, width]` for each block to keep."""
        kept: dict[int, Tensor] = {}

        def keeper(block: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                kept[block] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self._model.model.layers[n].register_forward_hook(keeper(n)) for n in keep]
        try:
            with torch.no_grad():
                logits_BTV = self._model(input_ids=ids_BT, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        for listener in self.listeners:
            listener(ids_BT, kept)
        return logits_BTV, kept
