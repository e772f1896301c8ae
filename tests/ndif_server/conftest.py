"""One NDIF server for the tests here, which `make test-ndif` runs; else they are not collected."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_lens import NLA
from tests.checkpoints import build_pair, build_source, vectors

if "NLA_LENS_TEST_NDIF" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    from nnsight.schema.config import CONFIG

    from .server import KEY, Server, model_key

REPO, REVISION = "test/llama-av", "v2"
"""The AV once more, as a hub repository that is in the caches of both sides."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    source = build_source(directory / "source", "llama")
    av, ar = build_pair(directory, "llama", base=source)
    return {"source": source, "av": av, "ar": ar}


@pytest.fixture(scope="session")
def hub_cache(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache_dir = tmp_path_factory.mktemp("hub")
    repo, commit = cache_dir / f"models--{REPO.replace('/', '--')}", "c0ffee" * 6 + "c0ff"
    shutil.copytree(models["av"], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    for revision in (REVISION, "v1"):
        (repo / "refs" / revision).write_text(commit)
    return cache_dir


@pytest.fixture(scope="session")
def server(
    models: dict[str, Path], hub_cache: Path, request: pytest.FixtureRequest
) -> Iterator["Server"]:
    with pytest.MonkeyPatch.context() as patch:
        # Proxies are not for loopback.
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        with Server({"HF_HUB_CACHE": str(hub_cache)}) as started:
            keys = [*map(model_key, models.values()), model_key(REPO, REVISION)]
            started.deploy(keys)
            patch.setattr(CONFIG.API, "HOST", started.url)
            patch.setattr(CONFIG.API, "APIKEY", KEY)
            yield started
            if request.session.testsfailed:
                capture = request.config.pluginmanager.getplugin("capturemanager")
                with capture.global_and_fixture_disabled():
                    print(f"\n{started.log_tails()}")


@pytest.fixture
def load(models: dict[str, Path], server: "Server") -> Callable[..., NLA]:
    def loaded(engine: Any = "ndif") -> NLA:
        return NLA.from_pretrained(av=models["av"], ar=models["ar"], engine=engine)

    return loaded


@pytest.fixture(scope="session")
def here(models: dict[str, Path]) -> Callable[[], NLA]:
    return cache(lambda: NLA.from_pretrained(av=models["av"], ar=models["ar"]))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints what was measured, captured or not."""

    def printed(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return printed


def many(n: int) -> torch.Tensor:
    return torch.cat([vectors(seed=seed) for seed in range(n // 6 + 1)])[:n]


def settings(nla: NLA) -> Any:
    """How the server of an NLA's verbalizer is talked to."""
    engine: Any = nla.verbalizer.engine
    return engine.server


def ids(explanations: Any) -> list[Any]:
    return [e.token_ids for e in explanations]
