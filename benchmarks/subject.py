"""The model that is timed, with random weights, and what is asked of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
import transformers

PROMPT_TOKENS, MARKER = 134, 104
SCALE = 100.0


@dataclass(frozen=True)
class Shape:
    """A model's size."""

    d_model: int
    n_blocks: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_vocab: int

    def config(self) -> transformers.PretrainedConfig:
        return transformers.Qwen2Config(
            hidden_size=self.d_model,
            num_hidden_layers=self.n_blocks,
            intermediate_size=self.d_mlp,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            vocab_size=self.d_vocab,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
        )

    def key_value_bytes(self, itemsize: int) -> int:
        """Of one token, in all blocks."""
        return 2 * self.n_blocks * self.n_kv_heads * (self.d_model // self.n_heads) * itemsize

    def fitting(self, free_bytes: int) -> Shape:
        """With so many blocks that the weights in bf16 leave half of the memory free."""
        head = self.d_model // self.n_heads
        attention = 2 * self.d_model * head * (self.n_heads + self.n_kv_heads)
        block = 2 * (attention + 3 * self.d_model * self.d_mlp)
        rest = 2 * self.d_model * self.d_vocab
        return replace(self, n_blocks=max(1, min(self.n_blocks, (free_bytes // 2 - rest) // block)))


SHAPES = {
    # A small vocabulary: a large one would hide the rest behind one matrix product.
    "cpu": Shape(512, 12, 1408, 8, 2, 8192),
    # Qwen3-8B's.
    "cuda": Shape(4096, 36, 12_288, 32, 8, 151_936),
}


def random_model(shape: Shape, device: str) -> transformers.PreTrainedModel:
    """Float32 on a CPU, bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    return model.eval().requires_grad_(False)


def realistic_lengths(n: int) -> list[int]:
    """Lengths of explanations, 20 to 150 tokens, mean 70: quantiles of a beta law, shuffled."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    law = torch.distributions.Beta(1.6, 2.56).sample((20_000,))
    spread = torch.quantile(law, torch.linspace(0, 1, n))
    spread = (spread - spread.min()) / (spread.max() - spread.min()).clamp_min(1e-9)
    return (20 + 130 * spread).round().long()[torch.randperm(n, generator=generator)].tolist()


def timed(run: Callable[[], object]) -> float:
    """Seconds by the clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(repeats: int, *runs: Callable[[], float]) -> list[float]:
    """Interleaved, so that a machine that slows down slows all of them."""
    rounds = [[run() for run in runs] for _ in range(repeats)]
    return [median(column) for column in zip(*rounds, strict=True)]
