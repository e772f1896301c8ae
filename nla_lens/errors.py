"""The one exception type, and the one warning type, a caller of nla_lens has to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nla_lens.foreign import harmless


class NLAError(ValueError):
    """Something a caller can put right: says what was wrong, where, and what to do.

    Attributes:
        explanations: The `Explanations` finished when the error struck, in input order from
            the first vector on; None where the error came before any model ran.
        later: What had been finished after the first vector that was not, by its row-major
            index: rows of a batch end in any order.
    """

    explanations: Sequence[Any] | None = None
    later: Mapping[int, Any] = MappingProxyType({})

    def __init__(self, message: str = "") -> None:
        # It may quote a stranger's file or server, and is shown on terminals.
        super().__init__(harmless(str(message)))


class ForeignError(Exception):
    """Stands in a traceback for a library's error whose words would steer a terminal."""


def first_line(error: BaseException) -> str:
    """What a library's error says first, or of which class it is where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def told(error: BaseException) -> BaseException:
    """An error as the cause of another: itself, or with its words spelled out."""
    words = str(error)
    if harmless(words) == words:
        return error
    stand_in = ForeignError(f"{type(error).__name__}: {harmless(words)}")
    return stand_in.with_traceback(error.__traceback__)


class NLARemoteError(NLAError):
    """A server failed, or could not be reached; says what to do.

    What had been finished before is in `explanations`; asking for the other vectors alone does not
    repeat it.

    Attributes:
        cause: What kind of failure it was: "unreachable", "lost", "silent", "key",
            "not_deployed", "versions", "actor", "memory", "too_long", "store" or "failed"; of a
            vLLM or SGLang server also "settings", "busy", "too_large" and "not_found".
    """

    def __init__(self, message: str, *, cause: str = "failed") -> None:
        super().__init__(message)
        self.cause = cause


class NLAWarning(UserWarning):
    """Nothing failed, but the result may not mean what it seems to mean."""

    def __init__(self, message: str = "") -> None:
        super().__init__(harmless(str(message)))
