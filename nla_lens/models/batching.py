"""How many rows go through a model at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import psutil
import torch
from torch import Tensor

from nla_lens.models.anatomy import input_device, text_model

_MOST_ROWS: Final = {"cpu": 64, "cuda": 256, "mps": 64}
_SHARE_OF_FREE_MEMORY: Final = 0.5
_MOST_ROWS_PADDED: Final = 256
_PASSES: Final = {"cpu": (2048, 40), "cuda": (8192, 1024)}
"""For each kind of device the most tokens of a pass, beyond which it gets no faster, and what a
pass costs besides its tokens, in tokens. Measured with one thread at d 512; it matters little."""


def choose_batch_size(model: Any, n_tokens: int) -> int:
    """Rows whose key-value cache of `n_tokens` each fits into half of the free memory."""
    config = text_model(model).config
    # Where blocks differ (Gemma 4), each has a config of its own.
    by_block = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    cached = 2 * n_tokens * sum(map(_cached_per_token, by_block))
    # Logits, their float32 copy and the widest activations of the prefill.
    passing = 3 * config.vocab_size + 8 * config.hidden_size * n_tokens
    bytes_per_row = (cached + passing) * model.dtype.itemsize
    device = input_device(model)
    rows = int(_SHARE_OF_FREE_MEMORY * free_memory(device) / bytes_per_row)
    return max(1, min(rows, _MOST_ROWS.get(device.type, 64)))


def _cached_per_token(config: Any) -> int:
    """Entries of keys, as many as those of values, that a block keeps of a token, at most."""
    # Families without attention say nothing of heads, and keep less.
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * head_dim)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def length_batches(lengths: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Row indices in batches for an engine that does not pad on a CPU: of equal length there.

    `padded_batches` is for those that pad without a mask, which is faster.
    """
    yield from padded_batches(lengths, device, equal=device.type == "cpu")


def padded_batches(
    lengths: Sequence[int],
    device: torch.device,
    most_rows: int | None = None,
    *,
    equal: bool = False,
) -> Iterator[list[int]]:
    """Row indices in batches of like length, so that padding and passes cost the least.

    A pass over B rows of at most T tokens takes as long as B * T tokens and some more, for reading
    all weights; of all ways to cut the rows, sorted by length, into passes the cheapest is taken.
    One pass for each row is among them.

    Args:
        lengths: Tokens of each row.
        device: Where they run.
        most_rows: Most rows in a batch.
        equal: Rows of equal length only, so that nothing is padded.
    """
    most_tokens, per_pass = _PASSES.get(device.type, _PASSES["cuda"])
    most_rows = min(most_rows or _MOST_ROWS_PADDED, _MOST_ROWS_PADDED)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cost, first = [0.0], [0]
    for end, row in enumerate(order, start=1):
        longest, cheapest = lengths[row], (float("inf"), end - 1)
        for start in range(end - 1, max(-1, end - 1 - most_rows), -1):
            n_tokens = (end - start) * longest
            grown = n_tokens > most_tokens and end - start > 1
            if grown or (equal and lengths[order[start]] != longest):
                break
            cheapest = min(cheapest, (cost[start] + per_pass + n_tokens, start))
        cost.append(cheapest[0])
        first.append(cheapest[1])
    end, batches = len(order), []
    while end:
        batches.append(order[first[end] : end])
        end = first[end]
    yield from reversed(batches)


def right_padded(prompts: Sequence[Sequence[int]]) -> Tensor:
    """Token ids `[B, T]`, zeros behind each row's end."""
    ids_BT = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for ids_T, prompt in zip(ids_BT, prompts, strict=True):
        ids_T[: len(prompt)] = torch.tensor(list(prompt))
    return ids_BT
