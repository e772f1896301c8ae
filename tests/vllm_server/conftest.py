"""Real vLLM servers for `make test-vllm`, which alone collects the tests here."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checkpoints import build_ar, build_av, build_lora_av

from .server import Server

if "NLA_LENS_TEST_VLLM" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

KEY = "key-of-the-test-server"
D_MODEL = 128
"""Heads are then 32 wide; vLLM on a CPU ends at 16."""
SEEDS = {"qwen2": 7, "gemma3_text": 7, "llama": 2}
"""With these the best logit always leads by 7e-4 or more, far more than rounding."""
EMBEDS = "--enable-prompt-embeds"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    made = {
        family: build_av(directory / f"{family}-av", family, d_model=D_MODEL, seed=seed)
        for family, seed in SEEDS.items()
    }
    ar = build_ar(directory / "qwen2-ar", "qwen2", d_model=D_MODEL)
    narrow = build_av(directory / "narrow-av", "qwen2", d_model=64)
    lora = build_lora_av(directory / "lora-av", "gemma3_text", made["gemma3_text"])
    return made | {"ar": ar, "narrow": narrow, "lora": lora}


@pytest.fixture(scope="session")
def servers(models: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[dict[str, Server]]:
    """By family; that of llama lacks the flag, that of Gemma also has an adapter.

    All start at the same time.
    """
    started = {
        "qwen2": Server(models["qwen2"], EMBEDS, "--api-key", KEY),
        "gemma3_text": Server(
            models["gemma3_text"],
            *(EMBEDS, "--served-model-name", "gemma"),
            *("--enable-lora", "--max-lora-rank", "8", "--lora-modules"),
            f"adapter={models['lora']}",
        ),
        "llama": Server(models["llama"]),
    }
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        # Proxies are not for loopback.
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        for server in started.values():
            stack.enter_context(server)
        for server in started.values():
            server.wait()
        yield started
        if request.session.testsfailed:
            capture = request.config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():
                for family, server in started.items():
                    print(f"\n---- the vLLM server of {family}\n{server.log_tail()}")
