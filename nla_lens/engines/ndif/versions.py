"""What a server has installed, beside what is installed here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

import httpx

from nla_lens.engines.ndif.errors import SettingsError
from nla_lens.engines.ndif.wire import ask
from nla_lens.errors import NLAError

MUST_AGREE: Final = ("nnsight", "transformers")
_NO_ANSWER: Final = (
    httpx.HTTPError,
    httpx.InvalidURL,
    SettingsError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)


def compare(host: str, timeout: float) -> dict[str, tuple[str, str]]:
    """The version here and the one there, by package.

    Args:
        host: The server.
        timeout: Seconds to wait for it.

    Raises:
        NLAError: The server does not say.
    """
    try:
        answer = ask("GET", f"{host}/env", seconds=timeout)
        there = answer.json()["packages"]
        return {name: (_here(name), str(there.get(name, "unknown"))) for name in MUST_AGREE}
    except _NO_ANSWER as error:
        raise NLAError(f"the server does not say ({error})") from error


def described(host: str, timeout: float) -> str:
    """Both sides in words, for a message: it is no worse for lacking the other side."""
    try:
        found = compare(host, timeout)
    except NLAError:
        return "here " + " and ".join(f"{name} {_here(name)}" for name in MUST_AGREE)
    return ", ".join(f"{name} {here} here, {there} there" for name, (here, there) in found.items())


def _here(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
