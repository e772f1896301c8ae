"""How fast vectors are explained, next to what a user would do otherwise: one command, one table.

    python benchmarks/run.py                  # CPU: Qwen2 shape, d 512, 12 blocks, random weights
    python benchmarks/run.py --device cuda    # Qwen3-8B shape in bf16

Ratios are between medians of one run; the floor is the arithmetic that cannot be avoided (prefix
once, suffix and answer tokens for every vector) at the speed this machine multiplies matrices.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.table import Table

from nla_lens.engines import Job
from nla_lens.engines.transformers import TransformersReconstructor, TransformersVerbalizer
from nla_lens.hf_source import HFSource
from nla_lens.hook_point import ResidPost
from nla_lens.injection import rescale

PROMPT_TOKENS, MARKER, SCALE = 134, 104, 100.0


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

    def flops_per_token(self, *, logits: bool) -> float:
        """Multiplications and additions of one token's matrix products, attention left out."""
        head = self.d_model // self.n_heads
        attention = self.d_model * (2 * self.d_model + 2 * self.n_kv_heads * head)
        block = attention + 3 * self.d_model * self.d_mlp
        return 2.0 * (self.n_blocks * block + logits * self.d_model * self.d_vocab)


SHAPES = {
    # A small vocabulary: a large one would hide the rest behind one matrix product.
    "cpu": Shape(512, 12, 1408, 8, 2, 8192),
    "cuda": Shape(4096, 36, 12_288, 32, 8, 151_936),
}


@dataclass(frozen=True)
class Rule:
    """All of a spec that an engine looks at."""

    injection: str = "replace"


class Bench:
    """One model, and the ways to run it."""

    def __init__(self, device: str, n_vectors: int, shape: Shape) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
        self.model.eval().requires_grad_(False)
        self.device, self.shape = device, shape
        self.prompt = torch.randint(1000, 8000, (PROMPT_TOKENS,)).tolist()
        self.vectors = rescale(torch.randn(n_vectors, shape.d_model), SCALE)
        self.engine = TransformersVerbalizer(self.model, Rule())  # type: ignore[arg-type]
        self.equal = [64] * n_vectors
        # Explanations of 20 to 150 tokens, mean about 70.
        spread = 20 + 130 * torch.distributions.Beta(1.6, 2.6).sample((n_vectors,))
        self.realistic = spread.long().tolist()

    def ours(self, lengths: list[int]) -> None:
        """All vectors through the engine, each answer ending at its own length."""
        job = Job(self.prompt, MARKER, self.vectors, max(lengths), _ends_at(lengths))
        found = dict(self.engine.generate(job))
        if sorted(len(ids) for ids in found.values()) != sorted(lengths):
            raise RuntimeError("an answer did not end where it should")

    def generate(self, rows: range, n_tokens: int) -> None:
        """What a user would do: `generate` with the vector put in by a hook."""

        def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            if output.shape[1] > 1:
                output = output.clone()
                output[:, MARKER] = self.vectors[rows.start : rows.stop].to(output)
            return output

        ids = torch.tensor([self.prompt] * len(rows), device=self.device)
        handle = self.model.get_input_embeddings().register_forward_hook(hook)
        try:
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        finally:
            handle.remove()

    def one_at_a_time(self, lengths: list[int], sample: int) -> float:
        """Seconds for all vectors, from every n-th of them."""
        step = max(1, len(lengths) // sample)
        rows = range(0, len(lengths), step)
        seconds = timed(lambda: [self.generate(range(r, r + 1), lengths[r]) for r in rows])
        return seconds * sum(lengths) / sum(lengths[r] for r in rows)

    def floor(self, lengths: list[int]) -> float:
        """Seconds for the matrix products alone, at this machine's measured speed."""
        n = len(lengths)
        body = self.shape.flops_per_token(logits=False)
        head = self.shape.flops_per_token(logits=True) - body
        tokens = MARKER + n * (PROMPT_TOKENS - MARKER) + sum(lengths) - n
        return (tokens * body + sum(lengths) * head) / self.flops_per_second(n)

    def flops_per_second(self, rows: int) -> float:
        """Speed of a product as wide as the widest in the model, with `rows` rows."""
        weight = self.model.get_input_embeddings().weight
        x = torch.randn(rows, weight.shape[1], device=self.device, dtype=weight.dtype)
        seconds = median(timed(lambda: x @ weight.T) for _ in range(9))
        return 2.0 * rows * weight.numel() / seconds


def _ends_at(lengths: list[int]) -> Callable[[list[int]], bool]:
    """Ends answers at the given lengths, in the order in which rows are started."""
    # Each row keeps one list for all its life, so its identity names the row.
    started: dict[int, tuple[int, list[int]]] = {}

    def is_finished(ids: list[int]) -> bool:
        row, _ = started.setdefault(id(ids), (len(started), ids))
        return len(ids) >= lengths[row]

    return is_finished


def timed(run: Callable[[], object]) -> float:
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


def verbalizer_rows(bench: Bench, repeats: int) -> list[list[str]]:
    rows = []
    n = len(bench.vectors)
    for name, lengths in (("equal, 64 tokens", bench.equal), ("20 to 150", bench.realistic)):
        bench.ours(lengths[:2] + [2] * (n - 2))  # warm-up
        ours, single, naive = medians(
            repeats,
            lambda lengths=lengths: timed(lambda: bench.ours(lengths)),
            lambda lengths=lengths: bench.one_at_a_time(lengths, sample=4),
            lambda lengths=lengths: timed(lambda: bench.generate(range(n), max(lengths))),
        )
        floor = bench.floor(lengths)
        rows.append(["AV", name, *_figures(n, ours), _times(single, ours), _times(naive, ours)])
        rows[-1].append(f"{ours / floor:.2f}")
    return rows


def extraction_row(bench: Bench, repeats: int) -> list[str]:
    """Blocks 0..8 of 12, against the whole forward pass."""
    layer = 2 * bench.shape.n_blocks // 3
    source = HFSource(bench.model, tokenizer=object())
    ids = torch.randint(1000, 8000, (8, 128), device=bench.device)
    with torch.inference_mode():
        ours, whole = medians(
            repeats,
            lambda: timed(lambda: source.resid(ids, ResidPost(layer))),
            lambda: timed(lambda: bench.model(ids, output_hidden_states=True)),
        )
    return [
        "extraction",
        f"block {layer} of {bench.shape.n_blocks}",
        *_figures(8, ours),
        "",
        _times(whole, ours),
        "",
    ]


def reconstructor_row(bench: Bench, repeats: int) -> list[str]:
    engine = TransformersReconstructor(bench.model.model)
    lengths = [10 + n for n in bench.realistic]
    prompts = [torch.randint(1000, 8000, (n,)).tolist() for n in lengths]
    ours, single = medians(
        repeats,
        lambda: timed(lambda: engine.last_resid(prompts)),
        lambda: timed(lambda: [engine.last_resid([p]) for p in prompts]),
    )
    return ["AR", "mixed lengths", *_figures(len(prompts), ours), _times(single, ours), "", ""]


def _figures(n: int, seconds: float) -> list[str]:
    return [f"{seconds:.2f}", f"{n / seconds:.1f}"]


def _times(other: float, ours: float) -> str:
    return f"{other / ours:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=sorted(SHAPES))
    parser.add_argument("--vectors", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="medians of this many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    bench = Bench(args.device, args.vectors, SHAPES[args.device])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = platform.processor() or platform.machine()
    table = Table(
        title=f"{args.vectors} vectors, {args.device}, {args.threads} thread(s), commit {commit}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {machine}"
    )
    for column in ("what", "lengths", "s", "per s", "x one by one", "x naive", "/ floor"):
        table.add_column(column, justify="left" if column in ("what", "lengths") else "right")
    for row in verbalizer_rows(bench, args.repeats):
        table.add_row(*row)
    table.add_row(*reconstructor_row(bench, args.repeats))
    table.add_row(*extraction_row(bench, args.repeats))
    console = Console(width=110, record=True)
    console.print(table)
    if args.out:
        args.out.write_text(console.export_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
