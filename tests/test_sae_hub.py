"""Dictionaries on a hub: what is fetched, in which order, and what is never fetched."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nla_lens import NLAError
from nla_lens.adapters.sae import load_dictionary

from . import dictionary_files as files
from .hub_server import HubServer, use

X = torch.randn(4, files.D, generator=torch.Generator().manual_seed(5))


class Large(bytes):
    """What a hub lists as three gigabytes, and nobody here has the room for."""

    def __len__(self) -> int:
        return 3 << 30


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as started:
        use(started, monkeypatch, tmp_path / "cache")
        yield started


def add(hub: HubServer, repo: str, root: Path, *large: str) -> None:
    """Puts a folder on the hub, as `main` and `v1`, and beside it files that are large."""
    hub.add(repo, root)
    hub.repos[repo].files |= {name: Large() for name in large}
    for branch in ("main", "v1"):
        hub.repos[repo].commit(branch)


def fetched(hub: HubServer) -> list[str]:
    """Names of the files whose content went out, in order."""
    return [name for _, name in hub.gone_out]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "there"
    found.mkdir()
    return found


def test_one_folder_of_a_repository(hub: HubServer, root: Path) -> None:
    files.sparsify(root, "layers.7")
    files.sparsify(root, "layers.7.mlp")
    add(hub, "EleutherAI/sae-x", root, "layers.8/sae.safetensors")
    for source, options in (
        ("EleutherAI/sae-x", {"subfolder": "layers.7"}),
        ("EleutherAI/sae-x/layers.7", {}),
        ("EleutherAI/sae-x/layers.7/sae.safetensors", {}),
        ("EleutherAI/sae-x", {"subfolder": "layers.7", "revision": "v1"}),
    ):
        sae = load_dictionary(source, **options)
        assert sae.cfg.hook_name == "blocks.7.hook_resid_post"
        # Once; then they are in the cache.
        assert fetched(hub) == ["layers.7/cfg.json", "layers.7/sae.safetensors"]
    assert load_dictionary("EleutherAI/sae-x/layers.7.mlp").hook_name == "blocks.7.hook_mlp_out"


def test_one_file_of_a_suite(hub: HubServer, root: Path) -> None:
    """72 GB of other layers stay where they are."""
    case, repo = files.qwen_scope(root, layers=(20,)), "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    add(hub, repo, case.source.parent, *(f"layer{layer}.sae.pt" for layer in range(20)))
    with pytest.raises(NLAError, match=r"several weights files.*and 15 more.*filename"):
        load_dictionary(repo)
    assert fetched(hub) == []
    for source, options in (
        (f"{repo}/layer20.sae.pt", {}),
        (repo, {"filename": "layer20.sae.pt"}),
        (repo, {"subfolder": "layer20.sae.pt"}),
    ):
        sae = load_dictionary(source, **options)
        assert sae.cfg.hook_name == "blocks.20.hook_resid_post"
        assert torch.equal(sae.encode(X) > 0, torch.tensor(case.encode(X)) > 0)
    assert fetched(hub) == ["config.json", "layer20.sae.pt"]


def test_llama_scope(hub: HubServer, root: Path) -> None:
    case, repo = files.llama_scope(root), "fnlp/Llama3_1-8B-Base-LXR-8x"
    add(hub, repo, root, "Llama3_1-8B-Base-L16R-8x/checkpoints/final.safetensors")
    sae = load_dictionary(f"{repo}/Llama3_1-8B-Base-L15R-8x")
    assert torch.allclose(sae.encode(X).double(), torch.tensor(case.encode(X)), atol=2e-6)
    assert [name.rsplit("/", 1)[1] for name in fetched(hub)] == [
        "hyperparams.json",
        "final.safetensors",
    ]


@pytest.mark.parametrize(
    ("config", "weights", "named"),
    [
        ({"type": "crosscoder", "architecture": "jump_relu"}, "params.safetensors", "crosscoder"),
        ({"affine_connection": True}, "params.safetensors", "affine"),
        ({"activation": "groupmax", "d_in": 4}, "sae.safetensors", "groupmax"),
        ({"skip_connection": True, "d_in": 4}, "sae.safetensors", "skip"),
        ({"architecture": "transcoder"}, "sae_weights.safetensors", "transcoder"),
        ({"trainer": {"dict_class": "CrossCoder"}}, "ae.pt", "CrossCoder"),
        ({"model_type": "topk_sae"}, "layer1.sae.pt", "says k"),
        ({"model_type": "llama", "architectures": ["A"]}, "model.safetensors", "language model"),
        ({}, "model.safetensors", "format="),
        ({}, "weights.pt", "format="),
    ],
)
def test_nothing_large_is_fetched_to_be_refused(
    config: dict, weights: str, named: str, hub: HubServer, root: Path
) -> None:
    own = weights in ("sae.safetensors", "sae_weights.safetensors")
    name = "cfg.json" if own else "config.json"
    (root / name).write_text(json.dumps(config))
    add(hub, "a/b", root, weights)
    with pytest.raises(NLAError, match=named):
        load_dictionary("a/b")
    assert fetched(hub) == [name]


def test_llama_scopes_transcoders_are_refused_by_their_config(hub: HubServer, root: Path) -> None:
    case = files.llama_scope(root, "TC", hook_point_in="blocks.15.ln2.hook_normalized")
    (case.source / "checkpoints" / "final.safetensors").unlink()
    folder = "Llama3_1-8B-Base-L15TC-8x"
    weights = f"{folder}/checkpoints/final.safetensors"
    add(hub, "fnlp/Llama3_1-8B-Base-LXTC-8x", root, weights)
    with pytest.raises(NLAError, match="transcoder"):
        load_dictionary(f"fnlp/Llama3_1-8B-Base-LXTC-8x/{folder}")
    assert [name.rsplit("/", 1)[1] for name in fetched(hub)] == ["hyperparams.json"]


def test_a_config_of_gigabytes_is_not_fetched(hub: HubServer, root: Path) -> None:
    case = files.sparsify(root)
    (case.source / "cfg.json").unlink()
    add(hub, "a/b", root, "layers.7/cfg.json")
    with pytest.raises(NLAError, match="no config"):
        load_dictionary("a/b/layers.7")
    assert fetched(hub) == []


def test_shards_come_by_their_index(hub: HubServer, root: Path) -> None:
    from safetensors.torch import load_file, save_file

    case = files.sparsify(root)
    whole = load_file(case.source / "sae.safetensors")
    (case.source / "sae.safetensors").unlink()
    for name, tensor in whole.items():
        save_file({name: tensor}, case.source / f"{name}.safetensors")
    index = case.source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in whole}}))
    add(hub, "a/b", root)
    sae = load_dictionary("a/b/layers.7", format="sparsify")
    assert torch.equal(sae.W_dec, case.weights.W_dec)
    index.write_text(json.dumps({"weight_map": {"W_dec": "../x.safetensors"}}))
    hub.forget()
    add(hub, "a/c", root)
    with pytest.raises(NLAError, match="beside it"):
        load_dictionary("a/c/layers.7", format="sparsify")
    assert all(name.endswith(".json") for name in fetched(hub))


def test_what_was_fetched_is_found_without_the_hub(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.sparsify(root)
    add(hub, "a/b", root)
    wanted = load_dictionary("a/b/layers.7")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_dictionary("a/b/layers.7").cfg == wanted.cfg
    with pytest.raises(NLAError, match=r"a/x cannot be fetched"):
        load_dictionary("a/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert load_dictionary("a/b/layers.7").cfg == wanted.cfg


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        ("a/x", {}, "RepositoryNotFound"),
        ("a/gated", {}, "Gated"),
        ("a/b", {"revision": "v9"}, "RevisionNotFound"),
        ("a/b", {}, r"layers\.7.*subfolder"),
        ("a/b/layers.8", {}, r"no layers\.8.*layers\.7"),
        ("a/b/layers.7/gone.safetensors", {}, "gone"),
        ("a/b/layers.7/../x", {}, "no dictionary"),
        ("a/b", {"filename": "layers.7"}, None),
    ],
)
def test_what_is_not_there_is_named(
    source: str, options: dict, named: str | None, hub: HubServer, root: Path
) -> None:
    files.sparsify(root)
    add(hub, "a/b", root)
    hub.add("a/gated", root / "layers.7", gated=True)
    if named is None:
        assert load_dictionary(source, **options).cfg.hook_name == "blocks.7.hook_resid_post"
        return
    with pytest.raises(NLAError, match=named):
        load_dictionary(source, **options)
