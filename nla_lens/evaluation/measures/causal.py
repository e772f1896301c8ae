"""What a reconstruction does in the model that wrote the vector, put in the vector's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.evaluation.bootstrap import ratio
from nla_lens.evaluation.measures.fidelity import missing
from nla_lens.evaluation.report import Measure, measured
from nla_lens.evaluation.sample import Sample
from nla_lens.models.batching import right_padded
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.injection import norms, rescale

_ROWS_AT_ONCE: Final = 16


@dataclass
class Causal:
    """The source model, and where each vector of a sample stands in its text.

    Attributes:
        forward: `(ids [B, T], edit) -> logits [B, T, V]`, the residual at `place` passed through
            `edit`; see `stream.patching.patched`.
        place: Where the vectors were read.
        prompts: `[n]`: the ids of each vector's text.
        at: `[n]`: its position there.
        tokenizer: The model's own.
    """

    forward: Callable[[Tensor, Any], Tensor]
    place: ResidPost
    prompts: Sequence[Sequence[int]]
    at: Sequence[int]
    tokenizer: Any

    def log_probs(self, rows: Sequence[int], put: Tensor | None, *, add: bool = False) -> Tensor:
        """`[len(rows), V]` of what comes after each vector's token.

        Args:
            rows: Rows of the sample.
            put: `[len(rows), d]`, put in the vector's place, or added to it; None: nothing is done.
            add: Add instead of replacing.
        """
        found = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            ids_BT = right_padded([list(self.prompts[i][: self.at[i] + 1]) for i in some])
            where = torch.tensor([self.at[i] for i in some])
            batch = torch.arange(len(some))
            given = None if put is None else put[start : start + _ROWS_AT_ONCE]

            edit = None if given is None else _at(where, given, add=add)
            logits_BTV = self.forward(ids_BT, edit)
            found.append(logits_BTV[batch, where].float().log_softmax(-1).cpu())
        return torch.cat(found)


def _at(where_B: Tensor, given_BD: Tensor, *, add: bool) -> Callable[[Tensor], Tensor]:
    """Puts one vector into each row, or adds it."""

    def edit(resid_BTD: Tensor) -> Tensor:
        out_BTD, rows = resid_BTD.clone(), torch.arange(len(where_B))
        here = given_BD.to(resid_BTD)
        out_BTD[rows, where_B] = out_BTD[rows, where_B] + here if add else here
        return out_BTD

    return edit


def splice(sample: Sample, causal: Causal, dictionary: Any = None) -> Measure:
    """Row 11: the loss that comes back when AR(text) stands in the vector's place.

    `(CE_ablated - CE_spliced) / (CE_ablated - CE_clean)`, ablated by the mean vector, at the tokens
    that the text really goes on with. A reconstruction is given the vector's own length: it is a
    direction.
    """
    title = "loss recovered by AR(text) in the vector's place, against mean ablation"
    rows = [i for i in range(len(sample)) if causal.at[i] + 1 < len(causal.prompts[i])]
    if len(rows) < 2:
        return missing("splice", title, "no vector has a token behind it")
    own = sample.vectors_ND[rows]
    lengths = norms(own)
    permuted = sample.back(sample.permuted_texts)[rows]
    put = {
        "clean": None,
        "spliced": rescale(sample.said_ND[rows], 1.0) * lengths,
        "mean": sample.vectors_ND.mean(0, keepdim=True).expand_as(own),
        "zero": torch.zeros_like(own),
        "permuted": rescale(permuted, 1.0) * lengths,
    }
    if dictionary is not None:
        with torch.no_grad():
            put["dictionary"] = dictionary.decode(dictionary.encode(own)).float()
    following = torch.tensor([causal.prompts[i][causal.at[i] + 1] for i in rows])
    log_probs = {name: causal.log_probs(rows, vectors) for name, vectors in put.items()}
    loss = {
        name: -lp.gather(1, following[:, None])[:, 0].double().numpy()
        for name, lp in log_probs.items()
    }
    documents = sample.documents[rows]

    def recovered(name: str, ablated: str = "mean") -> Any:
        top = loss[ablated] - loss[name]
        return ratio(top, loss[ablated] - loss["clean"], documents, seed=sample.seed)

    found, control = recovered("spliced"), recovered("permuted")
    clean = log_probs["clean"].double()
    kl = {
        name: float((clean.exp() * (clean - lp.double())).sum(-1).mean())
        for name, lp in log_probs.items()
        if name != "clean"
    }
    return measured(
        "splice",
        title,
        found,
        control=control,
        control_name="AR of a permuted text",
        holds=found.low > control.high,
        reason="far more than a permuted text"
        if found.low > control.high
        else "no more than others",
        against_zero=recovered("spliced", "zero").value,
        dictionary=None if dictionary is None else recovered("dictionary").value,
        loss={name: float(values.mean()) for name, values in loss.items()},
        kl_from_clean=kl,
    )
