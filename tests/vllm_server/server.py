"""A real vLLM server on loopback, on the CPU; a context manager.

What is started lies in a directory of its own and is ended by a guard (see `ndif_server/guard.py`):
by process id, whatever happens here. Every step has a time limit.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

GUARD = Path(__file__).parents[1] / "ndif_server" / "guard.py"
MARK = "NLA_LENS_TEST_VLLM"
START_LIMIT, STOP_LIMIT = 240.0, 30.0
MAX_LEN = 512


class ServerError(Exception):
    """A step did not succeed in its time."""


class Server:
    """A server of one model; `start` returns at once, `wait` when it answers.

    Attributes:
        url: Its address.
    """

    def __init__(self, model: Path, *flags: str) -> None:
        self.model, self.flags = model, flags
        self.home = Path(tempfile.mkdtemp(prefix="vl"))
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self._port = int(found.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        mark = self.home.name
        self._guard = subprocess.Popen(
            [sys.executable, str(GUARD), str(self.home), f"{MARK}={mark}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        own = {
            MARK: mark,
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "VLLM_CACHE_ROOT": str(self.home / "cache"),
            "VLLM_RPC_BASE_PATH": str(self.home),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Several servers would all be bound to the first core.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--model", str(self.model)]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_LEN)]
        command += ["--max-num-seqs", "64", *self.flags]
        with (self.home / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | own,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Returns when it answers.

        Raises:
            ServerError: It ended, or took too long.
        """
        until = time.monotonic() + START_LIMIT
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                return
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"vLLM ended while it started:\n{self.log_tail()}")
            if time.monotonic() > until:
                raise ServerError(f"vLLM did not answer in {START_LIMIT:g} s:\n{self.log_tail()}")
            time.sleep(0.5)

    def log_tail(self, lines: int = 40) -> str:
        """The end of what it wrote."""
        try:
            written = (self.home / "log").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            written = str(error)
        return "\n".join(written.splitlines()[-lines:])

    def metric(self, name: str) -> float:
        """The sum of one of its metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def kill(self) -> None:
        """Ends it at once, but for the process that tidies up its shared memory after it."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._process.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    if "resource_tracker" not in " ".join(process.cmdline()):
                        process.send_signal(signal.SIGKILL)
        self._process.wait(STOP_LIMIT)

    def stop(self) -> None:
        """Ends it and all that it started."""
        if self._guard is None or self._guard.stdin is None:
            return
        self._guard.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(STOP_LIMIT)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT)
