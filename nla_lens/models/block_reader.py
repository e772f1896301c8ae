"""The output of one block at some tokens of prompts, without work that these do not need.

What is left out changes nothing that is asked for: a decoder's tokens do not see those after them.

- Blocks after the one read, and tokens after the last one asked for, do not run.
- In the block read, all but attention runs for the tokens asked for alone.
- What all prompts begin with runs once; the others find its keys and values in a cache.
- Prompts of like length share a pass, padded on the right. No mask hides the padding: it stands
  after everything that is read, and without a mask attention takes its faster way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from nla_lens.models.anatomy import blocks_of, input_device, text_model, width_of
from nla_lens.models.batching import padded_batches, right_padded
from nla_lens.models.cache_keyword import cache_keyword
from nla_lens.models.kv_cache import empty_cache, repeated
from nla_lens.models.onednn import ByOneDNN
from nla_lens.models.passes import OwnPass, has_hooks
from nla_lens.models.pickling import KeepsPrefix
from nla_lens.models.proof import check_width

_BY_TOKEN: Final = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""Parts of a block that read each token by itself; keys and values are needed for all tokens."""
_CACHED: Final = {"gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"}
"""Families whose state after a prefix is keys and values, and nothing else."""
_WORTH_SHARING: Final = 8
"""A prefix of fewer tokens saves less than the mask costs that it brings along."""
_PASS: Final = 40
"""What a pass of its own costs, in tokens."""
_FAR: Final = 512
"""So many tokens behind the last one asked for are not run, however small the model is."""
WIDE: Final = 256
"""Widths under which products are too small to be worth another way of computing them."""
_RECORDS: Final = ("output_hidden_states", "output_attentions", "output_router_logits")
Tokens: TypeAlias = "tuple[Tensor, Tensor]"
"""Rows and columns of N tokens in a pass."""


class BlockReader(KeepsPrefix):
    """Reads one block of a transformers decoder."""

    def __init__(self, model: Any, layer: int) -> None:
        """Args:
        model: A transformers model, whole or a stack of blocks.
        layer: The block, from 0.
        """
        self._model, self._stack = model, text_model(model)
        self._block = blocks_of(model)[layer]
        self._width = width_of(model)
        self._by_onednn = ByOneDNN(self._stack)
        self._takes_cache_as = cache_keyword(self._stack)
        self._prefix: tuple[list[int], Any] | None = None

    @torch.inference_mode()
    def read(
        self,
        prompts: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """The residual stream behind the block.

        Args:
            prompts: Token ids, none of them empty.
            positions: Which tokens of each prompt, from 0, in any order.
            batch_size: Most prompts in one pass; None: as many as is fast.

        Returns:
            `[n_i, d]` for each prompt, in the model's dtype, each a tensor of its own.
        """
        by_length = rotates_by_length(self._stack.config)
        if by_length or not may_cut(self._model, self._width):
            if not by_length and not has_hooks(self._model):
                prompts = [_nearer(ids, at) for ids, at in zip(prompts, positions, strict=True)]
            return self._read_as_it_is(prompts, positions, batch_size)
        cut = [
            list(prompt[: max(at, default=0) + 1])
            for prompt, at in zip(prompts, positions, strict=True)
        ]
        prefix, cache = self._shared(cut, min((min(at, default=0) for at in positions), default=0))
        rest = [prompt[len(prefix) :] for prompt in cut]
        found: dict[int, Tensor] = {}
        device = input_device(self._model)
        for rows in padded_batches([len(prompt) for prompt in rest], device, batch_size):
            at = [[p - len(prefix) for p in positions[row]] for row in rows]
            past = None if cache is None else repeated(cache, len(rows))
            read = self._read_batch([rest[row] for row in rows], at, past)
            found |= dict(zip(rows, read, strict=True))
        return [found[row] for row in range(len(prompts))]

    @property
    def keeps_prefixes(self) -> bool:
        """Whether what prompts begin with is ever kept."""
        return self._stack.config.model_type in _CACHED and self._width >= WIDE

    @torch.inference_mode()
    def run(self, ids_BT: Tensor, past: Any = None, only: Tokens | None = None) -> Tensor:
        """The block's output at every token, `[B, T, d]`; later blocks do not run.

        Args:
            ids_BT: Token ids.
            past: A cache of what stands before them.
            only: The tokens whose output is asked for; elsewhere it may be anything. None: all.

        Raises:
            NLAError: The block did not run.
        """

        fast = self._by_onednn if self._width >= WIDE else contextlib.nullcontext()
        ids_BT = ids_BT.to(input_device(self._model))
        with OwnPass(self._stack) as own_pass, fast:
            only_tokens(own_pass, self._block, ids_BT.shape, only)
            # A family that keeps its states elsewhere (RecurrentGemma) takes no cache, nor None.
            held = {} if past is None else {self._takes_cache_as: past}
            output: Any = own_pass.output_of(
                self._block,
                lambda: self._stack(
                    input_ids=ids_BT,
                    use_cache=past is not None,
                    **held,
                    **_without_records(self._stack.config),
                ),
            )
        resid_BTD: Tensor = output[0] if isinstance(output, tuple) else output
        check_width(self._stack, resid_BTD)
        return resid_BTD

    def _read_batch(
        self, prompts: Sequence[list[int]], positions: Sequence[list[int]], past: Any
    ) -> list[Tensor]:
        ids_BT = right_padded(prompts)
        counts = [len(at) for at in positions]
        rows_N = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))
        at_N = torch.tensor([p for at in positions for p in at], dtype=torch.long)
        few = self._width >= WIDE and 2 * len(at_N) <= ids_BT.numel()
        resid_BTD = self.run(ids_BT, past, (rows_N, at_N) if few else None)
        here = resid_BTD.device
        return [kept(part) for part in resid_BTD[rows_N.to(here), at_N.to(here)].split(counts)]

    def _read_as_it_is(
        self,
        prompts: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        batch_size: int | None,
    ) -> list[Tensor]:
        """As `read`, of whole prompts and without padding."""
        found: dict[int, Tensor] = {}
        lengths = [len(prompt) for prompt in prompts]
        for rows in padded_batches(lengths, torch.device("cpu"), batch_size, equal=True):
            resid_BTD = self.run(torch.tensor([list(prompts[row]) for row in rows]))
            for resid_TD, row in zip(resid_BTD, rows, strict=True):
                found[row] = kept(resid_TD[list(positions[row])])
        return [found[row] for row in range(len(prompts))]

    def _shared(self, prompts: Sequence[list[int]], most: int) -> tuple[list[int], Any]:
        """What all prompts begin with, and its keys and values; nothing where it does not pay.

        The ids are compared, not the texts: a tokenizer may merge what a template ends with and
        what a text begins with.

        Args:
            prompts: Token ids.
            most: Longest prefix, so that tokens asked for come after it.
        """
        if self._stack.config.model_type not in _CACHED or not prompts:
            return [], None
        ids, n = common_prefix(prompts)[:most], len(prompts)
        kept = self._prefix
        if kept is not None and (len(kept[0]) > most or ids[: len(kept[0])] != kept[0]):
            kept = None
        saved = len(ids) * (n - 1) - _PASS
        if len(ids) >= _WORTH_SHARING and saved > (len(kept[0]) * n if kept else 0):
            cache = empty_cache()
            self.run(torch.tensor([ids]), cache)
            kept = self._prefix = ids, cache
        return kept or ([], None)


def _without_records(config: Any) -> dict[str, bool]:
    """Takes back what a config asks every pass to record; what it does not ask for is not named.

    transformers 4.57 records by replacing `forward` of the blocks, and does not put it back in a
    pass that is ended early: they would record for ever.
    """
    return {name: False for name in _RECORDS if getattr(config, name, False)}


def only_tokens(
    own_pass: OwnPass, block: nn.Module, shape: Sequence[int], tokens: Tokens | None
) -> None:
    """In a pass, the parts of a block that read tokens one by one run for N of them alone.

    The others get zeros, so that the block's output is right for the N tokens and no others.

    Args:
        own_pass: The pass.
        block: A decoder block.
        shape: `[B, T]` of the pass.
        tokens: Their rows and columns; None: nothing is changed.
    """
    if tokens is None:
        return
    for part in filter(None, (_part(block, path) for path in _BY_TOKEN)):
        _narrow(own_pass, part, tuple(shape), tokens)


def _part(block: Any, path: str) -> nn.Module | None:
    for name in path.split("."):
        block = getattr(block, name, None)
    return block if isinstance(block, nn.Module) else None


def _narrow(own_pass: OwnPass, part: nn.Module, shape: tuple[int, ...], tokens: Tokens) -> None:
    """Hands a module N tokens and puts its answers back where they belong."""
    rows_N, at_N = tokens
    here: list[Tokens] = []

    def pick(module: nn.Module, args: tuple[Any, ...]) -> Any:
        here.clear()
        if not args or not isinstance(args[0], Tensor) or args[0].shape[:2] != shape:
            return None
        if any(isinstance(arg, Tensor) for arg in args[1:]):
            # Bloom's takes the residual stream of all tokens, too.
            return None
        device = args[0].device
        here.append((rows_N.to(device), at_N.to(device)))
        return (args[0][here[0]][None], *args[1:])

    def put_back(module: nn.Module, args: Any, output: Any) -> Any:
        if not here:
            return None
        if isinstance(output, tuple):
            return (_scattered(output[0], shape, here[0]), *output[1:])
        return _scattered(output, shape, here[0])

    own_pass.pre_hook(part, pick)
    own_pass.hook(part, put_back)


def _scattered(found_1ND: Tensor, shape: tuple[int, ...], at: Tokens) -> Tensor:
    out_BTD = found_1ND.new_zeros(*shape, found_1ND.shape[-1])
    out_BTD[at] = found_1ND[0]
    return out_BTD


def kept(resid_ND: Tensor) -> Tensor:
    """A copy, so that a token that is kept does not keep the whole batch in memory.

    An ordinary tensor also in inference mode, whose own can neither be changed in place nor trained
    on by whoever gets them.
    """
    with torch.inference_mode(False):
        return resid_ND.clone()


def may_cut(model: nn.Module, width: int) -> bool:
    """Whether texts may be cut behind what is asked for, padded, and share a prefix.

    Not where somebody's hooks may look at what is left out, nor in a model so small that it would
    gain nothing: that gives what a plain pass gives, to the last bit.

    Args:
        model: The model that reads them.
        width: Its d_model.
    """
    return width >= WIDE and not has_hooks(model)


def _nearer(ids: Sequence[int], at: Sequence[int]) -> Sequence[int]:
    """A prompt without what stands far behind the last token asked for."""
    end = max(at, default=0) + 1
    return ids[:end] if len(ids) - end > _FAR else ids


def rotates_by_length(config: Any) -> bool:
    """Whether a token's position is rotated otherwise in a longer text, or in a longer row's batch.

    Such models (Phi-3's long versions) read every text whole and without padding.
    """
    said = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    ropes = [rope for rope in said if isinstance(rope, Mapping)]
    ropes += [rope for outer in ropes for rope in outer.values() if isinstance(rope, Mapping)]
    kinds = {rope.get("rope_type", rope.get("type")) for rope in ropes}
    return bool(kinds & {"dynamic", "longrope"})


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The ids that all prompts begin with."""
    # What the least and the greatest have in common, all between them have.
    least, greatest = min(prompts), max(prompts)
    same = 0
    while same < min(len(least), len(greatest)) and least[same] == greatest[same]:
        same += 1
    return least[:same]
