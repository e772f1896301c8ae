"""What a client has of an AV on a server, and what comes back for a vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.engines.served.prompt_rows import PromptRows
from nla_lens.engines.served.server import Served, Server


@dataclass(frozen=True)
class Generated:
    """What a server gave for one vector.

    Attributes:
        ids: Token ids as it sent them, not yet checked.
        ended: Why it stopped, in its own words.
    """

    ids: Any
    ended: str


@dataclass(frozen=True)
class Half:
    """What the client has of an AV, and what it knows of the server's."""

    spec: NLASpec
    server: Server
    served: Served
    rows: PromptRows
    eos_ids: frozenset[int]
    config: Any
    digest: str
