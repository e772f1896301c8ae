"""Both halves on an NDIF server: this process holds no weights but the value head.

What travels to the server is the prompt's ids and the vectors (or the reconstructor's prompts), and
back come token ids (or one `[d]` vector a text). The value head is applied here: the server would
send back as many bytes after it as before it, so its one file is all that is downloaded.

`engine="ndif"` takes the server and the key from nnsight's configuration; `"ndif:http://host:port"`
names another server, and `"ndif:local"` is nnsight's simulation of one in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from torch import Tensor

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.engines import Job
from nla_lens.engines.local.nnsight import NNsightReconstructor, NNsightVerbalizer
from nla_lens.engines.local.nnsight_package import import_nnsight
from nla_lens.engines.local.nnsight_threads import let_threads
from nla_lens.engines.ndif.results import check_ids, check_vectors
from nla_lens.engines.ndif.server import Server
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import text_model, width_of
from nla_lens.models.placement import Placement
from nla_lens.models.small_files import check_generation_config
from nla_lens.models.tokens import find_eos_ids
from nla_lens.models.weights import load_tokenizer

_MOST_ROWS: Final = 32
_MOST_BYTES: Final = 8 << 20
_MOST_TOKENS: Final = 8192


@dataclass(frozen=True)
class RemoteModel:
    """A model on a server.

    Attributes:
        name: What the caller called it.
        model: An nnsight model without weights.
        key: The server's name of it.
        server: The server.
        opened: What `open` was asked.
    """

    name: str
    model: Any
    key: str
    server: Server
    opened: tuple[Any, ...] = field(default=(), repr=False)

    def __reduce__(self) -> Any:
        """Its shape is built again where a pickle is opened."""
        return RemoteModel.open, self.opened

    @classmethod
    def open(
        cls,
        name: str,
        path: Path | None,
        server: Server,
        tokenizer: Any,
        revision: str | None = None,
    ) -> RemoteModel:
        """Builds a model's shape from its config.

        Args:
            name: Hub repository, or what a directory is called.
            path: The directory, as the server knows it, where it is no repository.
            server: The server.
            tokenizer: The model's own: nnsight cannot always tell it from a config.
            revision: Of the repository; to the server, each one deployed is another model.

        Raises:
            NLAError: No such model, or none that nnsight can build.
        """
        repo = name if path is None else str(path.resolve())
        try:
            model = import_nnsight().TransformersModel(
                repo, task="text-generation", tokenizer=tokenizer, revision=revision
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise NLAError(f"the shape of {repo} cannot be built: {reason}") from error
        called = name if revision is None else f"{name} (revision {revision})"
        key = model_key(model, repo, is_local=path is not None)
        return cls(called, model, key, server, (name, path, server, tokenizer, revision))

    def backend(self, n_numbers: int) -> Any:
        """What runs one trace that brings so many numbers back."""
        return self.server.backend(self.model, self.key, n_numbers)


def model_key(model: Any, repo: str, *, is_local: bool) -> str:
    """The server's name of a model; nnsight asks the hub for a repository's exact spelling."""
    if not is_local:
        # Offline, or a hub that is away: the spelling is then taken as it is.
        with contextlib.suppress(OSError, ValueError, httpx.HTTPError):
            return str(model.to_model_key())
    named = {"repo_id": repo, "revision": model.revision, "task": model.task}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(named)}"


def load_verbalizer(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement, engine: str = "ndif"
) -> NDIFVerbalizer:
    """An AV on a server."""
    remote = _open_half(checkpoint, placement, engine)
    return NDIFVerbalizer(remote, spec, _eos_ids(checkpoint, remote.model))


def load_reconstructor(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement, engine: str = "ndif"
) -> NDIFReconstructor:
    """An AR's backbone on a server."""
    return NDIFReconstructor(_open_half(checkpoint, placement, engine))


class _Half:
    """A half on a server, whose shape is built again where its pickle is opened."""

    remote: RemoteModel

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, model=state["remote"].model)
        let_threads(state["remote"].model)


class NDIFVerbalizer(_Half, NNsightVerbalizer):
    """An AV on a server.

    Attributes:
        remote: The model there.
        streams: Not: a request is answered when it is done.
    """

    streams = False

    def __init__(self, remote: RemoteModel, spec: NLASpec, eos_ids: frozenset[int]) -> None:
        super().__init__(remote.model, spec, eos_ids)
        # A shape without weights.
        self.hf_model = None
        self.remote = remote
        self._vocab_size = int(text_model(remote.model._module).config.vocab_size)

    @property
    def server(self) -> Server:
        """How the server is talked to: patience, traffic."""
        return self.remote.server

    def _batch_size(self, n_tokens: int) -> int:
        width = width_of(self.model._module)
        return max(1, min(_MOST_ROWS, _MOST_BYTES // (4 * width)))

    def _generate(self, job: Job, rows: range, **more: Any) -> Tensor:
        with self.server.told(self.remote.name):
            ids_BN = super()._generate(job, rows, **more)
            check_ids(ids_BN, len(rows), job.max_new_tokens, self._vocab_size)
            return ids_BN

    def _read(self, path: str, prompts: Any, positions: Any) -> Tensor:
        with self.server.told(self.remote.name):
            resid_ND = super()._read(path, prompts, positions)
            return check_vectors(resid_ND, width_of(self.model._module))

    def _backend(self, n_numbers: int) -> Any:
        return self.remote.backend(n_numbers)


class NDIFReconstructor(_Half, NNsightReconstructor):
    """An AR's backbone on a server.

    Attributes:
        remote: The model there.
    """

    def __init__(self, remote: RemoteModel) -> None:
        super().__init__(remote.model)
        # A shape without weights.
        self.hf_model = None
        self.remote = remote

    @property
    def server(self) -> Server:
        """How the server is talked to: patience, traffic."""
        return self.remote.server

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        return request_batches(lengths)

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        with self.server.told(self.remote.name):
            return check_vectors(super()._read(prompts), width_of(self.model._module))

    def _backend(self, n_numbers: int) -> Any:
        return self.remote.backend(n_numbers)


def request_batches(lengths: Sequence[int], batch_size: int | None = None) -> Iterator[list[int]]:
    """Rows for one request each, of like length: padding costs less than another request."""
    most, batch = batch_size or _MOST_ROWS, list[int]()
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) >= most or lengths[row] * (len(batch) + 1) > _MOST_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _is_here(checkpoint: Checkpoint) -> bool:
    # Path.expanduser raises where there is no such user.
    return os.path.isdir(os.path.expanduser(checkpoint.name))


def _open_half(checkpoint: Checkpoint, placement: Placement, engine: str) -> RemoteModel:
    for name in ("dtype", "device", "device_map"):
        if getattr(placement, name) is not None:
            raise NLAError(f"{name}= has no meaning with engine={engine!r}: the server decides it")
    if checkpoint.is_adapter:
        raise NLAError(
            f"{checkpoint.name} is a LoRA adapter, which engine={engine!r} cannot run: merge it "
            "into its base model and have that deployed, or use another engine"
        )
    if checkpoint.name.count("/") > 1 and not _is_here(checkpoint):
        raise NLAError(
            f"{checkpoint.name} is a folder of a hub repository, and NDIF deploys whole "
            f"repositories: put the half into one of its own, or use another engine"
        )
    tokenizer = load_tokenizer(
        checkpoint.tokenizer_path, trust_remote_code=placement.trust_remote_code
    )
    is_local = _is_here(checkpoint)
    path = checkpoint.path if is_local else None
    server = Server.named(engine)
    return RemoteModel.open(checkpoint.name, path, server, tokenizer, checkpoint.revision)


def _eos_ids(checkpoint: Checkpoint, model: Any) -> frozenset[int]:
    """As where the weights are: a model built from its config has no generation_config."""
    from transformers import GenerationConfig

    check_generation_config(checkpoint.path)
    if (checkpoint.path / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(str(checkpoint.path)).eos_token_id
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return find_eos_ids(model._module)
