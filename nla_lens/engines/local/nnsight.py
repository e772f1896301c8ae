"""Both halves as nnsight models in this process; the injection is a write to an envoy's output.

`replace` writes the embedding's output, `norm_matched_add` that of block 1, inside
`model.generate`. For those who want their own interventions on the verbalizer while it reads:
`nla.verbalizer.engine.model` is an nnsight model like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.engines import Job
from nla_lens.engines.local.nnsight_package import import_nnsight
from nla_lens.engines.local.nnsight_places import Injection, Places
from nla_lens.engines.local.nnsight_streaming import streamed
from nla_lens.engines.local.nnsight_threads import let_threads
from nla_lens.engines.local.nnsight_traces import PLAIN, forced, generate, read
from nla_lens.engines.local.self_check import Script, check_decoding
from nla_lens.engines.local.transformers import adapter_blocks
from nla_lens.models.anatomy import table_rows, width_of
from nla_lens.models.batching import choose_batch_size, length_batches
from nla_lens.models.passes import current_pass
from nla_lens.models.pickling import forget_hooks, make_picklable
from nla_lens.models.placement import Placement
from nla_lens.models.tokens import find_eos_ids
from nla_lens.models.weights import load_backbone, load_causal_lm, load_tokenizer
from nla_lens.stream.hook_point import ResidPost

CLOSING = "</explanation>"
"""Generation of a row ends behind it; where exactly an answer is over is the job's to say."""


def load_verbalizer(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> NNsightVerbalizer:
    """The AV of a checkpoint directory."""
    from transformers import GenerationConfig

    model = load_causal_lm(checkpoint.path, base=checkpoint.base, **vars(placement))
    eos_ids = find_eos_ids(model)
    # Of the checkpoint's own generation_config only the end-of-sequence ids may count.
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids) or None)
    tokenizer = load_tokenizer(
        checkpoint.tokenizer_path, trust_remote_code=placement.trust_remote_code
    )
    engine = NNsightVerbalizer(_wrapped(model, tokenizer), spec, eos_ids)
    check_decoding(model, Script.of(model, engine, spec), engine.rehearse, "nnsight", "nnsight")
    return engine


def load_reconstructor(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> NNsightReconstructor:
    """The truncated backbone of an AR directory."""
    n_blocks = adapter_blocks(checkpoint, spec)
    model = load_backbone(
        checkpoint.path, n_blocks=n_blocks, base=checkpoint.base, **vars(placement)
    )
    return NNsightReconstructor(_wrapped(model))


def _wrapped(model: Any, tokenizer: Any = None) -> Any:
    if tokenizer is None:
        return import_nnsight().NNsight(model)
    return import_nnsight().TransformersModel(model, task="text-generation", tokenizer=tokenizer)


class _Half:
    """A half that pickles as its torch module; edits registered on the nnsight model stay behind.

    Attributes:
        model: The nnsight model.
    """

    model: Any

    @property
    def table_rows(self) -> int:
        """How many tokens it knows."""
        return table_rows(self.model._module)

    def __getstate__(self) -> dict[str, Any]:
        tokenizer = getattr(self.model, "tokenizer", None)
        make_picklable(self.model._module)
        return {**vars(self), "model": (self.model._module, tokenizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, model=_wrapped(*state["model"]))
        let_threads(self.model)
        forget_hooks(self.model._module)


class NNsightVerbalizer(_Half):
    """An AV as an nnsight model.

    Attributes:
        streams: See `VerbalizerEngine`.
        model: The nnsight model.
        hf_model: The transformers model in it; what is written when an NLA is saved.
        places: Where things are in it.
        eos_ids: See `VerbalizerEngine`.
    """

    streams = True

    def __init__(self, model: Any, spec: NLASpec, eos_ids: frozenset[int]) -> None:
        """Raises:
        NLAError: The model has no block 1 for `norm_matched_add`.
        """
        let_threads(model)
        self.model, self.eos_ids, self._spec = model, eos_ids, spec
        self.hf_model: Any = model._module
        self.places = Places.of(model)
        self._path = self.places.injection(spec)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """What enters block 0, `[T, d]` float32."""
        return self._read(self.places.embedding, [list(ids)], [range(len(ids))]).float()

    def generate(self, job: Job) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, ids) batch by batch."""
        size = job.batch_size or self._batch_size(len(job.prompt_ids) + job.max_new_tokens)
        for start in range(0, len(job.injected_ND), size):
            rows = range(start, min(start + size, len(job.injected_ND)))
            if job.watched is not None and current_pass() is None:
                yield from streamed(job, rows, self.eos_ids, partial(self._generate, job, rows))
                continue
            ids_BN = self._generate(job, rows)
            for row, ids in zip(rows, ids_BN.tolist(), strict=True):
                yield row, cut(ids, job, self.eos_ids)

    def _batch_size(self, n_tokens: int) -> int:
        return choose_batch_size(self.model._module, n_tokens)

    @torch.inference_mode()
    def _generate(self, job: Job, rows: range, **more: Any) -> Tensor:
        vectors_BD = job.injected_ND[rows.start : rows.stop]
        injection = Injection.make(self._path, self._spec, vectors_BD, job.marker)
        seeds = [job.seeds[row] for row in rows] if job.seeds else []
        return generate(
            self.model,
            job.prompt_ids,
            injection,
            {**self.options(job.max_new_tokens), **more},
            temperature=job.temperature,
            seeds=seeds,
            backend=self._backend(len(rows) * job.max_new_tokens),
        )

    def rehearse(self, script: Script) -> list[Tensor]:
        """See `self_check.check_decoding`; nothing is injected."""
        longest = max(map(len, script.rows))
        rows = [row + row[-1:] * (longest - len(row)) for row in script.rows]
        logits_BNV = forced(self.model, script.prompt_ids, rows, self.options(longest))
        return [
            logits_NV[: len(row)] for logits_NV, row in zip(logits_BNV, script.rows, strict=True)
        ]

    def options(self, max_new_tokens: int) -> Mapping[str, Any]:
        """Arguments of transformers' `generate`."""
        ends = sorted(self.eos_ids)
        return {
            **PLAIN,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": ends or None,
            # Only rows that are over are padded, and cut.
            "pad_token_id": ends[0] if ends else 0,
            "stop_strings": [CLOSING],
            "tokenizer": self.model.tokenizer,
        }

    def _read(self, path: str, prompts: Any, positions: Any) -> Tensor:
        n_numbers = sum(map(len, positions)) * width_of(self.model._module)
        return read(self.model, path, prompts, positions, backend=self._backend(n_numbers))

    def _backend(self, n_numbers: int) -> Any:
        """What runs a trace that brings so many numbers back; None is this process."""
        return None


class NNsightReconstructor(_Half):
    """An AR's backbone as an nnsight model, read at its last block's output.

    Attributes:
        model: The nnsight model.
        hf_model: The transformers model in it; what is written when an NLA is saved.
        places: Where things are in it.
    """

    def __init__(self, model: Any) -> None:
        let_threads(model)
        self.model = model
        self.hf_model: Any = model._module
        self.places = Places.of(model)
        self._last = self.places.resid(ResidPost(len(self.places.blocks) - 1))

    @torch.inference_mode()
    def last_resid(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """`[n, d]` float32."""
        out_ND = torch.empty(len(prompts), width_of(self.model._module))
        for rows in self._batches([len(prompt) for prompt in prompts]):
            batch = [prompts[row] for row in rows]
            out_ND[rows] = self._read(batch).float()
        return out_ND

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        return length_batches(lengths, self.model.device or torch.device("cpu"))

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        positions = [[len(prompt) - 1] for prompt in prompts]
        n_numbers = len(prompts) * width_of(self.model._module)
        return read(self.model, self._last, prompts, positions, backend=self._backend(n_numbers))

    def _backend(self, n_numbers: int) -> Any:
        """What runs a trace that brings so many numbers back; None is this process."""
        return None


def cut(ids: Sequence[int], job: Job, eos_ids: frozenset[int]) -> list[int]:
    """The ids up to where an answer is over, without the padding behind."""
    for n, token in enumerate(ids, start=1):
        if token in eos_ids or job.is_finished(ids[:n]):
            return list(ids[:n])
    return list(ids)
