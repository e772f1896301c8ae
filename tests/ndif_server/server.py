"""A real NDIF server on loopback: redis, an object store, ray, the API and CPU model actors.

    with Server() as server:
        server.deploy([model_key(checkpoint)])
        ...

Ports are free ones, every step has a time limit, and what is started is ended by process id,
whatever happens: see `guard.py`. The server has accounts: `KEY` is of a trusted user, `GUEST` is of
another.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from .guard import processes

HERE = Path(__file__).parent
ACTOR = "nla_ndif_cpu_actor.CpuModelActor"
MARK = "NLA_LENS_TEST_SERVER"
START_LIMIT, DEPLOY_LIMIT, STOP_LIMIT = 180.0, 300.0, 60.0

KEY = "5e1f6a0b-1111-4222-8333-94a5b6c7d8e9"
GUEST = "0c4d7b21-2222-4333-9444-a5b6c7d8e9f0"
OWNER = "someone@example.org"
MIN_NNSIGHT = "0.8.0"

_PORTS = (
    "redis",
    "store",
    "api",
    "ray",
    "client",
    "objects",
    "panel",
    "agent",
    "listen",
    "metrics",
)
_RAY = """#!/bin/sh
# `ray start` as ndif calls it has fixed ports for clients, its agent and workers.
case "$1" in start) shift; set -- start {options} "$@" ;; esac
exec {ray} "$@"
"""


class ServerError(Exception):
    """A step did not succeed in its time."""


def free_ports(n: int) -> list[int]:
    """Different ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        # All are open before the first is closed, so that none comes twice.
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [int(each.getsockname()[1]) for each in found]


def model_key(repo: Path | str, revision: str | None = None) -> str:
    named = {"repo_id": str(repo), "revision": revision, "task": "text-generation"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(named)}"


class Server:
    """The whole server; a context manager.

    Attributes:
        url: Where clients reach the API.
        home: Its directory: logs are in `logs/` and in ray's `r/session_latest/logs/`.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        """`environment` is added to the server's."""
        self._extra = environment or {}

    def __enter__(self) -> "Server":
        try:
            self._start()
        except ServerError as error:
            # A port may have been taken in the meantime, or the machine be busy.
            sys.stderr.write(f"\nThe NDIF server did not start, trying once more: {error}\n")
            self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _start(self) -> None:
        # Short, which $TMPDIR need not be: ray's sockets lie in it, and their paths may have 107
        # characters.
        self.home = Path(tempfile.mkdtemp(prefix="nd", dir=Path(os.sep, "tmp")))
        self._ports = dict(zip(_PORTS, map(str, free_ports(len(_PORTS))), strict=True))
        self.url = self._url("http", "api")
        self._env = self._environment()
        self._guard = subprocess.Popen(
            [sys.executable, str(HERE / "guard.py"), str(self.home), f"{MARK}={self.home.name}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._start_services()
        except ServerError as error:
            tails = self.log_tails()
            self._stop()
            raise ServerError(f"{error}\n{tails}") from error
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        self._guard.communicate(timeout=STOP_LIMIT)
        if self._guard.returncode:
            raise ServerError("some of the server's processes could not be ended")

    def _url(self, scheme: str, name: str) -> str:
        return f"{scheme}://127.0.0.1:{self._ports[name]}"

    def _environment(self) -> dict[str, str]:
        resources = {
            "CPU": 6,
            "GPU": 1,
            "cuda_memory_bytes": 4_000_000_000,
            "cpu_memory_bytes": 4_000_000_000,
            "object_store_memory": 100_000_000,
        }
        bin_dirs = (self.home / "bin", Path(sys.executable).parent)
        own = {
            MARK: self.home.name,
            "PATH": os.pathsep.join([*map(str, bin_dirs), os.environ["PATH"]]),
            "PYTHONPATH": str(HERE / "on_path"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "*",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_OVERRIDE_RESOURCES": json.dumps(resources),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            # Else a token that another Ray left in the home directory is asked for, and not sent.
            "RAY_AUTH_MODE": "disabled",
            # Ray's workers are nice, and would wait for whatever else the machine is doing.
            "RAY_worker_niceness": "0",
            "NDIF_HOME": str(self.home),
            "NDIF_REDIS_URL": self._url("redis", "redis"),
            "NDIF_OBJECT_STORE_URL": self._url("http", "store"),
            "NDIF_API_URL": self.url,
            "NDIF_API_PORT": self._ports["api"],
            "NDIF_API_WORKERS": "1",
            "GUNICORN_CMD_ARGS": f"--bind=127.0.0.1:{self._ports['api']} --workers=1",
            "NDIF_MIN_NNSIGHT_VERSION": MIN_NNSIGHT,
            # Turns accounts on; on_path/asyncpg.py is what answers.
            "NDIF_POSTGRES_URL": "postgresql://stand-in",
            "NLA_LENS_TEST_KEYS": json.dumps({KEY: [OWNER, ["trusted"]], GUEST: [OWNER, []]}),
            "NDIF_RAY_ADDRESS": self._url("ray", "client"),
            "NDIF_RAY_HEAD_PORT": self._ports["ray"],
            "NDIF_RAY_OBJECT_MANAGER_PORT": self._ports["objects"],
            "NDIF_RAY_DASHBOARD_PORT": self._ports["panel"],
            "NDIF_RAY_DASHBOARD_GRPC_PORT": self._ports["agent"],
            "NDIF_RAY_METRICS_PORT": self._ports["metrics"],
            "NDIF_RAY_TEMP_DIR": str(self.home / "r"),
        }
        dropped = {"CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "NDIF_API_KEY", "NDIF_HOST", "no_proxy"}
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in dropped and not name.lower().endswith(("http_proxy", "https_proxy"))
        }
        return kept | own | self._extra

    def _start_services(self) -> None:
        for name in ("logs", "bin"):
            (self.home / name).mkdir()
        options = {
            "ray-client-server-port": self._ports["client"],
            "dashboard-agent-listen-port": self._ports["listen"],
            # Any that is free.
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        ray = self.home / "bin" / "ray"
        flags = " ".join(f"--{name}={value}" for name, value in options.items())
        ray.write_text(_RAY.format(options=flags, ray=Path(sys.executable).with_name("ray")))
        ray.chmod(0o755)
        store = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self._ports["store"]]
        with (self.home / "logs" / "store.log").open("w") as log:
            subprocess.Popen(store, env=self._env, stdout=log, stderr=log, start_new_session=True)
        self._ndif(START_LIMIT, "start", "redis", "ray", "api")
        self._await(f"{self.url}/connected", START_LIMIT)

    def _ndif(self, limit: float, *arguments: str) -> None:
        command = [sys.executable, "-m", "ndif.cli", *arguments]
        log = self.home / "logs" / f"ndif-{arguments[0]}.log"
        with (
            log.open("a") as out,
            subprocess.Popen(
                command,
                env=self._env,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            ) as running,
        ):
            try:
                status = running.wait(limit)
            except BaseException as error:
                running.kill()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise ServerError(f"ndif {arguments[0]} took longer than {limit:g} s") from None
                raise
        if status:
            raise ServerError(f"ndif {arguments[0]} ended with status {status}")

    def _await(self, url: str, limit: float) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        until = time.monotonic() + limit
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                direct.open(url, timeout=5).read()
                return
            if time.monotonic() > until:
                raise ServerError(f"{url} did not answer within {limit:g} s")
            time.sleep(0.5)

    def deploy(self, keys: Sequence[str]) -> None:
        """Deploys models by their keys, in float32, and waits until they are up."""
        entries: list[dict[str, Any]] = [
            {
                "checkpoint": json.loads(key.partition(":")[2])["repo_id"],
                "model_key": key,
                "size_bytes": 50_000_000,
                "dtype": "float32",
                "actor_class": ACTOR,
            }
            for key in keys
        ]
        listing = self.home / "models.yaml"
        listing.write_text(yaml.safe_dump({"models": entries}))
        self._ndif(DEPLOY_LIMIT, "deploy", "-f", str(listing))

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of its processes whose command line contains `part`."""
        found = []
        for process in processes(self.home, MARK, self.home.name):
            with contextlib.suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def send(self, sent: signal.Signals, part: str = "ModelActor") -> int:
        """Sends a signal to some of its processes; answers how many there are."""
        found = self.processes(part)
        for process in found:
            process.send_signal(sent)
        return len(found)

    @contextlib.contextmanager
    def frozen(self, part: str = "ModelActor") -> Any:
        """Some of its processes do not move."""
        try:
            assert self.send(signal.SIGSTOP, part)
            yield
        finally:
            self.send(signal.SIGCONT, part)

    def log_tails(self, n_lines: int = 15) -> str:
        """The last lines of its logs."""
        ray = self.home / "r" / "session_latest" / "logs"
        logs = [*self.home.glob("logs/*"), *ray.glob("raylet.*"), *ray.glob("gcs_server.*")]
        # Of the workers' many logs those that were written to last.
        logs += sorted(ray.glob("worker-*.err"), key=lambda log: log.stat().st_mtime)[-5:]
        parts = []
        for log in logs:
            if lines := log.read_text(errors="replace").splitlines()[-n_lines:]:
                parts.append("\n".join([f"---- {log.name}", *lines]))
        return "\n".join(parts)
