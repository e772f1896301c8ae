"""The four small networks, and the two ways a vector enters a verbalizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from settings import Settings
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

INJECTION_BLOCK = 1


def causal_lm(settings: Settings, vocab_size: int, blocks: int) -> LlamaForCausalLM:
    """Builds a freshly initialised Llama of the small size."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.d_model,
        intermediate_size=settings.mlp,
        num_hidden_layers=blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def warm_start(target: nn.Module, source: nn.Module) -> None:
    """Copies every weight that both networks have in the same shape."""
    own = target.state_dict()
    fitting = {k: v for k, v in source.state_dict().items() if k in own and v.shape == own[k].shape}
    target.load_state_dict(fitting, strict=False)


def round_to_bf16(network: nn.Module) -> None:
    """Rounds the weights to what the exported files can hold."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())


@contextlib.contextmanager
def injected(
    model: LlamaForCausalLM, vectors_BD: torch.Tensor, marker: int, scale: float | None
) -> Iterator[None]:
    """Injects one vector per row into the prefill passes made inside the block.

    Args:
        model: The verbalizer.
        vectors_BD: One vector per row of the batch.
        marker: Position of the marker token, the same in every row.
        scale: Target norm for the replace rule; None for norm-matched add at the output of
            block ``INJECTION_BLOCK`` (arXiv 2512.15674, eq. 1).
    """
    unit_BD = vectors_BD.float()
    unit_BD = unit_BD / unit_BD.norm(dim=-1, keepdim=True)

    def hook(_module: nn.Module, _args: object, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if hidden_BTD.shape[1] <= marker:
            return hidden_BTD
        here_BD = hidden_BTD[:, marker]
        if scale is None:
            new_BD = here_BD + here_BD.norm(dim=-1, keepdim=True) * unit_BD
        else:
            new_BD = unit_BD * scale
        new_B1D = new_BD.to(hidden_BTD.dtype)[:, None]
        return torch.cat([hidden_BTD[:, :marker], new_B1D, hidden_BTD[:, marker + 1 :]], dim=1)

    site = model.model.layers[INJECTION_BLOCK] if scale is None else model.model.embed_tokens
    handle = site.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Reconstructor(nn.Module):
    """Text to vector: the first K+1 blocks, no final norm, a bias-free head at the last token."""

    def __init__(self, settings: Settings, vocab_size: int):
        super().__init__()
        model = causal_lm(settings, vocab_size, settings.layer + 1).model
        model.norm = nn.Identity()
        self.model = model
        self.value_head = nn.Linear(settings.d_model, settings.d_model, bias=False)
        nn.init.eye_(self.value_head.weight)

    def forward(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns one vector per right-padded row, read at its last real token."""
        hidden_BTD = self.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        last_BD = hidden_BTD[torch.arange(len(ids_BT)), lengths_B - 1]
        return self.value_head(last_BD)
