"""Sizes and schedules of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """Everything that can be turned to make a run larger or smaller.

    Attributes:
        layer: Block K whose output is explained, 0-based.
        min_position: First position that is read: the very first token is a sink.
        max_tokens: Documents are cut to this many tokens.
        documents: Documents of training sources that are read.
        held_documents: The same of held-out sources, and of each kind that is not trained on.
        per_document: Most positions drawn per document.
        tail: Last tokens that a description ends with.
        topic_words: Words that are candidates for topic words.
        rank: Rank of the LoRA matrices; their alpha is twice that.
        av_samples, ar_samples, refine_samples: Training samples of each stage.
        short_share: Share of the AV's samples, the first ones, that are the last words alone.
        batch: Rows per step.
        av_rate, ar_rate, refine_rate: Highest learning rates.
        flat: Share of the steps before the learning rate falls.
        scored: Vectors that are explained to score a pair.
    """

    layer: int = 4
    min_position: int = 10
    max_tokens: int = 56
    documents: int = 3000
    held_documents: int = 120
    per_document: int = 14
    tail: int = 3
    topic_words: int = 400
    rank: int = 16
    av_samples: int = 26_000
    ar_samples: int = 6_000
    refine_samples: int = 3_000
    short_share: float = 0.3
    batch: int = 32
    av_rate: float = 1.5e-3
    ar_rate: float = 5e-4
    refine_rate: float = 3e-4
    flat: float = 0.7
    scored: int = 200


def scaled(settings: Settings, factor: float) -> Settings:
    """Returns settings with the sizes of all sets multiplied by a factor, at least a few each.

    What a pair is scored on becomes smaller, but not larger.
    """
    trained = ("documents", "av_samples", "ar_samples", "refine_samples")
    factors = dict.fromkeys(trained, factor)
    factors |= dict.fromkeys(("held_documents", "scored"), min(1.0, factor))
    return replace(
        settings, **{n: max(24, int(getattr(settings, n) * f)) for n, f in factors.items()}
    )
