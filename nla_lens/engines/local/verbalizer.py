"""What the AVs of all frameworks in this process share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nla_lens.engines import Job
from nla_lens.engines.local.decoding import Decoder
from nla_lens.models.anatomy import embedding_of, table_rows
from nla_lens.models.batching import choose_batch_size
from nla_lens.models.caching import KEYS_AND_VALUES
from nla_lens.models.passes import OwnPass


class LocalVerbalizer:
    """What all AVs in this process share; a subclass adds `run` (see `Forward`).

    Attributes:
        eos_ids: See `VerbalizerEngine`.
        caching: See `Forward`; settled when the engine is loaded, see `self_check`.
    """

    streams = True

    def __init__(self, lm: Any, device: torch.device, eos_ids: frozenset[int]) -> None:
        """Args:
        lm: The transformers causal LM inside.
        device: Where token ids go.
        eos_ids: See `VerbalizerEngine`.
        """
        self.eos_ids = eos_ids
        self._lm, self._device = lm, device
        self.caching = KEYS_AND_VALUES
        self._decoder = Decoder(self, device)  # type: ignore[arg-type]

    @property
    def table_rows(self) -> int:
        """How many tokens it knows."""
        return table_rows(self._lm)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """What enters block 0, `[T, d]` float32; Gemma's sqrt(d) is applied by its own module."""
        ids_1T = torch.tensor([list(ids)], device=self._device)
        # In a pass, so that another's hooks do not act on it.
        with OwnPass(self._lm):
            embedded: Tensor = embedding_of(self._lm)(ids_1T)[0]
        return embedded.float().cpu()

    def can_share(self, n_columns: int) -> bool:
        """See `Forward`; not where the framework brings attention of its own."""
        return False

    def generate(self, job: Job) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, ids) as rows are over."""
        n_tokens = len(job.prompt_ids) + job.max_new_tokens
        return self._decoder.decode(job, job.batch_size or choose_batch_size(self._lm, n_tokens))

    def forget_prefix(self) -> None:
        """Frees the kept prefix; needed only after the model's weights were changed."""
        self._decoder.forget_prefix()
