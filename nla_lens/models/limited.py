"""Strangers' programs under limits: chat templates, and regular expressions of adapters.

Either can run for ever or fill the memory, in one step of C that nothing in this process can end.
So they run in a process beside this one (`limited_child.py`), which is ended after some seconds and
has a limit of memory. It is started when it is first needed, answers in a millisecond from then on,
and ends with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nla_lens.errors import NLAError

SECONDS: Final = 5.0
"""For one template or the regular expressions of one adapter; thousandths of that are usual."""
_START_SECONDS: Final = 30.0
_NOTHING: Final = b'{"what": "match", "patterns": [], "names": []}\n'


class _Child:
    """The process, one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> Any:
        """What came of a request.

        Raises:
            TimeoutError: It took too long, and was ended.
            ValueError: It raised something; says what.
        """
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            try:
                # A fresh one has to start; nothing of a stranger's runs meanwhile.
                if self._process is None:
                    self._process = _start()
                    self._exchange(_NOTHING, _START_SECONDS)
                answer = json.loads(self._exchange(line, SECONDS))
            except BaseException:
                self._end()
                raise
        if "done" not in answer:
            raise ValueError(str(answer.get("raised")))
        return answer["done"]

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise OSError("the process is not there")
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            timer.cancel()
        if not answer:
            raise TimeoutError(f"it was ended after {seconds:g} s")
        return answer

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start() -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("limited_child.py")
    # Isolated: no environment variable and no file of the working directory is run.
    return subprocess.Popen(
        [sys.executable, "-I", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


_child = _Child()
_inherited: Final[list[_Child]] = []


def _leave_to_the_parent() -> None:
    """A forked process asks one of its own: two that read one pipe get one another's answers."""
    global _child
    _inherited.append(_child)
    process = _child._process
    if process is not None:
        # Not closed: the files that have these numbers may still be closed when they are collected.
        # And not kept: the process ends when the last that holds its input does.
        nothing = os.open(os.devnull, os.O_RDWR)
        for file in filter(None, (process.stdin, process.stdout)):
            os.dup2(nothing, file.fileno(), inheritable=False)
        os.close(nothing)
    _child = _Child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def render(template: str, values: Mapping[str, Any], now: str | None = None) -> str:
    """The text of a chat template.

    Args:
        template: The template.
        values: What it is given.
        now: What it is told the time is, as ISO 8601; None is the present.

    Raises:
        NLAError: It takes too long, is too long, or raises something.
    """
    return str(_ask({"what": "render", "template": template, "values": values, "now": now}))


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuses regular expressions that do not come to an end with names.

    Raises:
        NLAError: They do not, or are none.
    """
    _ask({"what": "match", "patterns": list(patterns), "names": list(names)})


def _ask(request: Mapping[str, Any]) -> Any:
    try:
        return _child.ask(request)
    except TimeoutError:
        raise NLAError(f"it was ended after {SECONDS:g} s: it takes too long") from None
    except (ValueError, TypeError) as error:
        raise NLAError(str(error)) from None
    except OSError as error:
        raise NLAError(f"no process can be started to run it in: {error}") from error
