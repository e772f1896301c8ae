"""What is known of a server that runs an AV: where it is, and which model it serves."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final
from urllib.parse import urlsplit

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checks import is_int, is_number
from nla_lens.errors import NLAError, NLARemoteError
from nla_lens.foreign import scrub

KEY_VARIABLE: Final = "NLA_LENS_API_KEY"
"""The environment variable the API key is taken from where none is given."""


_SNAPSHOT: Final = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")


class _Key(str):
    """A key that tools which print the values in a traceback do not show."""

    def __repr__(self) -> str:
        return "<key>"

    @classmethod
    def of(cls, given: Any) -> Any:
        """What was given, or the environment's; anything else is refused later."""
        found = os.environ.get(KEY_VARIABLE) if given is None else given
        return cls(found) if isinstance(found, str) else found


@dataclass(frozen=True, init=False)
class Server:
    """A vLLM or SGLang server; `url=` of `from_pretrained` takes one, or its address alone.

    >>> NLA.from_pretrained(name, engine="vllm", url=Server("http://host:8000", model="my-av"))

    Attributes:
        url: "http://HOST:PORT" or "https://HOST"; a "/v1" behind it is left out.
        model: The server's name of the model, where it is not that of the checkpoint.
        api_key: Sent as a bearer token; None takes the environment variable NLA_LENS_API_KEY. It is
            in no repr, log or message.
        dtype: What the server computes in (its `--dtype`); None is `dtype=` of `from_pretrained`,
            or what config.json says.
        timeout: Longest a request may take, in seconds: waiting for its turn, too.
        patience: How long a server that cannot be reached, or is too busy, is tried again, in
            seconds.
        connections: Most requests at once.
        rows_per_request: Most vectors in one request; its answers come together.
        reads_embeds: SGLang's wrapper of Gemma 3 ignores embeddings; True says that this server's
            was patched and reads them.
    """

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    dtype: Any = None
    timeout: float = 600.0
    patience: float = 10.0
    connections: int = 32
    rows_per_request: int = 8
    reads_embeds: bool = False

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        dtype: Any = None,
        timeout: float = 600.0,
        patience: float = 10.0,
        connections: int = 32,
        rows_per_request: int = 8,
        reads_embeds: bool = False,
    ) -> None:
        """See the class.

        Raises:
            NLAError: Names the argument.
        """
        # Before anything can be raised: nothing in this frame is the key any more.
        api_key, (url, wrong) = _Key.of(api_key), _address(url)
        object.__setattr__(self, "url", url)
        if wrong:
            raise NLAError(wrong)
        # httpx would show a key that is no header in its message.
        if api_key is not None and not (
            isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()
        ):
            raise NLAError(f"the API key (api_key=, {KEY_VARIABLE}) must be printable ASCII")
        given = (url, model, api_key or None, dtype, timeout, patience)
        for name, value in zip(
            (f.name for f in fields(self)),
            (*given, connections, rows_per_request, reads_embeds),
            strict=True,
        ):
            object.__setattr__(self, name, value)
        for name in ("timeout", "patience"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < float("inf"):
                raise NLAError(f"{name}={value!r} must be a number of seconds")
        for name in ("connections", "rows_per_request"):
            value = getattr(self, name)
            if not is_int(value) or value < 1:
                raise NLAError(f"{name}={value!r} must be a positive integer")

    @classmethod
    def of(cls, url: str | Server | None, engine: str) -> Server:
        """From what a caller gave as `url=`.

        Raises:
            NLAError: Nothing, or no address.
        """
        if url is None:
            raise NLAError(f"engine={engine!r} needs url=, as in url='http://localhost:8000'")
        return url if isinstance(url, Server) else cls(url)

    def error(self, what: str, cause: str = "failed") -> NLARemoteError:
        """Something the server did, in words without the key."""
        message = scrub(f"the server at {self.url} {what}", self.api_key)
        return NLARemoteError(message, cause=cause)

    def hurried(self) -> Server:
        """The same with little patience, for questions before the work begins."""
        return replace(self, patience=min(self.patience, 2.0), timeout=min(self.timeout, 60.0))


def _address(url: Any) -> tuple[str, str]:
    """`http://host:port`, and what is wrong with it; that leaves out what may be a password."""
    asked = "url= must be of the form http://HOST:PORT or https://HOST"
    if not isinstance(url, str):
        return "", f"{asked}, found a {type(url).__name__}"
    if set("@?#") & set(url):
        return "", (
            f"{asked}, without a user's name and password, a query or a fragment; a key goes into "
            "api_key="
        )
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises where it is no number)
    except ValueError as error:
        return "", f"{asked}: {error}"
    whole = parts.scheme in ("http", "https") and parts.hostname
    if not whole or not url.isascii() or not url.isprintable():
        return "", f"{asked}, found {url!r:.80}"
    return url.rstrip("/").removesuffix("/v1").rstrip("/"), ""


@dataclass(frozen=True)
class Served:
    """A model as a server lists it.

    Attributes:
        name: What requests must call it.
        root: Its directory or repository there.
        max_len: Most tokens of prompt and answer together; None if the server does not say.
    """

    name: str
    root: str
    max_len: int | None


def listed(answer: Any, url: str) -> list[Served]:
    """The models in the answer to `GET /v1/models`.

    Raises:
        NLARemoteError: It is no such list.
    """
    cards = answer.get("data") if isinstance(answer, Mapping) else None
    models = [_served(card) for card in cards] if isinstance(cards, list) else []
    found = [model for model in models if model is not None]
    if not found:
        raise NLARemoteError(
            f"{url}/v1/models does not list any model; is it a vLLM or SGLang server?",
            cause="not_deployed",
        )
    # The card of a LoRA adapter does not always say what its base allows.
    longest = [m.max_len for m in found if m.max_len is not None]
    return [replace(m, max_len=m.max_len or min(longest, default=None)) for m in found]


def _served(card: Any) -> Served | None:
    if not isinstance(card, Mapping) or not isinstance(card.get("id"), str):
        return None
    root, length = card.get("root"), card.get("max_model_len")
    return Served(
        card["id"],
        root if isinstance(root, str) else card["id"],
        length if is_int(length) and (length or 0) > 0 else None,
    )


def pick(models: Sequence[Served], checkpoint: Checkpoint, server: Server) -> Served:
    """The model a checkpoint is served as.

    Args:
        models: All that the server serves.
        checkpoint: What the caller loads.
        server: May name the model.

    Raises:
        NLARemoteError: It is not among them; names both.
    """
    if server.model is not None:
        fitting = [m for m in models if m.name == server.model]
    else:
        fitting = [
            m for m in models if _is_same(m.name, checkpoint) or _is_same(m.root, checkpoint)
        ]
    if fitting:
        _check_revision(fitting[0], checkpoint, server)
        return fitting[0]
    there = ", ".join(f"{m.name!r:.120}" for m in models[:5])
    wanted = server.model or checkpoint.name
    raise server.error(
        f"serves {there}, and not {wanted!r:.200}: start it with that model; if it is the same "
        "under another name, say so with url=Server(URL, model=NAME)",
        "not_deployed",
    )


def _check_revision(served: Served, checkpoint: Checkpoint, server: Server) -> None:
    """Raises an NLARemoteError where both lie in the hub's cache, under other revisions."""
    there, here = (_SNAPSHOT.search(str(path)) for path in (served.root, checkpoint.path))
    if there and here and there[1] != here[1]:
        raise server.error(
            f"serves revision {there[1]} of {served.name!r:.120}, and {here[1]} is loaded here: "
            "pass that revision=, or start it with this one",
            "not_deployed",
        )


def _is_same(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a server's name stands for a checkpoint: the directory may lie elsewhere there."""
    if name == checkpoint.name:
        return True
    # The hub's cache calls a repository's folder so.
    if f"models--{checkpoint.name.replace('/', '--')}/" in name:
        return True
    is_local = os.path.isdir(os.path.expanduser(checkpoint.name))
    own = checkpoint.path.resolve().parts if is_local else checkpoint.name.split("/")
    # A pair's folder has an av/ in it: that alone names nothing.
    n = 2 if own[-1].lower() == "av" else 1
    there = name.rstrip("/").split("/")[-n:]
    return [part.lower() for part in there] == [part.lower() for part in own[-n:]]
