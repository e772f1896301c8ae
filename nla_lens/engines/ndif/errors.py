"""What can go wrong on an NDIF server, each as one sentence with its remedy.

The texts are those of ndif 0.1 and nnsight 0.8. A server's own words are kept, shortened, and
without the API key, which some of them repeat.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nla_lens.errors import NLAError, NLARemoteError
from nla_lens.foreign import harmless, scrub

_MOST_OF_A_MESSAGE: Final = 400


class SilenceError(Exception):
    """The server said nothing for longer than one is willing to wait."""

    def __init__(self, state: str, seconds: float) -> None:
        super().__init__(f"no word for {seconds:g} s after {state}")
        self.state, self.seconds = state, seconds


class StoreError(Exception):
    """A finished result could not be fetched from where the server keeps it."""


class SettingsError(Exception):
    """A proxy or certificates that the environment names cannot be used."""


@dataclass(frozen=True)
class _Known:
    """A failure known by what the server says."""

    pattern: str
    cause: str
    what: str
    remedy: str


_FINISHED: Final = (
    "ask again for the vectors that are missing (what is finished is in this error's .explanations)"
)
_COMPARE: Final = (
    "install the server's versions of nnsight and transformers here; "
    "`nnsight.ndif.compare()` lists every package"
)
_KNOWN: Final = (
    _Known(
        r"api key",
        "key",
        "the server does not accept the API key",
        "get one at https://login.ndif.us and store it with `nnsight login`, or set NDIF_API_KEY",
    ),
    _Known(
        r"could not deploy|not deployed|error starting model|unknown model|no deployment",
        "not_deployed",
        "the model is not deployed on the server",
        "ask for it to be deployed (NDIF: https://nnsight.net/status shows what is up; on a server "
        "of your own: `ndif deploy CHECKPOINT`), or run this half elsewhere with engine=",
    ),
    _Known(
        r"ModuleNotFoundError|No module named|architecture on this server|UnknownPersistentId"
        r"|payload could not be read|below the minimum|version was not provided",
        "versions",
        "the server and this machine do not fit together",
        _COMPARE,
    ),
    _Known(
        r"out of memory|OutOfMemory|AllocationError",
        "memory",
        "the server ran out of memory",
        "pass a smaller batch_size=",
    ),
    _Known(
        r"execution timeout|exceeded the .*time",
        "too_long",
        "the server ended the request because it ran too long",
        "pass a smaller batch_size= or max_new_tokens=",
    ),
    _Known(
        r"error submitting request|evicted|cancelled or preempted|cancelled by operator"
        r"|\bactor\b|\breplica\b",
        "actor",
        "the model's process on the server ended while it ran the request",
        f"it is usually up again within seconds: {_FINISHED}",
    ),
    _Known(
        r"reconnecting|temporarily unavailable|auth backend",
        "unreachable",
        "the server has no contact with its models",
        "try again in a few minutes",
    ),
)


@dataclass(frozen=True)
class told:
    """A context in which whatever a remote run raises becomes an `NLARemoteError`.

    Some tools print the values of a traceback's frames. So this is no generator, as contextlib's
    own frame would hold the original error, which may name the key.

    Attributes:
        model: What ran there.
        host: The server.
        key: Answers the API key, to be taken out of messages.
        versions: Answers what is installed on both sides; asked where that may be the cause.
    """

    model: str
    host: str
    key: Callable[[], str | None] = lambda: None
    versions: Callable[[], str] = str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raises:
        NLARemoteError: The run failed.
        """
        if not isinstance(error, Exception):
            return
        failure: NLAError
        if isinstance(error, NLAError):
            failure = error.with_traceback(None)
        else:
            failure = tell(error, self.model, self.host, self.key(), self.versions)
        del error, trace
        try:
            raise failure from None
        finally:
            # `from None` only hides it.
            failure.__context__ = None


def tell(
    error: BaseException,
    model: str,
    host: str,
    key: str | None = None,
    versions: Callable[[], str] = str,
) -> NLARemoteError:
    """One failure as an `NLARemoteError`; see `told`."""
    words = scrub(_words(error), key)
    cause, what, remedy = _classify(error, words)
    # Whole it was scrubbed: half a key is not found.
    words = _shortened(harmless(words))
    # Of a silent server there is nothing to quote.
    said = f" ({words})" if words and cause != "silent" else ""
    found = versions() if cause == "versions" else ""
    both = f" [{found}]" if found else ""
    return NLARemoteError(
        f"{what}: {model} at {scrub(host, key)}{said}{scrub(both, key)}; {remedy}", cause=cause
    )


def _words(error: BaseException) -> str:
    text = str(error).strip()
    # The last line of a traceback is what happened; the others name the server's own files.
    before, found, trace = text.partition("Traceback (most recent call last)")
    if found:
        text = f"{before} {trace.splitlines()[-1]}"
    return " ".join(text.split())


def _shortened(words: str) -> str:
    return words if len(words) <= _MOST_OF_A_MESSAGE else words[:_MOST_OF_A_MESSAGE] + "…"


def _classify(error: BaseException, words: str) -> tuple[str, str, str]:
    """Cause, what happened, and what to do."""
    if isinstance(error, SilenceError):
        return (
            "silent",
            f"the server has been silent for {error.seconds:g} s, last heard: {error.state}",
            "the request may still be running, so it is not sent again by itself; wait longer "
            f"(engine.server.patience), or later {_FINISHED}",
        )
    if isinstance(error, SettingsError):
        return (
            "settings",
            "no connection can be made with this environment",
            "look at HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR",
        )
    names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, StoreError) or "HTTPStatusError" in names:
        return (
            "store",
            "the result cannot be fetched",
            "without its object store a server has no place for results that are large or polled; "
            "tell whoever runs it",
        )
    if "RemoteError" in names:
        for known in _KNOWN:
            if re.search(known.pattern, words, re.IGNORECASE):
                return known.cause, known.what, known.remedy
        # An HTTP status is an answer; what never got one has another kind of cause.
        if "TransportError" in {base.__name__ for base in type(error.__cause__).__mro__}:
            return _UNREACHABLE
        return "failed", "the run failed on the server", "what it says is above"
    if "WebSocketConnectionClosedException" in names:
        return (
            "lost",
            "the server hung up before the result came",
            f"the request may have run; {_FINISHED}; non-blocking jobs (engine.server.blocking = "
            "False) do not mind a lost connection",
        )
    if names & {"OSError", "HTTPError", "TransportError", "WebSocketException"}:
        return _UNREACHABLE
    return "failed", "the run failed", f"this was a {type(error).__name__}"


_UNREACHABLE: Final = (
    "unreachable",
    "the server cannot be reached",
    "check the network and the address (NDIF_HOST; nnsight's configuration)",
)
