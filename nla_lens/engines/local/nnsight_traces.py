"""The traces that run an NLA's halves and its source: generate with injection, write on, read.

They run in this process or on a server, as the backend says. A block is shipped as source with the
values it names, so a block here names torch, the model and plain values, and nothing of nla_lens,
which a server does not have; functions and constants of ours are written out inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.engines.local.nnsight_places import Injection
from nla_lens.engines.local.nnsight_threads import ending_early
from nla_lens.models.passes import OwnPass

PLAIN: Final[Mapping[str, Any]] = {
    "do_sample": False,
    # Without a cache every step would run the prompt again, and only the first is injected.
    "use_cache": True,
    "cache_implementation": None,
    "max_time": None,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "num_return_sequences": 1,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "return_dict_in_generate": False,
}
"""Arguments of transformers' `generate` for argmax and nothing else; they override the checkpoint's
generation_config in every version, which a GenerationConfig does not."""


def generate(
    model: Any,
    prompt_ids: Sequence[int],
    injection: Injection,
    options: Mapping[str, Any],
    *,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    backend: Any = None,
) -> Tensor:
    """Generates after one prompt, with a vector injected into each row.

    Args:
        model: An nnsight model.
        prompt_ids: The prompt.
        injection: One vector a row.
        options: Arguments of transformers' `generate`.
        temperature: 0 is argmax; above, each row draws from a generator of its own.
        seeds: One per row, above temperature 0.
        backend: What runs the trace; None runs it here.

    Returns:
        Generated ids `[B, n]`; rows that are over before the longest end in padding.
    """
    # What a block names is shipped, so it names these and not the dataclass.
    path, marker, adds = injection.path, injection.marker, injection.adds
    vectors_BD, seed_list = injection.vectors_BD.contiguous(), [int(seed) for seed in seeds]
    ids_BT = torch.tensor([list(prompt_ids)] * len(vectors_BD))
    n_prompt, n_steps = ids_BT.shape[1], int(options["max_new_tokens"])
    with (
        _turn(model, backend),
        # A step that is not made, as all rows are over before, is no fault.
        ending_early(model),
        model.generate(ids_BT, backend=backend, **options) as tracer,
    ):
        tokens: Any = []
        tokens.save()
        output = model.get(path).output
        there = output[0] if isinstance(output, tuple) else output
        written = there.clone()
        if adds:
            marked = there[:, marker].float()
            # In two steps, as squares may leave float32's range.
            most = marked.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            norm = (marked / most).norm(dim=-1, keepdim=True) * most
            written[:, marker] = (marked + norm * vectors_BD.to(marked.device)).to(there.dtype)
        else:
            written[:, marker] = vectors_BD.to(device=there.device, dtype=there.dtype)
        model.get(path).output = (written, *output[1:]) if isinstance(output, tuple) else written
        if temperature > 0:
            generators = [torch.Generator().manual_seed(seed) for seed in seed_list]
            for _ in tracer.iter[:n_steps]:
                logits = model.output.logits
                chances = torch.softmax(logits[:, -1].float() / temperature, -1).cpu()
                drawn = [
                    int(torch.multinomial(row, 1, generator=generator))
                    for row, generator in zip(chances, generators)  # noqa: B905
                ]
                tokens.append(drawn)
                # The argmax that follows picks what was drawn.
                logits[range(len(drawn)), -1, drawn] = float("inf")
        else:
            tokens.append(tracer.result[:, n_prompt:])
    if temperature > 0:
        return torch.tensor(tokens).T
    found: Tensor = tokens[0]
    return found.cpu()


def forced(
    model: Any, prompt_ids: Sequence[int], rows: Sequence[Sequence[int]], options: Mapping[str, Any]
) -> Tensor:
    """Generates given tokens after one prompt, in this process.

    Args:
        model: An nnsight model.
        prompt_ids: The prompt.
        rows: What each row writes, equally long.
        options: Arguments of transformers' `generate`.

    Returns:
        The logits before each token, `[B, n, V]` float32.
    """
    ids_BT, steps = torch.tensor([list(prompt_ids)] * len(rows)), list(zip(*rows, strict=True))
    with model.generate(ids_BT, **options) as tracer:
        found: Any = []
        found.save()
        for _ in tracer.iter[: len(steps)]:
            step = steps[len(found)]
            logits = model.output.logits
            found.append(logits[:, -1].float().cpu().clone())
            # The argmax that follows picks what was given.
            logits[range(len(step)), -1, list(step)] = float("inf")
    return torch.stack(found, dim=1)


def write_on(
    model: Any, prompt_ids: Sequence[int], options: Mapping[str, Any], *, backend: Any = None
) -> list[int]:
    """Generates after one prompt, injecting nothing."""
    ids_1T = torch.tensor([list(prompt_ids)])
    n_prompt = ids_1T.shape[1]
    with _turn(model, backend), model.generate(ids_1T, backend=backend, **options) as tracer:
        found = tracer.result[:, n_prompt:].save()
    written: list[int] = found[0].tolist()
    return written


def read(
    model: Any,
    path: str,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    *,
    backend: Any = None,
) -> Tensor:
    """Reads an envoy's output at some tokens of prompts.

    Prompts of one length share a pass and all passes a request: nothing is padded, as that changes
    the last bits. A single pass ends at the envoy.

    Args:
        model: An nnsight model.
        path: The envoy.
        prompts: Token ids, at least one prompt.
        positions: Which tokens of each prompt, from 0.
        backend: What runs the trace; None runs it here.

    Returns:
        `[n, d]` in the model's dtype on the CPU: prompt by prompt, in the order of `positions`.
    """
    batches = []
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        counts = torch.tensor([len(positions[row]) for row in rows])
        at_N = torch.tensor([p for row in rows for p in positions[row]], dtype=torch.long)
        ids_BT = torch.tensor([list(prompts[row]) for row in rows])
        batches.append((rows, ids_BT, torch.arange(len(rows)).repeat_interleave(counts), at_N))
    traces = [tensors for _, *tensors in batches]
    if len(traces) == 1:
        found = [_read_once(model, path, *traces[0], backend=backend)]
    else:
        found = _read_several(model, path, traces, backend=backend)
    by_row: dict[int, Tensor] = {}
    for (rows, *_), resid_ND in zip(batches, found, strict=True):
        parts = resid_ND.split([len(positions[row]) for row in rows])
        by_row |= dict(zip(rows, parts, strict=True))
    return torch.cat([by_row[row] for row in range(len(prompts))])


def _read_once(
    model: Any, path: str, ids_BT: Tensor, rows_N: Tensor, at_N: Tensor, *, backend: Any
) -> Tensor:
    with _turn(model, backend), model.trace(input_ids=ids_BT, backend=backend) as tracer:
        output = model.get(path).output
        there = output[0] if isinstance(output, tuple) else output
        picked = there[rows_N.to(there.device), at_N.to(there.device)].detach().cpu().save()
        tracer.stop()
    return picked


def _read_several(model: Any, path: str, traces: list[list[Tensor]], *, backend: Any) -> Any:
    """As `_read_once`, in one request; the model runs to its end.

    A server that runs blocks in a process of their own (ndif 0.1.2 does for most users) loses that
    process after the first `tracer.stop()` of a session.
    """
    with _turn(model, backend), model.session(backend=backend):
        found: Any = []
        found.save()
        for ids_BT, rows_N, at_N in traces:
            with model.trace(input_ids=ids_BT):
                output = model.get(path).output
                there = output[0] if isinstance(output, tuple) else output
                picked = there[rows_N.to(there.device), at_N.to(there.device)].detach().cpu()
            found.append(picked)
    return found


def _turn(model: Any, backend: Any) -> contextlib.AbstractContextManager[Any]:
    """A pass of ours for a run in this process; servers order theirs themselves."""
    return OwnPass(model._module) if backend is None else contextlib.nullcontext()
