"""httpx as requests to vLLM and SGLang servers need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from nla_lens.engines.http import import_anyio
from nla_lens.engines.served.server import Server
from nla_lens.errors import NLAError

if TYPE_CHECKING:
    import httpx

_CONNECT_SECONDS: Final = 10.0
# Shorter than the 5 s after which uvicorn closes a connection that is not used: a request sent into
# one that is just being closed would be lost.
_IDLE_SECONDS: Final = 2.0
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def open_client(server: Server) -> httpx.AsyncClient:
    """Connections to a server; raises whatever httpx raises of an environment it cannot use."""
    import httpx

    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if server.api_key is not None:
        headers["Authorization"] = f"Bearer {server.api_key}"
    return httpx.AsyncClient(
        base_url=server.url,
        headers=headers,
        # The whole exchange has one limit of its own.
        timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
        # Proxies are not for loopback.
        trust_env=urlsplit(server.url).hostname not in _LOOPBACK,
        limits=httpx.Limits(max_connections=server.connections, keepalive_expiry=_IDLE_SECONDS),
    )


def need_packages() -> None:
    """Raises an NLAError where httpx or tenacity is not installed."""
    try:
        import httpx
        import tenacity

        import_anyio()
    except ImportError as error:
        raise NLAError(
            f"talking to a server needs {error.name}: pip install 'nla-lens[servers]'"
        ) from error
    del httpx, tenacity
