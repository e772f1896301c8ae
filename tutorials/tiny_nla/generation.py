"""Writes explanations with a verbalizer, and reads them back with a reconstructor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from networks import Reconstructor, injected
from pair_training import CLOSING, OPENING, ar_prompt_ids, av_prompt_ids
from schedule import pad
from tokenization import EOS, MARKER
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from nla_lens.models.cache_keyword import cache_keyword

MAX_NEW_TOKENS = 80


@torch.no_grad()
def verbalize(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    vectors_ND: torch.Tensor,
    scale: float | None,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 256,
) -> list[str]:
    """Explains vectors.

    Args:
        model: The verbalizer.
        tokenizer: The tokenizer.
        vectors_ND: The vectors.
        scale: Norm of the injected embedding, or None for norm-matched add.
        temperature: 0 for the likeliest token, else the sampling temperature.
        seed: Seed of the sampling.
        batch: Vectors per batch.

    Returns:
        The stripped texts between the explanation tags.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = av_prompt_ids(tokenizer)
    marker = prompt.index(tokenizer.token_to_id(MARKER))
    end = tokenizer.token_to_id(EOS)
    texts, takes_cache_as = [], cache_keyword(model)
    for vectors_BD in vectors_ND.split(batch):
        ids_BT = torch.tensor([prompt] * len(vectors_BD))
        with injected(model, vectors_BD, marker, scale):
            out = model(input_ids=ids_BT, use_cache=True)
        written: list[torch.Tensor] = []
        finished_B = torch.zeros(len(vectors_BD), dtype=torch.bool)
        for _ in range(MAX_NEW_TOKENS):
            next_B = _choose(out.logits[:, -1], temperature, generator)
            next_B[finished_B] = end
            finished_B |= next_B == end
            written.append(next_B)
            if finished_B.all():
                break
            kept = {takes_cache_as: out[takes_cache_as]}
            out = model(input_ids=next_B[:, None], **kept)
        texts.extend(between_tags(tokenizer, row) for row in torch.stack(written, 1).tolist())
    return texts


def between_tags(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the stripped text between the explanation tags of generated tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.split(OPENING, 1)[-1].split(CLOSING, 1)[0].strip()


@torch.no_grad()
def reconstruct(
    model: Reconstructor, tokenizer: Tokenizer, texts: Sequence[str], batch: int = 256
) -> torch.Tensor:
    """Returns the vectors ``[n, d]`` a reconstructor reads from explanations."""
    guesses = []
    for start in range(0, len(texts), batch):
        rows = [ar_prompt_ids(tokenizer, text) for text in texts[start : start + batch]]
        guesses.append(model(pad(rows, 0), torch.tensor([len(row) for row in rows])))
    return torch.cat(guesses)


def _choose(
    logits_BV: torch.Tensor, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = (logits_BV.float() / temperature).softmax(-1)
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
