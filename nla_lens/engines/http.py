"""httpx, as requests to servers need it: importable, and its logs clean."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from contextvars import ContextVar
from typing import Final

from nla_lens.foreign import harmless, scrub

_ANYIO: Final = "anyio._backends._asyncio"
_IMPORTING: Final = threading.Lock()
_LOGGERS: Final = (
    *("httpx", "httpcore.connection", "httpcore.proxy", "httpcore.socks"),
    *("httpcore.http11", "httpcore.http2"),
)
_KEY: Final[ContextVar[str | None]] = ContextVar("nla_lens.key", default=None)
"""The key of the request under way in this context; empty where it has none, None beside one."""


def import_anyio() -> None:
    """Imports what httpx's asynchronous clients stand on, though nnsight may have come before it.

    nnsight gives every object a `save`; anyio defines no class with an attribute it does not know.

    Raises:
        ImportError: It is not installed.
    """
    with _IMPORTING:
        nnsight = sys.modules.get("nnsight")
        if _ANYIO in sys.modules or nnsight is None or not hasattr(object, "save"):
            importlib.import_module(_ANYIO)
            return
        mounting = sys.modules["nnsight._c"]
        mounting.unmount("save")
        try:
            importlib.import_module(_ANYIO)
        finally:
            mounting.mount(nnsight.save, "save")


class _Clean(logging.Filter):
    """httpx logs the status line that came, and where a result lies; httpcore at DEBUG headers."""

    def filter(self, record: logging.LogRecord) -> bool:
        key = _KEY.get()
        if key is not None:
            record.msg, record.args = harmless(scrub(record.getMessage(), key)), ()
        return True


_CLEAN: Final = _Clean()


def clean_logs(key: str | None) -> None:
    """Cleans what is logged of a request, from here to the end of this context (task or thread)."""
    for name in _LOGGERS:
        # Adding the same one again does nothing.
        logging.getLogger(name).addFilter(_CLEAN)
    _KEY.set(key or "")
