"""Collects residual vectors of the source model with their facts and gold explanations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from facts import Facts, WordTables
from lexicon import GROUP_LABELS
from schedule import pad
from source_training import GROUPS, expected_next, group_indices
from transformers import LlamaForCausalLM

READ_BATCH = 64


@dataclass(frozen=True)
class Sample:
    """Vectors and what is known about each.

    Attributes:
        vectors_ND: Residuals at the output of block K, float32.
        facts: The facts of each vector.
        prefixes: The text up to and including each vector's token.
    """

    vectors_ND: torch.Tensor
    facts: list[Facts]
    prefixes: list[str]


@torch.no_grad()
def collect(
    source: LlamaForCausalLM,
    texts: Sequence[str],
    tables: WordTables,
    layer: int,
    per_document: int | None,
    seed: int,
    max_tokens: int = 500,
) -> Sample:
    """Runs the source model over texts and keeps some or all positions.

    Args:
        source: The source model.
        texts: Documents.
        tables: Token look-up.
        layer: K; the output of block K is kept.
        per_document: Positions drawn per document, None for all of them.
        seed: Seed of the draw.
        max_tokens: Documents are cut to this many tokens.
    """
    rng = random.Random(seed)
    groups = group_indices(tables)
    vectors, facts, prefixes = [], [], []
    for start in range(0, len(texts), READ_BATCH):
        rows = [tables.tokenizer.encode(t).ids[:max_tokens] for t in texts[start:][:READ_BATCH]]
        out = source(input_ids=pad(rows, 0), output_hidden_states=True, use_cache=False)
        for row, ids in enumerate(rows):
            wanted = range(len(ids))
            if per_document is not None and len(ids) > per_document:
                wanted = sorted(rng.sample(range(len(ids)), per_document))
            index = list(wanted)
            vectors.append(out.hidden_states[layer + 1][row, index].clone())
            likely_NV, group_N = expected_next(out.logits[row, index], groups)
            known = tables.prefix_facts(ids)
            for place, likely, group in zip(index, likely_NV, group_N.tolist(), strict=True):
                facts.append(with_next(known[place], likely, group, ids[: place + 1], tables))
                prefixes.append(tables.tokenizer.decode(ids[1 : place + 1]))
    return Sample(torch.cat(vectors), facts, prefixes)


def with_next(
    facts: Facts, likely_V: torch.Tensor, group: int, ids: Sequence[int], tables: WordTables
) -> Facts:
    """Adds to the facts what the source model expects next.

    Args:
        facts: The facts of the position.
        likely_V: Mask of the likely next tokens.
        group: Index of the likely word group, -1 for none.
        ids: Token ids of the prefix.
        tables: Token look-up.
    """
    said = {tables.names[i] or tables.places[i] for i in ids}
    names = []
    for token in likely_V.nonzero().flatten().tolist():
        who = tables.names[token] or tables.places[token]
        # An explanation never says a name that the text does not contain.
        new = who is not None and who not in said
        names.append(GROUP_LABELS[tables.classes[token]] if new else tables.next_name(token))
    return replace(
        facts,
        next_words=tuple(dict.fromkeys(names)),
        next_class=GROUPS[group] if group >= 0 else None,
    )


def variance_nrm(vectors_ND: torch.Tensor) -> float:
    """Mean squared distance of the normalised vectors from their mean, averaged over d.

    The vectors are scaled to norm sqrt(d), so the result lies in [0, 1].
    """
    unit_ND = torch.nn.functional.normalize(vectors_ND.float(), dim=-1)
    return (1 - unit_ND.mean(0).square().sum()).item()
