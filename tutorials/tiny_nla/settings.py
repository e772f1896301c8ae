"""Sizes and schedules of a run: the full one and a quick one for smoke tests."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """Everything that can be turned to make a run larger or smaller.

    Attributes:
        layer: Block K whose output the explanations are about, 0-based.
        mlp: Width of every MLP.
        source_blocks, av_blocks, matched_blocks: Numbers of decoder blocks.
        fragments: Learned merges of the tokenizer.
        max_tokens: Documents are cut to this many tokens in training.
        source_documents, pair_vectors, ar_vectors, matched_vectors, refine_vectors: Training
            set sizes.
        per_document: Positions sampled per document for the pair.
        source_batch, pair_batch: Rows per step.
        source_rate, pair_rate: Highest learning rates.
    """

    layer: int = 2
    d_model: int = 128
    heads: int = 4
    mlp: int = 256
    source_blocks: int = 4
    av_blocks: int = 4
    matched_blocks: int = 4
    fragments: int = 360
    max_tokens: int = 56
    source_documents: int = 100_000
    pair_vectors: int = 200_000
    ar_vectors: int = 120_000
    matched_vectors: int = 150_000
    refine_vectors: int = 4_000
    per_document: int = 5
    source_batch: int = 32
    pair_batch: int = 32
    source_rate: float = 3e-3
    pair_rate: float = 2.5e-3


FULL = Settings()
QUICK = replace(
    FULL,
    source_documents=3000,
    pair_vectors=3000,
    ar_vectors=3000,
    matched_vectors=1500,
    refine_vectors=300,
)


def scaled(settings: Settings, factor: float) -> Settings:
    """Returns settings with all training set sizes multiplied by a factor."""
    names = (
        "source_documents",
        "pair_vectors",
        "ar_vectors",
        "matched_vectors",
        "refine_vectors",
    )
    return replace(settings, **{n: max(64, int(getattr(settings, n) * factor)) for n in names})
