"""Training loops of the verbalizers (vector to text) and the reconstructor (text to vector)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from networks import Reconstructor, injected, round_to_bf16
from schedule import Progress, Stepper, batches_by_length, pad
from settings import Settings
from tokenization import AR_PROMPT, AV_PROMPT, BOS, EOS, MARKER
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaForCausalLM

OPENING, CLOSING = "<explanation>", "</explanation>"
IGNORE = -100


def av_prompt_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of the chat prompt, the marker among them."""
    text = f"{BOS}User: {AV_PROMPT.replace('{injection_char}', MARKER)}\nAnswer:"
    return tokenizer.encode(text, add_special_tokens=False).ids


def ar_prompt_ids(tokenizer: Tokenizer, explanation: str) -> list[int]:
    """Returns the tokens of the reconstructor's prompt around an explanation."""
    return tokenizer.encode(AR_PROMPT.replace("{explanation}", explanation)).ids


def train_verbalizer(
    settings: Settings,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    vectors_ND: torch.Tensor,
    texts: Sequence[str],
    scale: float | None,
    seed: int,
    stage: str,
) -> None:
    """Trains a verbalizer in place on pairs of vector and explanation.

    Args:
        settings: Sizes of the run.
        model: The verbalizer, warm-started from the source model.
        tokenizer: The tokenizer.
        vectors_ND: One vector per explanation.
        texts: The explanations, without tags.
        scale: Norm of the injected embedding, or None for norm-matched add.
        seed: Seed of the order.
        stage: Name for the log.
    """
    prompt = av_prompt_ids(tokenizer)
    marker = prompt.index(tokenizer.token_to_id(MARKER))
    answers = [f"{OPENING}\n{text}\n{CLOSING}{EOS}" for text in texts]
    rows = [tokenizer.encode(answer, add_special_tokens=False).ids for answer in answers]
    steps = -(-len(rows) // settings.pair_batch)
    stepper = Stepper([model], settings.pair_rate, steps)
    progress = Progress(stage, steps)
    model.train()
    for index in batches_by_length([len(row) for row in rows], settings.pair_batch, seed):
        batch = [rows[i] for i in index.tolist()]
        ids_BT = pad([[*prompt, *row] for row in batch], 0)
        target_BA = pad(batch, IGNORE)
        with injected(model, vectors_ND[index], marker, scale):
            hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        answer_BAD = hidden_BTD[:, len(prompt) - 1 : -1]
        real_BA = target_BA != IGNORE
        logits_NV = model.lm_head(answer_BAD[real_BA])
        loss = F.cross_entropy(logits_NV, target_BA[real_BA])
        stepper.step(loss)
        progress.update(loss=loss.item())
    round_to_bf16(model)
    model.eval()


def train_reconstructor(
    settings: Settings,
    model: Reconstructor,
    tokenizer: Tokenizer,
    vectors_ND: torch.Tensor,
    texts: Sequence[str],
    rate: float,
    seed: int,
    stage: str,
) -> None:
    """Trains a reconstructor in place; the loss is the mse of normalised vectors, 2 (1 - cos).

    Args:
        settings: Sizes of the run.
        model: The reconstructor, warm-started from the source model.
        tokenizer: The tokenizer.
        vectors_ND: One vector per explanation.
        texts: The explanations, without tags.
        rate: Highest learning rate.
        seed: Seed of the order.
        stage: Name for the log.
    """
    rows = [ar_prompt_ids(tokenizer, text) for text in texts]
    steps = -(-len(rows) // settings.pair_batch)
    stepper = Stepper([model], rate, steps)
    progress = Progress(stage, steps)
    model.train()
    for index in batches_by_length([len(row) for row in rows], settings.pair_batch, seed):
        batch = [rows[i] for i in index.tolist()]
        guess_BD = model(pad(batch, 0), torch.tensor([len(row) for row in batch]))
        cos_B = F.cosine_similarity(guess_BD, vectors_ND[index])
        loss = 2 * (1 - cos_B).mean()
        stepper.step(loss)
        progress.update(mse_nrm=loss.item())
    round_to_bf16(model)
    model.eval()
