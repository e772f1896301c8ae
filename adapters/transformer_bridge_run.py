"""Rows, positions and tokens of what one run of TransformerLens records.

Positions count from each row's first real token, whatever the padding side, a key-value cache, a
`pos_slice` or a `start_at_layer`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nla_lens.models.cache_keyword import cache_among
from nla_lens.models.tokens import token_text
from nla_lens.stream.origin import locate


class Run:
    """One run's rows, positions and tokens.

    Attributes:
        to_token: Text of a token id, where there is a tokenizer.
    """

    def __init__(self, model: Any, said: Mapping[str, Any]) -> None:
        """Args:
        model: The model.
        said: The arguments of `run_with_cache`, or of `forward`, by name.
        """
        self._model, self._said = model, said
        self._seen: list[Tensor] = []
        # Before the run: it grows during it.
        self._past_BP = _past_mask(said)
        self.to_token = None if model.tokenizer is None else token_text(model.tokenizer)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes token ids as they reach the embedding: after BOS, padding and truncation."""

        me = threading.get_ident()

        def hook(module: Any, args: Any, kwargs: Any = None) -> None:
            # Not of another thread's pass, which may come before torch has noted the keywords.
            if threading.get_ident() != me:
                return
            found = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if found is not None and not found.is_floating_point():
                self._seen.append(found)

        handle = self._model.embed.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def where(self) -> Tensor | None:
        """`[*leading, 3]` of what was cached; None where nothing is known."""
        where_BT3 = self.where_BT3
        if where_BT3 is None:
            return None
        where_LX3 = _sliced(where_BT3, self._said.get("pos_slice"))
        return where_LX3[0] if self._said.get("remove_batch_dim") else where_LX3

    @functools.cached_property
    def where_BT3(self) -> Tensor | None:
        """`[B, T, 3]` of what runs, once it is past the embedding; None where nothing is known."""
        ids_BT = self._ids()
        if ids_BT is None or ids_BT.ndim != 2:
            return None
        return locate(ids_BT, self._mask(ids_BT))

    def _ids(self) -> Tensor | None:
        """Token ids `[B, T]`, -1 for each where a residual stream or embeddings came in instead."""
        if self._seen:
            return self._seen[0]
        given = self._said.get("input")
        if not isinstance(given, Tensor) or given.ndim != 3:
            return None
        named = self._said.get("tokens")
        return torch.full(given.shape[:2], -1, device=given.device) if named is None else named

    def _mask(self, ids_BT: Tensor) -> Tensor | None:
        """Which tokens are real, `[B, P + T]` with what the key-value cache held before."""
        mask_BT = self._said.get("attention_mask")
        if mask_BT is None or mask_BT.ndim != 2:
            mask_BT = self._padding_mask(ids_BT)
        past_BP = self._past_BP
        if past_BP is None or (mask_BT is not None and mask_BT.shape[1] > ids_BT.shape[1]):
            return mask_BT
        if mask_BT is None:
            mask_BT = torch.ones_like(ids_BT)
        return torch.cat([past_BP.expand(len(ids_BT), -1).to(mask_BT), mask_BT], dim=1)

    def _padding_mask(self, ids_BT: Tensor) -> Tensor | None:
        """Pad tokens at the padded end of each row, as TransformerLens masks them."""
        tokenizer = self._model.tokenizer
        pad_id = getattr(tokenizer, "pad_token_id", None)
        # In a row by itself a token that has another use, too, is taken to be in that use.
        if pad_id is None or (
            len(ids_BT) == 1 and pad_id in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ):
            return None
        is_pad_BT = ids_BT == pad_id
        # Elsewhere looking would make the device wait.
        if is_pad_BT.device.type == "cpu" and not is_pad_BT.any():
            return None
        side, bos = self._said.get("padding_side"), self._said.get("prepend_bos")
        pads_BT = is_pad_BT.long()
        if (side if side in ("left", "right") else tokenizer.padding_side) == "right":
            return 1 - pads_BT.flip(-1).cumprod(-1).flip(-1)
        padding_BT = pads_BT.cumprod(-1)
        has_bos = bos if isinstance(bos, bool) else self._model.cfg.default_prepend_bos
        if has_bos and pad_id == tokenizer.bos_token_id:
            # The last of them is the BOS.
            padding_BT = nn.functional.pad(padding_BT[:, 1:], (0, 1))
        return 1 - padding_BT


def _past_mask(said: Mapping[str, Any]) -> Tensor | None:
    """Which tokens a key-value cache holds, `[B or 1, P]`."""
    past = said.get("past_kv_cache")
    if past is not None:
        previous_BP: Tensor = past.previous_attention_mask
        # TransformerLens 2 notes no mask where embeddings go in, as in all its `generate` runs.
        n_held = max((entry.past_keys.shape[1] for entry in past.entries), default=0)
        n_not_noted = max(n_held - previous_BP.shape[1], 0)
        return nn.functional.pad(previous_BP, (0, n_not_noted), value=1)
    past = cache_among(said)
    return None if past is None else torch.ones(1, past.get_seq_length())


def _sliced(where_BT3: Tensor, pos_slice: Any) -> Tensor:
    """Applies `pos_slice`: an int, which keeps the axis; a tuple, as to `slice`; or indices."""
    if pos_slice is None:
        return where_BT3
    # A Slice of TransformerLens holds an index as it is: there an int drops the axis.
    index = getattr(pos_slice, "slice", [pos_slice] if isinstance(pos_slice, int) else pos_slice)
    return where_BT3[:, slice(*index) if isinstance(index, tuple) else index]
