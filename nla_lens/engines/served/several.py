"""One AV on several servers: requests go to whichever has room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from nla_lens.engines import Job, VerbalizerEngine
from nla_lens.engines.served.alike import are_apart, reading_of
from nla_lens.engines.served.server import Server
from nla_lens.engines.served.spreading import spread
from nla_lens.engines.served.verbalizer import ServedVerbalizer
from nla_lens.errors import NLAError


class SeveralServers:
    """An AV on several servers; see `spreading`.

    Attributes:
        members: The AV on each of them.
        eos_ids: See `VerbalizerEngine`.
        digest: See `ServedVerbalizer`.
    """

    def __init__(self, members: Sequence[ServedVerbalizer]) -> None:
        """Raises:
        NLAError: They are not alike.
        """
        self.members = tuple(members)
        self.eos_ids, self.digest = members[0].eos_ids, members[0].digest
        for other in members[1:]:
            _check_alike(members[0], other)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """What enters block 0 for these ids, `[T, d]` float32 on the CPU."""
        return self.members[0].embed(ids)

    def generate(self, job: Job) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, ids) as requests are answered; checks the job before anything is sent.

        Raises:
            NLAError: As for a single server; of servers that fail, only when none is left.
        """
        for member in self.members:
            member.check(job)
        return spread(self.members, job)


def on_servers(
    url: Any, engine: str, load: Callable[[Server], ServedVerbalizer]
) -> VerbalizerEngine:
    """An AV on the server that `url=` names, or on all that it lists.

    Args:
        url: As in `NLA.from_pretrained`.
        engine: The name of the engine, for messages.
        load: Reads what is needed of the checkpoint, and asks one server what it serves.

    Raises:
        NLAError: No address, one twice, a server that will not do, or several that differ.
    """
    listed = list(url) if isinstance(url, (list, tuple)) else [url]
    servers = [Server.of(one, engine) for one in listed or [None]]
    addresses = [server.url for server in servers]
    for address in addresses:
        if addresses.count(address) > 1:
            raise NLAError(f"url= names {address} more than once")
    members = [load(server) for server in servers]
    for member in members:
        member.settle()
        if len(members) > 1:
            member.reading = reading_of(member)
    return members[0] if len(members) == 1 else SeveralServers(members)


def _check_alike(first: ServedVerbalizer, other: ServedVerbalizer) -> None:
    """Raises an NLAError that says in what two servers differ."""
    for what, here, there in (
        ("most tokens (max_model_len)", first.served.max_len, other.served.max_len),
        ("dtype", first.rows.dtype, other.rows.dtype),
    ):
        if here != there:
            raise NLAError(
                f"the servers at {first.server.url} and {other.server.url} differ in {what}, "
                f"{here} and {there}: start them alike, or name one of them"
            )
    if are_apart(first.reading, other.reading, first.rows.dtype):
        raise NLAError(
            f"the servers at {first.server.url} and {other.server.url} compute something else of "
            "the same embedding: one of them runs another checkpoint, revision or dtype; name one "
            "of them"
        )
