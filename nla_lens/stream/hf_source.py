"""A transformers model as a source of residual vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nla_lens.checks import to_path
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, input_device, table_rows
from nla_lens.models.block_reader import BlockReader
from nla_lens.models.cache_keyword import cache_keyword
from nla_lens.models.caching import is_right_with_its_own_cache
from nla_lens.models.passes import OwnPass
from nla_lens.models.proof import check_stream, say_dropout
from nla_lens.models.tokens import find_eos_ids
from nla_lens.models.weights import load_backbone, load_causal_lm, load_tokenizer
from nla_lens.models.wrappers import is_transformers, unwrapped
from nla_lens.stream.hook_point import ResidPost


class HFSource:
    """Reads the output of a block; see `nla_lens.models.block_reader` for what does not run."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        """Args:
        model: A transformers model, in eval mode for repeatable values.
        tokenizer: Instead of the one under the model's `name_or_path`.

        Raises:
            NLAError: Not a transformers model, nor one inside something else; or one of which
                `hidden_states` are not its blocks' outputs.
        """
        if not isinstance(model, nn.Module) or not any(map(is_transformers, model.modules())):
            raise NLAError(
                f"cannot read the residual stream of a {type(model).__name__}; pass a "
                "transformers, TransformerLens or nnsight model, or the name of a checkpoint"
            )
        self.model: Any = unwrapped(model)
        self._blocks = blocks_of(self.model)
        self.tokenizer = tokenizer if tokenizer is not None else _own_tokenizer(self.model)
        # Raises where the weights are nowhere.
        input_device(self.model)
        check_stream(self.model)
        say_dropout(self.model)

    @property
    def is_whole(self) -> bool:
        """Whether there is an lm_head to write on with."""
        return self.model.get_output_embeddings() is not None

    @property
    def table_rows(self) -> int:
        """How many tokens it knows."""
        return table_rows(self.model)

    @property
    def context_length(self) -> Any:
        """Most tokens the model was made for; None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def check_place(self, place: ResidPost) -> None:
        """Raises an NLAError if there is no such block."""
        if place.layer >= len(self._blocks):
            raise NLAError(
                f"layer {place.layer} does not exist: {self.model.name_or_path} has "
                f"{len(self._blocks)} blocks (0 to {len(self._blocks) - 1})"
            )

    def resid(self, ids_BT: Tensor, place: ResidPost) -> Tensor:
        """`[B, T, d]`, output of block `place.layer`; later blocks do not run."""
        return BlockReader(self.model, place.layer).run(ids_BT)

    def resid_at(
        self,
        prompts: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        place: ResidPost,
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """The residual stream at some tokens of prompts, `[n_i, d]` each."""
        # A new reader each time: what one keeps of a prefix would outlive a change of weights.
        return BlockReader(self.model, place.layer).read(prompts, positions, batch_size)

    @torch.inference_mode()
    def go_on(self, ids: Sequence[int], n: int) -> list[int]:
        """Argmax continuation with a cache, in families where that is known to be right."""
        ends, written, takes_cache_as = find_eos_ids(self.model), [], cache_keyword(self.model)
        keeps = is_right_with_its_own_cache(self.model)
        step, cache = torch.tensor([list(ids)], device=input_device(self.model)), None
        for _ in range(n):
            held = {takes_cache_as: cache} if keeps else {}
            with OwnPass(self.model):
                out = self.model(input_ids=step, use_cache=keeps, **held)
            cache, chosen = out.get(takes_cache_as), int(out.logits[0, -1].float().argmax())
            if chosen in ends:
                break
            written.append(chosen)
            newest = torch.tensor([[chosen]], device=step.device)
            step = newest if keeps else torch.cat([step, newest], dim=1)
        return written


def _own_tokenizer(model: Any) -> Any:
    path = getattr(model, "name_or_path", "")
    if not path:
        raise NLAError(
            f"this {type(model).__name__} was not loaded from anywhere, so its tokenizer is not "
            "known; pass tokenizer="
        )
    return load_tokenizer(str(path))


def load_source(
    name: str | os.PathLike[str], *, n_blocks: int | None, tokenizer: Any = None, **placement: Any
) -> HFSource:
    """Loads a source model, only its first blocks where `n_blocks` says so."""
    local = to_path(name)
    name = local if os.path.isdir(local) else os.fspath(name)
    if tokenizer is None:
        foreign_code = bool(placement.get("trust_remote_code"))
        tokenizer = load_tokenizer(name, trust_remote_code=foreign_code)
    if n_blocks is None:
        return HFSource(load_causal_lm(name, **placement), tokenizer)
    return HFSource(load_backbone(name, n_blocks=n_blocks, **placement), tokenizer)
