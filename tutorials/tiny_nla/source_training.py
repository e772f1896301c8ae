"""Trains the source model, with read-out heads that make its residual stream legible.

The heads look at the output of block K only and are thrown away afterwards. They ask that the
facts an explanation names can be read from the direction of the residual (``ReadOut``), and that
the residual is close to a sum of one vector per fact (``FactSum``). So the legibility is by
construction, and says nothing about naturally trained models.
"""

from __future__ import annotations

from collections.abc import Sequence

import lexicon
import torch
from facts import KINDS, NAMES, PLACES, TOPICS, WordTables
from networks import causal_lm, round_to_bf16
from schedule import Progress, Stepper, batches_by_length, pad
from settings import Settings
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

IGNORE = -100
CANDIDATE_SHARE = 0.27
CLASS_SHARE = 0.5
GROUPS = tuple(lexicon.GROUP_LABELS)
PAD_ID = 0
HEAD_WEIGHTS = {
    "now": 0.5,
    "before": 0.5,
    "earlier": 0.5,
    "name": 1.0,
    "place": 1.0,
    "topic": 0.6,
    "kind": 0.4,
}
TOKEN_HEADS = ("now", "before", "earlier")
NEXT_WEIGHT = 0.5
SUM_WEIGHT = 2.5
NORM_WEIGHT = 0.05


def expected_next(
    logits_ND: torch.Tensor, group_of_V: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the model expects next, as the explanations will say it.

    Args:
        logits_ND: The source model's own logits, ``[n, vocab]``.
        group_of_V: Word group index of each token, -1 where it has none.

    Returns:
        A mask ``[n, vocab]`` of at most three likely tokens, and a group index ``[n]`` which is
        -1 unless no token is likely but one group is.
    """
    probs = logits_ND.float().softmax(-1)
    top = probs.topk(3, dim=-1)
    mask = torch.zeros_like(probs, dtype=torch.bool)
    mask.scatter_(1, top.indices, top.values >= CANDIDATE_SHARE)
    grouped = torch.zeros(len(probs), len(GROUPS) + 1)
    grouped.index_add_(1, group_of_V % (len(GROUPS) + 1), probs)
    best = grouped[:, : len(GROUPS)].max(-1)
    clear = (best.values >= CLASS_SHARE) & ~mask.any(-1)
    return mask, torch.where(clear, best.indices, torch.full_like(best.indices, -1))


def group_indices(tables: WordTables) -> torch.Tensor:
    """Returns the word group index of each token, -1 where it has none."""
    return torch.tensor([GROUPS.index(c) if c in GROUPS else -1 for c in tables.classes])


class Slots(nn.Module):
    """The facts as tokens: which vocabulary entry stands for each value of each fact.

    Every fact is expressed in the model's own token embedding, so that a verbalizer only has to
    learn one linear map per fact, not one direction per word.
    """

    def __init__(self, tables: WordTables):
        super().__init__()
        token = tables.tokenizer.token_to_id
        values = {"name": NAMES, "place": PLACES, "topic": TOPICS, "kind": KINDS}
        for key, words in values.items():
            ids = [token(f"Ġ{word}") if word else PAD_ID for word in words]
            self.register_buffer(key, torch.tensor(ids))

    def entries(self, key: str, embedding_VD: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of the values of a fact, all tokens for a token fact."""
        return embedding_VD if key in TOKEN_HEADS else embedding_VD[getattr(self, key)]


class ReadOut(nn.Module):
    """One linear map per fact from the direction of the residual to the token embedding."""

    def __init__(self, d_model: int, slots: Slots):
        super().__init__()
        self.slots = slots
        self.maps = nn.ModuleDict({k: nn.Linear(d_model, d_model) for k in (*HEAD_WEIGHTS, "next")})

    def forward(
        self,
        unit_ND: torch.Tensor,
        embedding_VD: torch.Tensor,
        labels: dict[str, torch.Tensor],
        target_N: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the weighted sum of the heads' cross entropies."""
        scaled_ND = unit_ND * unit_ND.shape[-1] ** 0.5
        logits_NV = self.maps["next"](scaled_ND) @ embedding_VD.T
        loss = NEXT_WEIGHT * F.cross_entropy(logits_NV, target_N, ignore_index=IGNORE)
        for key, weight in HEAD_WEIGHTS.items():
            logits = self.maps[key](scaled_ND) @ self.slots.entries(key, embedding_VD).T
            loss = loss + weight * F.cross_entropy(logits, labels[key])
        return loss


class FactSum(nn.Module):
    """Predicts the direction of the residual as a sum of one vector per fact."""

    def __init__(self, d_model: int, slots: Slots):
        super().__init__()
        self.slots = slots
        keys = (*HEAD_WEIGHTS, "next")
        self.maps = nn.ModuleDict({k: nn.Linear(d_model, d_model, bias=False) for k in keys})
        self.next_groups = nn.Embedding(len(GROUPS) + 1, d_model)
        nn.init.normal_(self.next_groups.weight, std=0.02)

    def forward(
        self,
        embedding_VD: torch.Tensor,
        labels: dict[str, torch.Tensor],
        likely_NV: torch.Tensor,
        group_N: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the predicted directions ``[n, d]`` of the residuals."""
        total_ND = self.maps["next"](likely_NV.float() @ embedding_VD)
        total_ND = total_ND + self.next_groups(group_N % (len(GROUPS) + 1))
        for key in HEAD_WEIGHTS:
            entries = self.slots.entries(key, embedding_VD)
            total_ND = total_ND + self.maps[key](entries[labels[key]])
        return total_ND


def label_rows(ids: Sequence[int], tables: WordTables) -> dict[str, list[int]]:
    """Returns the label of every head at every position of one text."""
    facts = tables.prefix_facts(ids, quotes=False)
    return {
        "now": list(ids),
        "before": [0, *ids[:-1]],
        "earlier": [0, 0, *ids[:-2]][: len(ids)],
        "name": [NAMES.index(f.name) for f in facts],
        "place": [PLACES.index(f.place) for f in facts],
        "topic": [TOPICS.index(f.topic) for f in facts],
        "kind": [KINDS.index(f.kind) for f in facts],
    }


def train_source(
    settings: Settings, texts: Sequence[str], tables: WordTables, seed: int
) -> LlamaForCausalLM:
    """Trains the source model from scratch on the given texts.

    Args:
        settings: Sizes of the run.
        texts: Documents, each used once.
        tables: Token look-up for the fact labels.
        seed: Seed of initialisation and order.
    """
    torch.manual_seed(seed)
    vocab_size = tables.tokenizer.get_vocab_size()
    model = causal_lm(settings, vocab_size, settings.source_blocks)
    slots = Slots(tables)
    read_out = ReadOut(settings.d_model, slots)
    fact_sum = FactSum(settings.d_model, slots)
    groups = group_indices(tables)
    rows = [tables.tokenizer.encode(text).ids[: settings.max_tokens] for text in texts]
    steps = -(-len(rows) // settings.source_batch)
    stepper = Stepper([model, read_out, fact_sum], settings.source_rate, steps)
    progress = Progress("source", steps)
    for index in batches_by_length([len(r) for r in rows], settings.source_batch, seed):
        batch = [rows[i] for i in index.tolist()]
        losses = _losses(model, read_out, fact_sum, batch, tables, groups, settings)
        stepper.step(sum(losses.values()))
        progress.update(**{key: loss.item() for key, loss in losses.items()})
    round_to_bf16(model)
    return model.eval()


def _losses(
    model: LlamaForCausalLM,
    read_out: ReadOut,
    fact_sum: FactSum,
    batch: list[list[int]],
    tables: WordTables,
    groups: torch.Tensor,
    settings: Settings,
) -> dict[str, torch.Tensor]:
    ids_BT = pad(batch, 0)
    real_BT = pad([[1] * len(row) for row in batch], 0).bool()
    target_BT = pad([[*row[1:], 2] for row in batch], IGNORE)
    # A document that was cut does not end here.
    for row, ids in zip(target_BT, batch, strict=True):
        if len(ids) == settings.max_tokens:
            row[len(ids) - 1] = IGNORE
    labelled = [label_rows(row, tables) for row in batch]
    labels = {key: torch.tensor([x for rows in labelled for x in rows[key]]) for key in labelled[0]}
    out = model(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
    logits_NV, target_N = out.logits[real_BT], target_BT[real_BT]
    resid_ND = out.hidden_states[settings.layer + 1][real_BT]
    likely_NV, group_N = expected_next(logits_NV.detach(), groups)
    unit_ND = F.normalize(resid_ND, dim=-1)
    embedding_VD = model.get_input_embeddings().weight
    predicted_ND = fact_sum(embedding_VD, labels, likely_NV, group_N)
    log_norm_N = (resid_ND.norm(dim=-1) / settings.d_model**0.5).log()
    return {
        "lm": F.cross_entropy(logits_NV, target_N, ignore_index=IGNORE),
        "heads": read_out(unit_ND, embedding_VD, labels, target_N),
        "sum": SUM_WEIGHT * _unexplained(predicted_ND, unit_ND),
        "norm": NORM_WEIGHT * log_norm_N.square().mean(),
    }


def _unexplained(predicted_ND: torch.Tensor, unit_ND: torch.Tensor) -> torch.Tensor:
    """Share of the variance of the residuals' directions that the prediction leaves over.

    Relative to the variance, because an absolute error could be lowered by giving all residuals
    one large common component.
    """
    spread = 1 - unit_ND.mean(0).square().sum()
    return (predicted_ND - unit_ND).square().sum(-1).mean() / spread
