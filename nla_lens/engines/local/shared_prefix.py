"""Attention of rows that share their first columns, for transformers' `AttentionInterface`.

The keys and values before the marker are the same for all rows, and in a batch they are the larger
part. Kept once, they need no memory per row, and all rows' queries meet them in one product; only a
row's own columns are read row by row. On a CPU a decode step spends its time reading keys and
values, so this is two to three times less of it. The softmax is over all columns at once, exactly.

Not on other devices: fused kernels there take one tensor of keys.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nla_lens.models.anatomy import input_device, text_model

NAME: Final = "nla_lens_shared_prefix"


def attention_forward(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' SDPA; `key_BKLD.shared_prefix` holds the columns before them, if any.

    Returns:
        What the heads give, `[B, T, H, head_dim]`, and None for the weights.
    """
    prefix: tuple[Tensor, Tensor] | None = getattr(key_BKLD, "shared_prefix", None)
    if prefix is not None and query_BHTD.shape[2] == 1:
        return _one_query(query_BHTD, key_BKLD, value_BKLD, prefix, attention_mask, scaling), None
    if prefix is not None:
        key_BKLD, value_BKLD = (
            torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=-2)
            for shared, own in zip(prefix, (key_BKLD, value_BKLD), strict=True)
        )
    return sdpa_attention_forward(
        module, query_BHTD, key_BKLD, value_BKLD, attention_mask, scaling=scaling, **kwargs
    )


def _one_query(
    query_BH1D: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    prefix: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Each row's newest token; its G heads that read the same keys are one product."""
    rows, heads, _, head_dim = query_BH1D.shape
    keys_KPD, values_KPD = (shared[0] for shared in prefix)
    n_kv, n_shared = keys_KPD.shape[:2]
    query_BKGD = query_BH1D.reshape(rows, n_kv, heads // n_kv, head_dim)
    query_BKGD = query_BKGD * (head_dim**-0.5 if scaling is None else scaling)

    scores_shared = _by_kv_head(query_BKGD) @ keys_KPD.transpose(-1, -2)
    scores_own = query_BKGD @ key_BKLD.transpose(-1, -2)
    scores = torch.cat([_by_row(scores_shared, rows), scores_own], dim=-1)
    if attention_mask is not None:
        if attention_mask.dtype is torch.bool:
            scores = scores.masked_fill_(~attention_mask, -torch.inf)
        else:
            scores = scores + attention_mask
    weights = scores.softmax(-1)
    out_shared = _by_kv_head(weights[..., :n_shared]) @ values_KPD
    out_BKGD = _by_row(out_shared, rows) + weights[..., n_shared:] @ value_BKLD
    return out_BKGD.reshape(rows, 1, heads, head_dim)


def _by_kv_head(x_BKGE: Tensor) -> Tensor:
    """`[K, B * G, E]`."""
    return x_BKGE.transpose(0, 1).flatten(1, 2)


def _by_row(x_KME: Tensor, rows: int) -> Tensor:
    """`[B, K, G, E]`."""
    return x_KME.unflatten(1, (rows, -1)).transpose(0, 1)


def enable(model: Any) -> bool:
    """Lets a model keep a shared prefix, where that is exact and pays.

    Returns:
        Whether it was done: a float32 model on a CPU whose attention is transformers' SDPA.
    """
    stack = text_model(model)
    suits = input_device(model).type == "cpu" and model.dtype is torch.float32
    if not suits or stack.config._attn_implementation != "sdpa":
        return False
    stack.set_attn_implementation(NAME)
    # A model class of its own kind may refuse, by a warning.
    return bool(stack.config._attn_implementation == NAME)


# A model that was unpickled asks for it by name.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def narrowest_window(model: Any) -> int | None:
    """Columns that the narrowest sliding window sees; None: there is none.

    In a cache with a shared prefix the distance of two columns is not that of two tokens, so a
    window that cuts needs the other kind.
    """
    config = text_model(model).config
    return getattr(config, "sliding_window", None)
