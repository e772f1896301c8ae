"""Residuals of many texts, and reconstructions of many explanations, against what a user would do.

`extraction_rows` and `reconstruction_rows` each answer rows `(what, setting, numbers)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from subject import SHAPES, Shape, medians, random_model, realistic_lengths, timed

import nla_lens
from nla_lens.engines.local.transformers import TransformersReconstructor

Row = tuple[str, str, dict[str, str]]

BATCH = 8
VOCABULARIES = (8192, 151_936)
"""A small one, and Qwen's: a user's forward pass computes logits at every position."""
TEMPLATE_TOKENS, CLOSING_TOKENS = 9, 4
"""Of the released reconstructors' template, before and after the explanation."""


class _Texts:
    """A tokenizer whose texts are indices into lists of random ids."""

    def __init__(self, lengths: list[int]) -> None:
        self.ids = [torch.randint(1000, 8000, (n,)).tolist() for n in lengths]
        self.texts = [str(row) for row in range(len(lengths))]

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.ids[int(text)]}


@torch.inference_mode()
def extraction_rows(
    repeats: int = 3, *, shape: Shape = SHAPES["cpu"], device: str = "cpu", n_texts: int = 16
) -> list[Row]:
    """`nla_lens.extract` against the model's own forward pass, block 2/3 n.

    Both read the same texts from ids on, with the same model in float32.

    * ours: `extract(model, texts, layer, positions)` as it is called by a user.
    * `x batches`: `model(ids, attention_mask, output_hidden_states=True)` on batches of 8 texts as
      they come, padded to the longest of each; `hidden_states[K + 1]` is kept, the rest dropped.
      This is the full forward pass: all blocks, and the logits of all positions.
    * `x one by one`: the same, a text at a time, so that nothing is padded.
    * `x blocks`: batches as before through the decoder alone, without lm_head and logits, for what
      of the gain is not the vocabulary's.
    """
    layer, rows = 2 * shape.n_blocks // 3, []
    for d_vocab in VOCABULARIES:
        model = random_model(Shape(**{**vars(shape), "d_vocab": d_vocab}), device)
        settings = {
            f"{n_texts} texts of 20 to 150 tokens": realistic_lengths(n_texts),
            f"{BATCH} texts of 128 tokens": [128] * BATCH,
        }
        for what, lengths in settings.items():
            setting = f"block {layer} of {shape.n_blocks}, vocabulary {d_vocab}, {what}"
            ways = _ways_to_extract(model, _Texts(lengths), layer)
            last, everything, *others = medians(repeats, *ways)
            for where, ours in (("last token", last), ("all tokens", everything)):
                names = ("x batches", "x one by one", "x blocks")
                ratios = {n: f"{s / ours:.2f}" for n, s in zip(names, others, strict=True)}
                numbers = {"s": f"{ours:.3f}", "per s": f"{len(lengths) / ours:.1f}", **ratios}
                rows.append(("extraction", f"{setting}, {where}", numbers))
        del model
    return rows


def _ways_to_extract(model: Any, texts: _Texts, layer: int) -> list[Callable[[], float]]:
    def ours(positions: list[int] | None) -> None:
        nla_lens.extract(model, texts.texts, layer, positions, tokenizer=texts)

    def forward(run: Any, size: int) -> list[torch.Tensor]:
        kept = []
        for start in range(0, len(texts.ids), size):
            batch = texts.ids[start : start + size]
            longest = max(map(len, batch))
            ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])
            mask_BT = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in batch])
            out = run(
                ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                output_hidden_states=True,
                use_cache=False,
            )
            resid_BTD = out.hidden_states[layer + 1]
            kept += [resid_TD[: len(ids)] for resid_TD, ids in zip(resid_BTD, batch, strict=True)]
        return kept

    return [
        lambda: timed(lambda: ours([-1])),
        lambda: timed(lambda: ours(None)),
        lambda: timed(lambda: forward(model, BATCH)),
        lambda: timed(lambda: forward(model, 1)),
        lambda: timed(lambda: forward(model.model, BATCH)),
    ]


@torch.inference_mode()
def reconstruction_rows(
    repeats: int = 3, *, shape: Shape = SHAPES["cpu"], device: str = "cpu", n_texts: int = 32
) -> list[Row]:
    """The AR's residuals, over several mixes of lengths.

    * ours: `TransformersReconstructor.last_resid` of all prompts at once.
    * `x one by one`: the model in a plain pass over each prompt.
    * `x 16 at once`: ours as `explain_iter` calls it, so many texts at a time.
    * `x padded batch`: the model in a plain pass over all prompts, padded and masked.
    """
    model = random_model(shape, device).model
    # As an AR is loaded.
    model.norm = torch.nn.Identity()
    template = torch.randint(1000, 8000, (TEMPLATE_TOKENS,)).tolist()
    mixes = {
        "20 to 150 tokens": realistic_lengths(n_texts),
        "all of 70 tokens": [70] * n_texts,
        "all different": list(range(20, 20 + n_texts)),
        "30 tokens, one of 1000": [30] * (n_texts - 1) + [1000],
    }
    rows: list[Row] = []
    for what, lengths in mixes.items():
        prompts = [
            template + torch.randint(1000, 8000, (n + CLOSING_TOKENS,)).tolist() for n in lengths
        ]
        # One long text makes the padded batch as long as everything else together.
        n_ways = 4 if max(lengths) < 200 else 3
        ours, *others = medians(repeats, *_ways_to_reconstruct(model, prompts)[:n_ways])
        names = ("x one by one", "x 16 at once", "x padded batch")[: n_ways - 1]
        ratios = {n: f"{s / ours:.2f}" for n, s in zip(names, others, strict=True)}
        numbers = {"s": f"{ours:.3f}", "per s": f"{n_texts / ours:.1f}", **ratios}
        rows.append(("AR", f"{n_texts} texts, {what}", numbers))
    return rows


def _ways_to_reconstruct(model: Any, prompts: list[list[int]]) -> list[Callable[[], float]]:
    engine = TransformersReconstructor(model)

    def ours() -> None:
        engine.forget_prefix()
        engine.last_resid(prompts)

    def by_16() -> None:
        engine.forget_prefix()
        for start in range(0, len(prompts), 16):
            engine.last_resid(prompts[start : start + 16])

    def single() -> list[torch.Tensor]:
        return [
            model(torch.tensor([p], device=model.device), use_cache=False).last_hidden_state[0, -1]
            for p in prompts
        ]

    def padded() -> torch.Tensor:
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        ids_BT = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
        mask_BT = (torch.arange(longest) < lengths[:, None]).long()
        out = model(ids_BT.to(model.device), attention_mask=mask_BT.to(model.device))
        return out.last_hidden_state[torch.arange(len(prompts)), lengths - 1].clone()

    return [lambda run=run: timed(run) for run in (ours, single, by_16, padded)]
