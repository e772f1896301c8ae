"""How many rows go through a model at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import psutil
import torch

from nla_lens.anatomy import input_device, text_model

_MOST_ROWS: Final = {"cpu": 64, "cuda": 256, "mps": 64}
_SHARE_OF_FREE_MEMORY: Final = 0.5
_TOKENS_PER_BATCH: Final = 8192


def choose_batch_size(model: Any, n_tokens: int) -> int:
    """Rows whose key-value cache of `n_tokens` each fits into half of the free memory."""
    config = text_model(model).config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cached = 2 * config.num_hidden_layers * kv_heads * head_dim * n_tokens
    # Logits, their float32 copy and the widest activations of the prefill.
    passing = 3 * config.vocab_size + 8 * config.hidden_size * n_tokens
    bytes_per_row = (cached + passing) * model.dtype.itemsize
    device = input_device(model)
    rows = int(_SHARE_OF_FREE_MEMORY * free_memory(device) / bytes_per_row)
    return max(1, min(rows, _MOST_ROWS.get(device.type, 64)))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def length_batches(lengths: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Row indices in batches of like length, so that little padding is computed.

    On a CPU only rows of equal length share a batch: there padding costs more than batching saves.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for row in order:
        grown = lengths[row] * (len(batch) + 1) > _TOKENS_PER_BATCH
        uneven = device.type == "cpu" and batch and lengths[row] != lengths[batch[0]]
        if batch and (grown or uneven):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
