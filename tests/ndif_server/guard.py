"""Ends what a test server started, once its owner is done or dead: either closes standard input.

    python guard.py HOME MARK=VALUE

A process of its own, so that neither Ctrl-C, nor a time-out's signals, nor a killed pytest keeps it
from its work.
"""

import contextlib
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

PATIENCE = 6.0


def processes(home: Path, name: str, value: str) -> list[psutil.Process]:
    """What runs in `home`, or has the mark in its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # redis writes its title over its environment; `ndif start` starts it in `home`.
            if process.cwd() == str(home) or process.environ().get(name) == value:
                found.append(process)
    return found


def end(home: Path, name: str, value: str) -> bool:
    """Ends all of them, politely first; answers whether it succeeded."""
    # Sockets of the processes in which ndif runs the blocks of those it does not trust.
    sockets = {
        Path(part)
        for process in processes(home, name, value)
        for part in _cmdline(process)
        if Path(part).match("sbx-*.sock")
    }
    for sent in (signal.SIGTERM, signal.SIGKILL):
        # More than once: what is ended may have started something.
        until = time.monotonic() + PATIENCE
        while (left := processes(home, name, value)) and time.monotonic() < until:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(sent)
                    process.send_signal(signal.SIGCONT)
            psutil.wait_procs(left, timeout=1)
    shutil.rmtree(home, ignore_errors=True)
    for each in sockets:
        each.unlink(missing_ok=True)
    return not left


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.read()
    name, _, value = sys.argv[2].partition("=")
    sys.exit(not end(Path(sys.argv[1]), name, value))
