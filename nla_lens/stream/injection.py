"""The arithmetic of putting a vector into a prompt; knows no model.

Two rules (shape suffixes: B rows, T tokens, D = d_model):

* `replace`: the embedding row at the marker becomes `v * injection_scale / ||v||`. It replaces what
  enters block 0, so where the embedding module multiplies (Gemma: sqrt(d)) it goes in after that.
* `norm_matched_add`: at the output of block 1, `h'_p = h_p + ||h_p|| * v / ||v||`
  (Karvonen et al., arXiv 2512.15674, eq. 1).

Norms are taken in float32 whatever the model's dtype: in bf16 a norm is off by up to 0.4 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from nla_lens.errors import NLAError
from nla_lens.stream.hook_point import ResidPost

NORM_MATCHED_ADD_AT: Final = ResidPost(1)
"""Where `norm_matched_add` acts (nanoNLA)."""


def norms(vec_BD: torch.Tensor) -> torch.Tensor:
    """L2 norms `[..., 1]` in float32, exact also where squares would leave float32's range."""
    largest = vec_BD.float().abs().amax(-1, keepdim=True)
    safe = largest.clamp_min(torch.finfo(torch.float32).tiny)
    return (vec_BD.float() / safe).norm(dim=-1, keepdim=True) * safe


def unit(vec_BD: torch.Tensor) -> torch.Tensor:
    """Vectors scaled to norm 1, float32; a zero vector stays zero."""
    return rescale(vec_BD, 1.0)


def rescale(vec_BD: torch.Tensor, norm: float) -> torch.Tensor:
    """Vectors `[..., d]` scaled to L2 norm `norm`, float32; a zero vector stays zero."""
    vec_BD = vec_BD.float()
    safe = vec_BD.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    within_range = vec_BD / safe
    length = within_range.norm(dim=-1, keepdim=True)
    return within_range / length.clamp_min(torch.finfo(torch.float32).tiny) * norm


def replace(embed_BTD: torch.Tensor, scaled_BD: torch.Tensor, position: int) -> torch.Tensor:
    """A copy of the embeddings with the already rescaled vectors at `position`.

    Args:
        embed_BTD: What would enter block 0, `[B, T, d]`.
        scaled_BD: `rescale(v, injection_scale)`, `[B, d]`.
        position: Index of the marker in the T tokens.

    Returns:
        `[B, T, d]`, dtype and device of `embed_BTD`.
    """
    out_BTD = embed_BTD.clone()
    out_BTD[:, position] = scaled_BD.to(out_BTD)
    return out_BTD


def norm_matched_add(resid_BTD: torch.Tensor, vec_BD: torch.Tensor, position: int) -> torch.Tensor:
    """A copy of a residual stream with `||h_p|| * v / ||v||` added at `position`.

    Args:
        resid_BTD: Output of block 1, `[B, T, d]`.
        vec_BD: The vectors as they are, `[B, d]`.
        position: Index of the marker in the T tokens.

    Returns:
        `[B, T, d]`, dtype and device of `resid_BTD`.
    """
    out_BTD = resid_BTD.clone()
    marker_BD = resid_BTD[:, position].float()
    added_BD = norms(marker_BD) * unit(vec_BD.to(marker_BD.device))
    out_BTD[:, position] = (marker_BD + added_BD).to(out_BTD.dtype)
    return out_BTD


def find_marker(
    ids: Sequence[int],
    marker_id: int,
    left_id: int | None = None,
    right_id: int | None = None,
) -> int:
    """Where the vector goes in a tokenized prompt.

    Args:
        ids: The prompt.
        marker_id: Token id of the injection character.
        left_id: Id the token before the marker must have; None accepts any.
        right_id: Id the token after the marker must have; None accepts any.

    Returns:
        The one index that fits.

    Raises:
        NLAError: Not exactly one site; names what was found.
    """
    markers = [i for i, token in enumerate(ids) if token == marker_id]
    sites = [
        i
        for i in markers
        if 0 < i < len(ids) - 1
        and (left_id is None or ids[i - 1] == left_id)
        and (right_id is None or ids[i + 1] == right_id)
    ]
    if len(sites) == 1:
        return sites[0]
    if markers and not sites:
        around = [tuple(ids[max(i - 1, 0) : i + 2]) for i in markers]
        raise NLAError(
            f"the marker token {marker_id} stands in the prompt as {around}, but the sidecar says "
            f"its neighbours are {left_id} and {right_id}: the tokenizer or the template is not "
            "the one the verbalizer was trained with"
        )
    raise NLAError(
        f"the prompt of {len(ids)} tokens has {len(sites)} injection sites (marker token "
        f"{marker_id}), exactly one is needed"
    )
