"""Whether two servers run the same model, or one that came back still does: by what it computes.

Names say little: a rolling deployment puts other weights behind the same one. So each of several
servers is asked for the log-probabilities behind one embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor

from nla_lens.engines import Job
from nla_lens.engines.served.channel import Channel, Tell
from nla_lens.engines.served.server import Server
from nla_lens.errors import NLAError

Reading: TypeAlias = "list[tuple[int, float]]"
"""Tokens a server wrote, and their log-probabilities."""
_N_TOKENS: Final = 8
_EXACT, _ROUNDED = 1e-3, 0.1
"""What two machines may differ by in float32, and in dtypes of eight or eleven bits."""


class Reads(Protocol):
    """What a `ServedVerbalizer` is to this module."""

    server: Server
    path: str
    rows: Any

    @property
    def tell(self) -> Tell: ...

    @property
    def marker_id(self) -> int: ...

    def embed(self, ids: Sequence[int]) -> Tensor: ...

    def comparable(self, embeds_1TD: Tensor, job: Job) -> list[Mapping[str, Any]]: ...

    def log_probs(self, answer: Any) -> list[tuple[Any, Any]]: ...


def readings(engine: Reads, ids: Sequence[int], marker: int, n: int, which: slice) -> list[Reading]:
    """What a server writes behind a prompt, for each of the two ways in which it can be sent.

    Args:
        engine: The AV on it.
        ids: The prompt.
        marker: Index of the marker in it.
        n: How many tokens.
        which: Of [as ids, as embeddings].

    Raises:
        NLAError: It does not answer.
        ArithmeticError, LookupError, TypeError, ValueError: Its answer is something else.
    """
    embed_TD = engine.embed(ids)
    job = Job(ids, marker, embed_TD[marker][None], n, lambda _: False)
    with Channel(engine.server.hurried(), engine.tell) as channel:
        bodies = engine.comparable(embed_TD[None], job)[which]
        answers = [channel.post(engine.path, body).result() for body in bodies]
    said = map(engine.log_probs, answers)
    return [[(int(token), float(logprob)) for token, logprob in one] for one in said]


def reading_of(engine: Reads) -> Reading | None:
    """What a server computes behind the marker's own embedding; None where it does not tell."""
    try:
        (found,) = readings(engine, [engine.marker_id], 0, _N_TOKENS, slice(1, 2))
    except (NLAError, ArithmeticError, LookupError, TypeError, ValueError):
        return None
    return found


def are_apart(one: Reading | None, other: Reading | None, dtype: torch.dtype) -> bool:
    """Whether two servers compute more differently than rounding does; unknown is not."""
    if not one or not other:
        return False
    most = _EXACT if dtype == torch.float32 else _ROUNDED
    for (token, here), (there_token, there) in zip(one, other, strict=False):
        if not abs(here - there) <= most:
            return True
        if token != there_token:
            # As likely as one another: what follows has another beginning.
            return False
    return False
