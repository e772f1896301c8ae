"""The AV: batches with the prefix computed once, against what a user would write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from floor import Machine
from subject import MARKER, PROMPT_TOKENS, SCALE, Shape, medians, realistic_lengths, timed

from nla_lens.engines import Job
from nla_lens.engines.local.transformers import TransformersVerbalizer
from nla_lens.stream.injection import rescale

Row = tuple[str, str, dict[str, str]]


@dataclass(frozen=True)
class Rule:
    """All of a spec that an engine looks at."""

    injection: str = "replace"


class Verbalizing:
    """One model, and three ways to explain with it.

    Attributes:
        model: As a user has it, for `generate`.
    """

    def __init__(self, model: Any, n_vectors: int) -> None:
        self.model = model
        self.prompt = torch.randint(1000, 8000, (PROMPT_TOKENS,)).tolist()
        self.vectors = rescale(torch.randn(n_vectors, model.config.hidden_size), SCALE)
        self._attention = model.config._attn_implementation
        self._engine = TransformersVerbalizer(model, Rule())  # type: ignore[arg-type]
        self._own_attention = model.config._attn_implementation

    def ours(self, lengths: list[int]) -> None:
        """All vectors through the engine, each answer ending at its own length."""
        self.model.set_attn_implementation(self._own_attention)
        job = Job(self.prompt, MARKER, self.vectors, max(lengths), _ends_at(lengths))
        found = dict(self._engine.generate(job))
        if sorted(len(ids) for ids in found.values()) != sorted(lengths):
            raise RuntimeError("an answer did not end where it should")

    def one_at_a_time(self, lengths: list[int], sample: int = 8) -> float:
        """Seconds for all vectors, from some whose lengths stand for all."""
        rows = sorted(range(len(lengths)), key=lengths.__getitem__)
        step = max(1, len(rows) // sample)
        rows = rows[step // 2 :: step]
        seconds = timed(lambda: [self.generate(range(r, r + 1), lengths[r]) for r in rows])
        return seconds * len(lengths) / len(rows)

    def generate(self, rows: range, n_tokens: int) -> None:
        """What a user would do: `generate` with the vectors put in by a hook."""
        self.model.set_attn_implementation(self._attention)

        def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            if output.shape[1] > 1:
                output = output.clone()
                output[:, MARKER] = self.vectors[rows.start : rows.stop].to(output)
            return output

        ids = torch.tensor([self.prompt] * len(rows), device=self.model.device)
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


def _ends_at(lengths: list[int]) -> Callable[[list[int]], bool]:
    """Ends answers at the given lengths, in the order in which rows are started."""
    # Each row keeps one list for all its life, so its identity names the row.
    started: dict[int, tuple[int, list[int]]] = {}

    def is_finished(ids: list[int]) -> bool:
        row, _ = started.setdefault(id(ids), (len(started), ids))
        return len(ids) >= lengths[row]

    return is_finished


def verbalizing_rows(model: Any, shape: Shape, n_vectors: int, repeats: int) -> list[Row]:
    """`Decoder` against `generate`, on answers of equal and of realistic lengths.

    * `x one by one`: `generate` for one vector after another, as servers for this do it.
    * `x naive batch`: one `generate` over all vectors, which runs until the longest is written.
    * `/ floor`, `/ roofline`: see `floor`.
    """
    subject, machine = Verbalizing(model, n_vectors), Machine(model, shape)
    settings = {
        "64 tokens each": [64] * n_vectors,
        "20 to 150 tokens, mean 70": realistic_lengths(n_vectors),
    }
    found: list[Row] = []
    for name, lengths in settings.items():
        subject.ours([2] * n_vectors)  # warm-up
        ours, single, naive = medians(
            repeats,
            lambda lengths=lengths: timed(lambda: subject.ours(lengths)),
            lambda lengths=lengths: subject.one_at_a_time(lengths),
            lambda lengths=lengths: timed(lambda: subject.generate(range(n_vectors), max(lengths))),
        )
        numbers = {
            "s": ours,
            "per s": n_vectors / ours,
            "x one by one": single / ours,
            "x naive batch": naive / ours,
            "/ floor": ours / machine.floor(lengths),
            "/ roofline": ours / machine.roofline(lengths),
        }
        setting = f"{n_vectors} vectors, {name}"
        found.append(("AV", setting, {what: f"{x:.2f}" for what, x in numbers.items()}))
    return found
