"""Residual vectors out of a source model: blocks 0..K run, the rest does not.

>>> resid = nla_lens.extract("path/or/hub-name", ["The garlic sizzles."], layer=20)
>>> resid[0].shape                # [T, d_model]
>>> resid[0][-1].explain(nla)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from nla_lens.checks import is_int, is_unicode, plain
from nla_lens.errors import NLAError
from nla_lens.models.ambient import undisturbed
from nla_lens.models.batching import padded_batches, right_padded
from nla_lens.models.block_reader import kept
from nla_lens.models.tokens import check_ids, render_chat, token_text, tokenize
from nla_lens.stream.frameworks import adapter_of, find_adapter
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.origin import Origin, locate
from nla_lens.stream.residual import ResidualTensor

Text: TypeAlias = "str | Sequence[Mapping[str, Any]]"
"""A plain text, or chat messages `{"role": ..., "content": ...}`."""


Positions: TypeAlias = "Sequence[int] | int | slice | None"
"""Which tokens of a text: indices (negative from the end), a slice, or None for all."""


class Source(Protocol):
    """A model whose residual stream can be read; each framework's adapter provides one.

    One that can do better than `resid` has a `resid_at(prompts, positions, place, batch_size)`,
    too: the residual stream at some tokens of prompts of any length, `[n_i, d]` each. One that
    knows how many tokens its embedding has says so as `table_rows`. One whose
    values do not depend on what stands after a token may say so by `ignores_what_follows = True`:
    `resid` is then given rows that are cut behind the last position asked for, and padded on the
    right.

    Attributes:
        tokenizer: The model's own.
    """

    tokenizer: Any

    @property
    def is_whole(self) -> bool:
        """Whether it has all its blocks and can write on."""
        ...

    def check_place(self, place: ResidPost) -> None:
        """Raises an NLAError if the model has no such block."""
        ...

    def resid(self, ids_BT: Tensor, place: ResidPost) -> Tensor:
        """The residual stream at `place`, `[B, T, d]`; no later block runs, nothing is masked."""
        ...

    def go_on(self, ids: Sequence[int], n: int) -> list[int]:
        """Up to n ids the model writes next, argmax, end-of-sequence left out."""
        ...


@undisturbed()
def extract(
    model: Any,
    texts: str | Sequence[Text],
    layer: int,
    positions: Positions = None,
    batch_size: int | None = None,
    *,
    tokenizer: Any = None,
    remote: str | bool = False,
) -> list[ResidualTensor]:
    """Reads the output of block `layer` for texts.

    Args:
        model: A transformers model, a TransformerBridge, HookedTransformer or nnsight model, or the
            name of a checkpoint (only its first blocks are loaded).
        texts: Texts, tokenized with the tokenizer's special tokens; or lists of chat messages,
            rendered once by the chat template.
        layer: Index of the block, from 0; negative ones are refused.
        positions: Keep only these tokens of each text: indices, negative ones from the end, a slice
            or a mask; None keeps all.
        batch_size: Most texts at once; None chooses.
        tokenizer: Instead of the model's own.
        remote: Run an nnsight model, or a model named, on NDIF; only the positions asked for
            travel. True is the server nnsight is configured for, "local" a simulation, else an
            address.

    Returns:
        One `ResidualTensor [T_i, d_model]` per text, in input order, in the model's dtype.

    Raises:
        NLAError: No such layer or position, or no tokenizer to be found.
    """
    if not is_int(layer) or layer < 0:
        raise NLAError(f"layer={layer!r} must be the index of a block, from 0")
    if batch_size is not None and not (is_int(batch_size) and batch_size > 0):
        raise NLAError(f"batch_size={batch_size!r} must be a positive integer")
    texts = plain(texts)
    if isinstance(texts, bytes) or not isinstance(texts, (str, Sequence)):
        raise NLAError(f"texts= is a text or a list of texts, found {texts!r:.80}")
    place = ResidPost(int(layer))
    source = open_source(model, n_blocks=place.n_blocks, tokenizer=tokenizer, remote=remote)
    listed: list[Text] = [texts] if isinstance(texts, str) else list(texts)
    prompts = [encode(source, text) for text in listed]
    picked = [pick_positions(positions, len(ids)) for ids in prompts]
    return read_prompts(source, prompts, picked, place, batch_size)


def read_prompts(
    source: Source,
    prompts: Sequence[list[int]],
    picked: Sequence[list[int]],
    place: ResidPost,
    batch_size: int | None = None,
) -> list[ResidualTensor]:
    """The residual of tokenized prompts at some of their positions, `[n_i, d]` each."""
    source.check_place(place)
    for at in picked:
        _check_length(source, max(at, default=0) + 1)
    resids = _read(source, prompts, picked, place, batch_size)
    return [
        _wrap(resid_ND, prompts[row], row, picked[row], place, source)
        for row, resid_ND in enumerate(resids)
    ]


@undisturbed()
def read_text(
    source: Source,
    text: Text,
    place: ResidPost,
    *,
    positions: Positions = None,
    generate: int = 0,
) -> ResidualTensor:
    """The residual of one text at `place`, and of what the model writes next."""
    source.check_place(place)
    ids = encode(source, text, for_answer=generate > 0)
    picked = pick_positions(positions, len(ids))
    longest = len(ids) + generate if generate > 0 else max(picked, default=0) + 1
    _check_length(source, longest)
    if generate > 0:
        written = source.go_on(ids, generate)
        picked = [*picked, *range(len(ids), len(ids) + len(written))]
        ids = [*ids, *written]
    return _wrap(_read(source, [ids], [picked], place)[0], ids, 0, picked, place, source)


def _read(
    source: Source,
    prompts: Sequence[list[int]],
    picked: Sequence[list[int]],
    place: ResidPost,
    batch_size: int | None = None,
) -> list[Tensor]:
    """The residual stream at some tokens of each prompt, `[n_i, d]`."""
    # A source that picks positions itself need not run, or send, the others.
    resid_at = getattr(source, "resid_at", None)
    if resid_at is not None:
        read: list[Tensor] = resid_at(prompts, picked, place, batch_size)
        return read
    may_cut = getattr(source, "ignores_what_follows", False)
    if may_cut:
        prompts = [ids[: max(at, default=0) + 1] for ids, at in zip(prompts, picked, strict=True)]
    lengths, found = [len(ids) for ids in prompts], dict[int, Tensor]()
    for rows in padded_batches(lengths, torch.device("cpu"), batch_size, equal=not may_cut):
        resid_BTD = source.resid(right_padded([prompts[row] for row in rows]), place)
        for i, row in enumerate(rows):
            found[row] = kept(resid_BTD[i][picked[row]])
    return [found[row] for row in range(len(prompts))]


def encode(source: Source, text: Text, *, for_answer: bool = False) -> list[int]:
    """Token ids of a text with its special tokens, or of chat messages.

    Raises:
        NLAError: Neither text nor messages, nothing at all, or a token that the model has not.
    """
    tokenizer = source.tokenizer
    if isinstance(text, str):
        if not is_unicode(text):
            raise NLAError(f"the text holds half of a surrogate pair: {text!r:.80}")
        ids = tokenize(tokenizer, text)
    elif isinstance(text, Sequence) and all(isinstance(turn, Mapping) for turn in text):
        ids = render_chat(tokenizer, text, add_generation_prompt=for_answer)
    else:
        raise NLAError(f"a text is a string or a list of chat messages, found {text!r:.80}")
    if not ids:
        raise NLAError("the text has no tokens")
    check_ids(tokenizer, ids, getattr(source, "table_rows", None))
    return ids


def pick_positions(positions: Positions, length: int) -> list[int]:
    """Which tokens of a text of some length are asked for, from 0.

    Raises:
        NLAError: None of its tokens.
    """
    asked: Any = plain(positions)
    try:
        if asked is None or isinstance(asked, slice):
            return list(range(length))[asked or slice(None)]
        if isinstance(asked, Iterator):
            # At its end with the second text.
            raise TypeError("an iterator; pass list(...) of it")
        is_one = is_int(asked) or isinstance(asked, (str, bytes))
        listed: list[Any] = [asked] if is_one else list(asked)
    except (TypeError, ValueError) as error:
        raise NLAError(f"positions={asked!r:.80} are no positions: {error}") from error
    if len(listed) == length and all(isinstance(position, bool) for position in listed):
        # A mask.
        listed = [i for i, is_wanted in enumerate(listed) if is_wanted]
    for position in listed:
        if not is_int(position) or not -length <= position < length:
            raise NLAError(
                f"position {position!r:.80} is not in a text of {length} tokens (indices, a slice, "
                "a mask of as many values, or None for all)"
            )
    return [int(position) % length for position in listed]


def _check_length(source: Source, n_tokens: int) -> None:
    """Refuses positions beyond those a model was made for; tokens after the last one do not count.

    Raises:
        NLAError: Names both numbers.
    """
    longest: Any = getattr(source, "context_length", None)
    if is_int(longest) and n_tokens > longest:
        raise NLAError(
            f"{n_tokens} tokens of the text are to be read, and the source model was made for "
            f"{longest} (max_position_embeddings): shorten the text, or ask for earlier positions"
        )


def _wrap(
    resid_ND: Tensor, ids: list[int], row: int, picked: list[int], place: ResidPost, source: Source
) -> ResidualTensor:
    where_TX3 = locate(torch.tensor([ids]))[0]
    where_TX3[:, 0] = row
    origin = Origin(place.name, where_TX3[picked], token_text(source.tokenizer))
    return ResidualTensor.wrap(resid_ND, origin)


@undisturbed()
def open_source(
    model: Any,
    *,
    n_blocks: int | None = None,
    tokenizer: Any = None,
    remote: str | bool = False,
    **placement: Any,
) -> Source:
    """A readable source from whatever names or holds a model.

    Args:
        model: See `extract`; a `Source` is taken as it is.
        n_blocks: How many blocks are needed, where it must be loaded; None is all.
        tokenizer: Instead of the model's own.
        remote: See `extract`.
        **placement: How it is loaded, see `nla_lens.engines.Placement`.
    """
    if all(hasattr(model, name) for name in ("check_place", "resid", "go_on")):
        source: Source = model
        return source
    if remote:
        far: Source = adapter_of("nnsight").as_remote_source(model, remote, tokenizer)
        return far
    adapter = find_adapter(model)
    if adapter is not None:
        adapted: Source = adapter.as_source(model, tokenizer)
        return adapted
    # Imported late: it loads transformers.
    from nla_lens.stream.hf_source import HFSource, load_source

    if isinstance(model, (str, os.PathLike)):
        return load_source(model, n_blocks=n_blocks, tokenizer=tokenizer, **placement)
    return HFSource(model, tokenizer)
