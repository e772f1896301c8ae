"""From the hub, and back: against `hub_server.py` on loopback, with huggingface_hub as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from nla_lens import NLA, NLAError
from nla_lens.checkpoints.spec import read_spec

from .checkpoints import build_ar, build_av, build_lora_av, build_source, vectors
from .checkpoints.builders import AV_SEEDS
from .checkpoints.layouts import CLUTTER, HALVES, LAYOUTS, clutter
from .hub_server import TOKEN, HubServer, use

pytest.importorskip("peft")

REPO = "someone/nla"
TEXTS = ["One.", "Another text."]
FULL = {
    "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
ADAPTER = (FULL - {"config.json", "generation_config.json", "model.safetensors"}) | {
    "adapter_config.json", "adapter_model.safetensors",
}  # fmt: skip
RECONSTRUCTOR = FULL | {"value_head.safetensors"}


def downloaded(hub: HubServer, cache: Path, repo: str = REPO) -> set[str]:
    """The files of a repository that lie in the cache; nothing else was asked for either.

    Of two files with one content the second costs no request.
    """
    snapshots = cache / f"models--{repo.replace('/', '--')}" / "snapshots"
    (snapshot,) = snapshots.iterdir()
    found = {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()}
    assert hub.fetched(repo) <= found
    return found


def under(folder: str, names: set[str]) -> set[str]:
    return {f"{folder}/{name}" for name in names}


NEEDED = {
    "two_folders": under("av", FULL | {"nla_meta.yaml"})
    | under("ar", RECONSTRUCTOR | {"nla_meta.yaml"}),
    "steps": under("av_rl_lora_step400", ADAPTER)
    | under("rl_critic_step400", RECONSTRUCTOR)
    | {"nla_meta.yaml"},
    "adapters": under("av_base", FULL)
    | under("av_rl_adapters/iter_000300", ADAPTER | {"nla_meta.yaml"})
    | under("ar_reconstructor", RECONSTRUCTOR | {"nla_meta.yaml"}),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        use(server, monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Path]:
    def build(name: str) -> Path:
        root = LAYOUTS[name](tmp_path_factory.mktemp("layouts") / name)
        clutter(root)
        return root

    return cache(build)


def same(nla: NLA, other: NLA) -> None:
    options = {"max_new_tokens": 6, "score": False}
    texts = [[e.raw_text for e in one.explain(vectors()[:2], **options)] for one in (nla, other)]
    assert texts[0] == texts[1]
    assert torch.equal(nla.reconstruct(TEXTS), other.reconstruct(TEXTS))
    assert nla.spec == other.spec


# --- what is downloaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repository_with_both_halves(hub: HubServer, made, layout: str, tmp_path: Path) -> None:
    """Of everything there exactly what is needed comes."""
    root = made(layout)
    hub.add(REPO, root)
    there = set(hub.files(REPO))
    assert len(there) > len(NEEDED[layout]) + 20 and set(CLUTTER) <= there
    nla = NLA.from_pretrained(REPO)
    assert downloaded(hub, tmp_path / "cache") == NEEDED[layout]
    av, ar = HALVES[layout]
    hub.forget()
    by_hand = NLA.from_pretrained(av=f"{REPO}/{av}", ar=f"{REPO}/{ar}")
    assert not hub.fetched(REPO)
    same(nla, by_hand)
    same(nla, NLA.from_pretrained(root))


def test_a_verbalizer_alone_in_a_subfolder(hub: HubServer, made, tmp_path: Path) -> None:
    hub.add(REPO, made("two_folders"))
    for options in ({"subfolder": "av"}, {"subfolder": {"av": "av"}}):
        assert NLA.from_pretrained(REPO, **options).reconstructor is None
    assert NLA.from_pretrained(f"{REPO}/av").reconstructor is None
    wanted = under("av", FULL | {"nla_meta.yaml"})
    assert downloaded(hub, tmp_path / "cache") == wanted


def test_info_fetches_no_weights(hub: HubServer, made) -> None:
    hub.add(REPO, made("steps"))
    assert read_spec(REPO).layer == 3
    assert not {name for name in hub.fetched(REPO) if name.endswith(".safetensors")}


def test_folders_inside_a_folder(hub: HubServer, made, tmp_path: Path) -> None:
    for step in ("step_100", "step_200"):
        shutil.copytree(made("two_folders"), tmp_path / "all" / step)
    hub.add(REPO, tmp_path / "all")
    with pytest.raises(NLAError, match=r"holds 2 verbalizers .*step_100/av.*step_200/ar"):
        NLA.from_pretrained(REPO)
    assert NLA.from_pretrained(f"{REPO}/step_200").reconstructor is not None
    assert all(name.startswith("step_200/a") for name in hub.fetched(REPO))


def test_an_ambiguous_repository(hub: HubServer, made, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made("steps"), tmp_path / "repo"))
    shutil.copytree(root / "av_rl_lora_step400", root / "av_rl_lora_step800")
    hub.add(REPO, root)
    with pytest.raises(NLAError) as caught:
        NLA.from_pretrained(REPO)
    message = str(caught.value)
    assert "'av_rl_lora_step400', 'av_rl_lora_step800'" in message
    call = 'NLA.from_pretrained(av="someone/nla/av_rl_lora_step800", ar="someone/nla/rl_critic'
    assert call in message
    assert not hub.fetched(REPO)
    assert eval(message[message.index("NLA.from") :]).reconstructor is not None


def test_roles_by_sidecars_alone(hub: HubServer, made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    shutil.copytree(made("two_folders") / "av", root / "first")
    shutil.copytree(made("two_folders") / "ar", root / "second")
    hub.add(REPO, root)
    same(NLA.from_pretrained(REPO), NLA.from_pretrained(made("two_folders")))


def test_a_pair_by_its_stem_and_a_verbalizer_alone(hub: HubServer, made) -> None:
    """Each half in a repository of its own, as the first releases."""
    hub.add("someone/nla-L3-av", made("two_folders") / "av")
    hub.add("someone/nla-L3-ar", made("two_folders") / "ar")
    hub.add("someone/verbalizer", made("two_folders") / "av")
    same(NLA.from_pretrained("someone/nla-L3"), NLA.from_pretrained(made("two_folders")))
    assert hub.fetched("someone/nla-L3-av") == FULL | {"nla_meta.yaml"}
    assert hub.fetched("someone/nla-L3-ar") == RECONSTRUCTOR | {"nla_meta.yaml"}
    assert NLA.from_pretrained("someone/verbalizer").reconstructor is None
    assert NLA.from_pretrained("someone/nla-L3-av").reconstructor is None
    with pytest.raises(NLAError, match=r"is a reconstructor \(AR\).*pass it as ar="):
        NLA.from_pretrained(av="someone/nla-L3-ar")


def test_the_base_on_the_hub(hub: HubServer, tmp_path: Path, made) -> None:
    source = build_source(tmp_path / "source", "llama", seed=AV_SEEDS["llama"])
    repo = tmp_path / "repo"
    av = build_lora_av(repo / "av", "llama", source)
    wanted = NLA.from_pretrained(av=av).encode(vectors()[:2], max_new_tokens=6)
    for name in ("base", "nested/base"):
        shutil.copytree(source, tmp_path / "bases" / name)
    hub.add("someone/bases", tmp_path / "bases")
    hub.add("someone/source", source)
    config = av / "adapter_config.json"
    text = config.read_text().replace(str(source), "someone/source")
    config.write_text(text)
    hub.add(REPO, repo)
    nla = NLA.from_pretrained(av=f"{REPO}/av")
    assert nla.spec.av_base == "someone/source"
    assert nla.encode(vectors()[:2], max_new_tokens=6) == wanted
    assert "model.safetensors" in hub.fetched("someone/source")
    for base in ("someone/bases/base", "someone/bases/nested/base"):
        nla = NLA.from_pretrained(av=f"{REPO}/av", base=base)
        assert nla.encode(vectors()[:2], max_new_tokens=6) == wanted
    with pytest.raises(NLAError, match="has no model in 'nothing'"):
        NLA.from_pretrained(av=f"{REPO}/av", base="someone/bases/nothing")


def test_the_base_is_the_repository_itself(hub: HubServer, tmp_path: Path) -> None:
    """A source model at the top, adapters in folders, which name the repository."""
    root = build_source(tmp_path / "repo", "llama", seed=AV_SEEDS["llama"])
    av = build_lora_av(root / "av_lora", "llama", root)
    build_ar(root / "ar", "llama")
    config = av / "adapter_config.json"
    config.write_text(config.read_text().replace(str(root), REPO))
    hub.add(REPO, root)
    nla = NLA.from_pretrained(REPO)
    assert Path(nla.spec.av_base or "", "model.safetensors").is_file()
    assert downloaded(hub, tmp_path / "cache") == FULL | under(
        "av_lora", ADAPTER | {"nla_meta.yaml"}
    ) | under("ar", RECONSTRUCTOR | {"nla_meta.yaml"})


# --- revisions, names, the cache ------------------------------------------------------------------


def test_a_revision(hub: HubServer, made) -> None:
    commit = hub.add(REPO, made("two_folders"))
    hub.repos[REPO].files = {"README.md": b"moved on"}
    hub.repos[REPO].commit()
    for revision in (commit, "old"):
        hub.repos[REPO].refs["old"] = commit
        assert read_spec(REPO, revision=revision).layer == 3
    with pytest.raises(NLAError, match=r"someone/nla cannot be fetched.*has no revision 'none'"):
        read_spec(REPO, revision="none")
    with pytest.raises(NLAError, match=r"which folder of someone/nla .*no model at all"):
        read_spec(REPO)


def test_a_renamed_repository(hub: HubServer, made) -> None:
    hub.add("someone/new-name", made("two_folders"))
    hub.renamed[REPO] = "someone/new-name"
    same(NLA.from_pretrained(REPO), NLA.from_pretrained(made("two_folders")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offline_from_the_cache(
    hub: HubServer, made, layout: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add(REPO, made(layout))
    nla = NLA.from_pretrained(REPO)
    av, ar = HALVES[layout]
    hub.forget()
    use(hub, monkeypatch, tmp_path / "cache", offline=True)
    same(nla, NLA.from_pretrained(REPO))
    same(nla, NLA.from_pretrained(av=f"{REPO}/{av}", ar=f"{REPO}/{ar}"))
    assert not hub.requests
    with pytest.raises(NLAError, match="HF_HUB_OFFLINE is set, and it was not fetched before"):
        NLA.from_pretrained("someone/else")


def test_a_hub_that_went_away(hub: HubServer, made, monkeypatch) -> None:
    hub.add(REPO, made("two_folders"))
    nla = NLA.from_pretrained(REPO)
    hub.out_of_order = True
    same(nla, NLA.from_pretrained(REPO))
    with pytest.raises(NLAError, match=r"someone/else-av cannot be fetched.*out of order"):
        NLA.from_pretrained("someone/else")


# --- refusals -------------------------------------------------------------------------------------


def test_no_such_repository_and_private_ones(
    hub: HubServer, made, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("someone/secret", made("two_folders"), private=True)
    for name in ("someone/none", "someone/secret"):
        with pytest.raises(NLAError, match=r"no such repository, or it is private and no token"):
            NLA.from_pretrained(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert NLA.from_pretrained("someone/secret").reconstructor is not None


def test_a_gated_repository(hub: HubServer, made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed for everybody, fetched by those who were let in."""
    hub.add(REPO, made("two_folders"), gated=True)
    with pytest.raises(NLAError, match=r"someone/nla cannot be .*it is gated.*hf auth login"):
        NLA.from_pretrained(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert NLA.from_pretrained(REPO).reconstructor is not None


def test_a_download_that_is_cut_off(hub: HubServer, made) -> None:
    hub.add(REPO, made("two_folders"))
    hub.cut = {"model.safetensors"}
    with pytest.raises(NLAError, match=r"someone/nla cannot be fetched.*cut off") as caught:
        NLA.from_pretrained(REPO)
    assert "\n" not in str(caught.value)
    hub.cut = set()
    same(NLA.from_pretrained(REPO), NLA.from_pretrained(made("two_folders")))


def test_no_hub_at_all(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.__exit__()
    with pytest.raises(NLAError, match=r"someone/nla-av cannot be fetched.*cannot be reached"):
        NLA.from_pretrained(REPO)


def test_a_folder_that_is_not_there(hub: HubServer, made) -> None:
    hub.add(REPO, made("two_folders"))
    for call in ({"name": f"{REPO}/verbalizer"}, {"av": f"{REPO}/verbalizer"}):
        with pytest.raises(NLAError, match=r"someone/nla has no folder 'verbalizer'; it has"):
            NLA.from_pretrained(**call)


def test_a_directory_here_comes_before_the_hub(
    hub: HubServer, made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add(REPO, made("steps"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made("two_folders"), REPO)
    assert read_spec(REPO).injection_scale == 30.0 and not hub.requests
    assert read_spec(f"hf://{REPO}").av_base is not None
    assert hub.fetched(REPO)


# --- served and in a process of its own -----------------------------------------------------------


def test_of_an_adapter_its_weights_and_of_a_whole_model_none(
    hub: HubServer, tmp_path: Path
) -> None:
    from nla_lens.engines.served.prompt_rows import open_small

    base = build_source(tmp_path / "base", "llama")
    hub.add("x/lora-av", build_lora_av(tmp_path / "lora-av", "llama", base))
    hub.add("x/whole-av", build_av(tmp_path / "whole-av", "llama"))
    for name in ("x/lora-av", "x/whole-av"):
        assert (open_small(name).path / "nla_meta.yaml").is_file()
    weights = {n for r in ("x/lora-av", "x/whole-av") for n in hub.fetched(r) if "safetensors" in n}
    assert weights == {"adapter_model.safetensors"}


def test_by_the_environment_alone(hub: HubServer, made, tmp_path: Path) -> None:
    """Nothing patched: a fresh process that is only told where the hub is."""
    hub.add(REPO, made("adapters"))
    code = (
        "from nla_lens import NLA\n"
        f"nla = NLA.from_pretrained({REPO!r})\n"
        "print(nla.reconstruct(['One.']).shape, nla.spec.origins['av_base'])"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([1, 64]) av_rl_adapters/iter_000300/adapter_config")
    assert downloaded(hub, tmp_path / "home" / "hub") == NEEDED["adapters"]
