"""A source model on an NDIF server: positions are picked there, so that only `[n, d]` travels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_lens.engines.local.nnsight_places import Places
from nla_lens.engines.local.nnsight_traces import PLAIN, read, write_on
from nla_lens.engines.ndif.engine import RemoteModel, model_key, request_batches
from nla_lens.engines.ndif.results import check_ids, check_vectors
from nla_lens.engines.ndif.server import Server
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import text_model, width_of
from nla_lens.models.tokens import find_eos_ids
from nla_lens.models.weights import load_tokenizer
from nla_lens.stream.hook_point import ResidPost


def open_remote_source(model: Any, remote: str | bool, tokenizer: Any = None) -> NDIFSource:
    """A source that runs on a server.

    Args:
        model: Hub repository, a directory that the server has, too, or an nnsight model of either.
        remote: True, "local" or an address, as nnsight takes it.
        tokenizer: Instead of the model's own.

    Raises:
        NLAError: Not something a server could have.
    """
    server = Server.named("ndif" if remote is True else f"ndif:{remote}")
    if isinstance(model, (str, Path)):
        path = Path(os.path.expanduser(model))
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
        return NDIFSource(
            RemoteModel.open(str(model), path if os.path.isdir(path) else None, server, tokenizer),
            tokenizer,
        )
    repo = getattr(model, "repo_id", None)
    if not isinstance(repo, str):
        raise NLAError(
            f"remote= runs models by their names; a {type(model).__name__} has none that a server "
            "knows. Pass a hub repository or nnsight's TransformersModel(NAME)"
        )
    found = tokenizer if tokenizer is not None else model.tokenizer
    key = model_key(model, repo, is_local=Path(repo).is_dir())
    return NDIFSource(RemoteModel(repo, model, key, server), found)


class NDIFSource:
    """Reads the residual stream of a model on a server.

    Attributes:
        remote: The model there.
        tokenizer: The model's own, or the caller's.
        is_whole: What is deployed is a whole model.
    """

    is_whole = True

    def __init__(self, remote: RemoteModel, tokenizer: Any) -> None:
        self.remote, self.tokenizer = remote, tokenizer
        self._places = Places.of(remote.model)

    def check_place(self, place: ResidPost) -> None:
        """Raises an NLAError if there is no such block."""
        self._places.resid(place)

    def resid_at(
        self,
        prompts: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        place: ResidPost,
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """The residual stream at some tokens of prompts, `[n_i, d]` each."""
        found: dict[int, Tensor] = {}
        path, width = self._places.resid(place), width_of(self.remote.model._module)
        for rows in request_batches([len(prompt) for prompt in prompts], batch_size):
            picked = [positions[row] for row in rows]
            with self.remote.server.told(self.remote.name), torch.inference_mode():
                resid_ND = read(
                    self.remote.model,
                    path,
                    [prompts[row] for row in rows],
                    picked,
                    backend=self.remote.backend(sum(map(len, picked)) * width),
                )
                check_vectors(resid_ND, width, finite=False)
            parts = resid_ND.clone().split([len(part) for part in picked])
            found |= dict(zip(rows, parts, strict=True))
        return [found[row] for row in range(len(prompts))]

    def resid(self, ids_BT: Tensor, place: ResidPost) -> Tensor:
        """`[B, T, d]`; every position travels."""
        prompts = ids_BT.tolist()
        return torch.stack(self.resid_at(prompts, [range(len(p)) for p in prompts], place))

    def go_on(self, ids: Sequence[int], n: int) -> list[int]:
        """Argmax continuation, end-of-sequence left out."""
        ends = find_eos_ids(self.remote.model._module)
        options = {**PLAIN, "max_new_tokens": n, "pad_token_id": min(ends, default=0)}
        options["eos_token_id"] = sorted(ends) or None
        with self.remote.server.told(self.remote.name), torch.inference_mode():
            model, backend = self.remote.model, self.remote.backend(n)
            written = write_on(model, ids, options, backend=backend)
            vocab_size = int(text_model(model._module).config.vocab_size)
            check_ids(torch.tensor([written]), 1, n, vocab_size)
        over = next((i for i, token in enumerate(written) if token in ends), len(written))
        return written[:over]
