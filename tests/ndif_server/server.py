"""A real NDIF server on loopback: redis, an object store, ray, the API and CPU model actors.

    with Server() as server:
        server.deploy([checkpoint])
        ...

What is started is marked by an environment variable of its own, found by it at the end, and ended
by process id. Every step has a time limit.
"""

import contextlib
import json
import os
import shutil
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

HERE = Path(__file__).parent
ACTOR = "nla_ndif_cpu_actor.CpuModelActor"
MARK = "NLA_LENS_TEST_SERVER"
START_LIMIT, DEPLOY_LIMIT, STOP_LIMIT = 120.0, 180.0, 15.0


class ServerError(Exception):
    """A step did not succeed in its time."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    # Ray gives 10002 to 19999 to its workers.
    return free_port() if 10000 <= port < 20000 else port


def model_key(checkpoint: Path | str) -> str:
    named = {"repo_id": str(checkpoint), "revision": None, "task": "text-generation"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(named)}"


class Server:
    """The whole server; a context manager.

    Attributes:
        url: Where clients reach the API.
        home: Its directory: logs are in `logs/`.
    """

    def __init__(self) -> None:
        # Short: ray's sockets lie in it, and their paths may have 107 characters.
        self.home = Path(tempfile.mkdtemp(prefix="nd"))
        self._ports = {
            name: free_port()
            for name in ("redis", "store", "api", "ray", "objects", "panel", "agent", "metrics")
        }
        # `ray start` as NDIF calls it cannot be told another one.
        self._ports["client"] = 10001
        self.url = self._url("http", "api")
        self._mark = self.home.name
        self._env = self._environment()

    def _url(self, scheme: str, name: str) -> str:
        return f"{scheme}://127.0.0.1:{self._ports[name]}"

    def _environment(self) -> dict[str, str]:
        resources = {
            "CPU": 8,
            "GPU": 1,
            "cuda_memory_bytes": 4_000_000_000,
            "cpu_memory_bytes": 4_000_000_000,
            "object_store_memory": 100_000_000,
        }
        own = {
            MARK: self._mark,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_OVERRIDE_RESOURCES": json.dumps(resources),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "NDIF_HOME": str(self.home),
            "NDIF_REDIS_URL": self._url("redis", "redis"),
            "NDIF_OBJECT_STORE_URL": self._url("http", "store"),
            "NDIF_API_URL": self.url,
            "NDIF_API_PORT": str(self._ports["api"]),
            "NDIF_API_WORKERS": "1",
            "GUNICORN_CMD_ARGS": f"--bind=127.0.0.1:{self._ports['api']} --workers=1",
            "NDIF_RAY_ADDRESS": self._url("ray", "client"),
            "NDIF_RAY_HEAD_PORT": str(self._ports["ray"]),
            "NDIF_RAY_OBJECT_MANAGER_PORT": self._port("objects"),
            "NDIF_RAY_DASHBOARD_PORT": self._port("panel"),
            "NDIF_RAY_DASHBOARD_GRPC_PORT": self._port("agent"),
            "NDIF_RAY_METRICS_PORT": self._port("metrics"),
            "NDIF_RAY_TEMP_DIR": str(self.home / "r"),
        }
        kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES",)}
        return kept | own

    def __enter__(self) -> "Server":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _start(self) -> None:
        (self.home / "logs").mkdir()
        with (self.home / "logs" / "store.log").open("w") as log:
            subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self._port("store")],
                env=self._env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._ndif(START_LIMIT, "start", "redis", "ray", "api")
        self._await(f"{self.url}/connected", START_LIMIT)

    def _port(self, name: str) -> str:
        return str(self._ports[name])

    def _ndif(self, limit: float, *arguments: str) -> None:
        command = [sys.executable, "-m", "ndif.cli", *arguments]
        try:
            done = subprocess.run(
                command, env=self._env, timeout=limit, capture_output=True, text=True, cwd=self.home
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"ndif {arguments[0]} took longer than {limit:g} s") from error
        if done.returncode:
            raise ServerError(f"ndif {arguments[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def _await(self, url: str, limit: float) -> None:
        until = time.monotonic() + limit
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(url, timeout=5).read()
                return
            if time.monotonic() > until:
                raise ServerError(f"{url} did not answer within {limit:g} s; see {self.home}/logs")
            time.sleep(0.5)

    def deploy(self, checkpoints: Sequence[Path | str]) -> None:
        """Deploys models in float32 and waits until they are up."""
        entries: list[dict[str, Any]] = [
            {
                "checkpoint": str(checkpoint),
                "model_key": model_key(checkpoint),
                "size_bytes": 50_000_000,
                "dtype": "float32",
                "actor_class": ACTOR,
            }
            for checkpoint in checkpoints
        ]
        listing = self.home / "models.yaml"
        listing.write_text(yaml.safe_dump({"models": entries}))
        self._ndif(DEPLOY_LIMIT, "deploy", "-f", str(listing))

    def signal_actors(self, sent: signal.Signals) -> int:
        """Sends a signal to every model's process; answers how many there are."""
        found = [p for p in self._processes() if "ModelActor" in " ".join(_cmdline(p))]
        for process in found:
            process.send_signal(sent)
        return len(found)

    def _processes(self) -> list[psutil.Process]:
        """What was started, by the mark in its environment or its pid file."""
        # redis writes its title over its environment.
        noted = {int(file.read_text()) for file in self.home.glob("run/*.pid")}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid in noted or process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def _stop(self) -> None:
        for sent, limit in ((signal.SIGTERM, STOP_LIMIT), (signal.SIGKILL, STOP_LIMIT)):
            # More than once: what is ended may have started something.
            until = time.monotonic() + limit
            while (left := self._processes()) and time.monotonic() < until:
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(signal.SIGCONT)
                        process.send_signal(sent)
                psutil.wait_procs(left, timeout=1)
        shutil.rmtree(self.home, ignore_errors=True)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
