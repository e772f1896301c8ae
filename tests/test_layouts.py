"""Both halves in one directory: which folder is which, and what an adapter goes onto."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from nla_lens import NLA, NLAError
from nla_lens.checkpoints.layout import Folder, find_folders, pick, role_by_name
from nla_lens.checkpoints.names import find_pair, name_halves
from nla_lens.checkpoints.spec import read_spec

from .checkpoints import build_ar, build_av, build_lora_av, build_source, reference, vectors
from .checkpoints.builders import AV_SEEDS
from .checkpoints.layouts import HALVES, LAYOUTS, clutter, share_sidecar

pytest.importorskip("peft")

TEXTS = ["One.", "Another text."]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Path]:
    """Each layout, built once, with what lies around in it; not to be changed."""

    def build(name: str) -> Path:
        root = LAYOUTS[name](tmp_path_factory.mktemp("layouts") / name)
        clutter(root)
        return root

    return cache(build)


@pytest.fixture
def copy(made, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made(name), tmp_path / "repo"))


def tokens(nla: NLA) -> list[list[int]]:
    return [list(e.token_ids) for e in nla.explain(vectors()[:2], max_new_tokens=6, score=False)]


def equal(nla: NLA, other: NLA) -> None:
    """The same texts, and vectors to the last bit."""
    assert tokens(nla) == tokens(other)
    assert torch.equal(nla.reconstruct(TEXTS), other.reconstruct(TEXTS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_directory_with_both_halves(made, tmp_path: Path, layout: str) -> None:
    root = made(layout)
    nla = NLA.from_pretrained(root)
    av, ar = HALVES[layout]
    base = {"base": root / "av_base"} if layout == "adapters" else {}
    by_hand = NLA.from_pretrained(av=root / av, ar=root / ar, **base)
    equal(nla, by_hand)
    assert nla.spec == by_hand.spec
    greedy = reference.AV(whole(root, layout, tmp_path)).greedy(vectors()[:2], 6)
    assert tokens(nla) == greedy.ids.tolist()


def whole(root: Path, layout: str, tmp_path: Path) -> Path:
    """The verbalizer with all it needs in one directory, for the reference."""
    av = Path(shutil.copytree(root / HALVES[layout][0], tmp_path / "av"))
    if not (av / "nla_meta.yaml").is_file():
        shutil.copy(root / "nla_meta.yaml", av)
    if layout == "adapters":
        rename_base(av, str(root / "av_base"))
    return av


def rename_base(av: Path, base: str) -> None:
    config = av / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base})
    )


# --- which folder is which ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("av", "av"), ("ar", "ar"), ("av_rl_lora_step400", "av"), ("rl_critic_step400", "ar"),
        ("av_rl_adapters/iter_000300", "av"), ("ar_reconstructor", "ar"), ("av_base", "av"),
        ("Verbalizer-final", "av"), ("checkpoints/actor", "av"), ("nla_av_ar/critic", "ar"),
        ("av_ar", None), ("source", None), ("avocado", None), ("star", None), ("", None),
        ("lora.AV.300", "av"), ("step400", None),
    ],
)  # fmt: skip
def test_what_a_name_says(path: str, role: str | None) -> None:
    assert role_by_name(path) == role


def picked(files: list[str], role: str, bases: dict[str, str] | None = None) -> str | None:
    folders = find_folders(files, lambda folder: None)
    return pick("x", folders, role, lambda f: (bases or {}).get(f.path))


def model(*folders: str) -> list[str]:
    return [f"{f}/config.json" if f else "config.json" for f in folders]


def adapter(*folders: str) -> list[str]:
    return [f"{f}/adapter_config.json" for f in folders]


def test_files_decide_before_names() -> None:
    assert picked([*model("final", "av"), "final/value_head.safetensors"], "ar") == "final"
    assert picked([*model("actor"), "actor/value_head.safetensors"], "av") is None


def test_its_own_sidecar_decides_where_the_name_is_silent() -> None:
    files = [*model("one", "two"), "one/nla_meta.yaml", "two/nla_meta.yaml"]
    folders = find_folders(files, {"one": "ar", "two": None}.get)
    assert [(f.path, f.role) for f in folders] == [("one", "ar"), ("two", "av")]


def test_the_plain_name_wins_over_others() -> None:
    assert picked(model("av", "av_norm_matched", "ar", "source"), "av") == "av"


def test_steps_inside_a_half_are_leftovers() -> None:
    files = model("av_rl", "av_rl/checkpoint-100", "av_rl/checkpoint-200", "ar_rl")
    assert picked(files, "av") == "av_rl"


def test_a_half_at_the_top_wins_over_unnamed_folders() -> None:
    folders = [Folder("", False, "av"), Folder("checkpoint-5", False, "av")]
    assert pick("x", folders, "av", lambda f: None) == ""


def test_an_adapter_wins_over_its_base_and_over_nothing_else() -> None:
    files = [*model("av_base"), *adapter("av_rl/iter_3")]
    assert picked(files, "av", {"av_rl/iter_3": "av_base"}) == "av_rl/iter_3"
    with pytest.raises(NLAError, match="2 verbalizers"):
        picked(files, "av")


def test_too_deep_is_not_looked_at() -> None:
    assert picked(model("a/b/av"), "av") is None


def test_what_is_not_clear_is_asked(copy) -> None:
    root = copy("steps")
    shutil.copytree(root / "av_rl_lora_step400", root / "av_rl_lora_step800")
    with pytest.raises(NLAError) as caught:
        NLA.from_pretrained(root)
    message = str(caught.value)
    assert "holds 2 verbalizers (AV): 'av_rl_lora_step400', 'av_rl_lora_step800'" in message
    assert f'NLA.from_pretrained(av="{root}/av_rl_lora_step800", ar="{root}/rl_critic' in message
    call = message[message.index("NLA.from_pretrained(") :]
    assert eval(call).reconstructor is not None
    assert name_halves(root, None, None, subfolder={"av": "av_rl_lora_step400"})[1] is None
    shutil.rmtree(root / "av_rl_lora_step800")
    shutil.copytree(root / "rl_critic_step400", root / "rl_critic_step800")
    with pytest.raises(NLAError, match=r"2 reconstructors \(AR\).*av=.*ar="):
        NLA.from_pretrained(root)


def test_subfolders(made) -> None:
    root = made("two_folders")
    alone = NLA.from_pretrained(root, subfolder="av")
    assert alone.reconstructor is None
    pair = NLA.from_pretrained(root, subfolder={"av": "av", "ar": "ar"})
    equal(pair, NLA.from_pretrained(root))
    assert read_spec(av=root, ar=root) == pair.spec
    for wrong in ("../av", "", "/", "a//b", 3, {"judge": "av"}):
        with pytest.raises(NLAError, match="subfolder="):
            NLA.from_pretrained(root, subfolder=wrong)


def test_a_folder_of_pairs_is_no_repository(pair_dirs) -> None:
    av, _ = pair_dirs("llama", "replace")
    with pytest.raises(NLAError, match="has neither"):
        NLA.from_pretrained(av.parent)
    assert find_pair(str(av).removesuffix("-av"))[0] == av


def test_an_av_at_the_top_and_an_ar_in_a_folder(tmp_path: Path) -> None:
    build_av(tmp_path, "llama")
    build_ar(tmp_path / "ar", "llama")
    assert NLA.from_pretrained(tmp_path).reconstructor is not None


def test_a_directory_that_hides_a_repository(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    with pytest.raises(NLAError, match=r'not looked at while it is here: "hf://owner/name"'):
        NLA.from_pretrained("owner/name")
    with pytest.raises(NLAError, match=r"owner/name.* cannot be fetched from the hub"):
        NLA.from_pretrained("hf://owner/name")


def test_a_relative_name(made, monkeypatch) -> None:
    monkeypatch.chdir(made("steps"))
    nla = NLA.from_pretrained(av="av_rl_lora_step400", ar="./rl_critic_step400")
    equal(nla, NLA.from_pretrained(made("steps")))
    assert NLA.from_pretrained(".").spec == nla.spec


# --- one sidecar for both -------------------------------------------------------------------------


def test_a_halfs_own_sidecar_comes_first(copy) -> None:
    root = copy("two_folders")
    shutil.copy(root / "ar" / "nla_meta.yaml", root / "nla_meta.yaml")
    assert read_spec(root).injection_scale == 30.0


def test_a_shared_sidecar_with_a_role_serves_both(copy) -> None:
    root = copy("steps")
    path = root / "nla_meta.yaml"
    path.write_text(path.read_text("utf-8") + "role: av\n", "utf-8")
    assert NLA.from_pretrained(root).reconstructor is not None


def test_a_value_head_still_tells_under_a_shared_sidecar(copy) -> None:
    root = copy("steps")
    with pytest.raises(NLAError, match=r"reconstructor \(AR\).*it has a value_head"):
        NLA.from_pretrained(av=root / "rl_critic_step400")


def test_tokenizers_at_the_top_serve_both(copy, made) -> None:
    root = copy("two_folders")
    share_sidecar(root, root / "av", root / "ar")
    for path in (root / "av").glob("*token*"):
        shutil.copy(path, root)
    for half in ("av", "ar"):
        for path in (root / half).glob("*token*"):
            path.unlink()
    equal(NLA.from_pretrained(root), NLA.from_pretrained(made("two_folders")))


# --- what an adapter goes onto --------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        "../../av_base", "av_base", "../av_base/", "./av_base", "/scratch/someone/runs/7/av_base",
        "C:\\Users\\someone\\av_base", "outputs/7/av_base", "/data/merged_step_1200",
    ],
)  # fmt: skip
def test_a_base_in_the_adapters_own_repository(copy, made, base: str) -> None:
    root = copy("adapters")
    rename_base(root / "av_rl_adapters" / "iter_000300", base)
    nla = NLA.from_pretrained(root)
    assert nla.spec.av_base == str(root / "av_base")
    said = nla.spec.origins["av_base"]
    assert said.startswith(f"av_rl_adapters/iter_000300/adapter_config.json names {base}")
    assert "\n" not in said
    equal(nla, NLA.from_pretrained(made("adapters")))


def test_the_base_is_the_repository_itself(tmp_path: Path) -> None:
    root = build_source(tmp_path / "repo", "llama", seed=AV_SEEDS["llama"])
    av = build_lora_av(root / "av_lora", "llama", root)
    build_ar(root / "ar", "llama")
    wanted = tokens(NLA.from_pretrained(av=av))
    for base in ("..", "../", "."):
        rename_base(av, base)
        nla = NLA.from_pretrained(root)
        assert nla.spec.av_base == str(root)
        assert tokens(nla) == wanted
    # The same under one sidecar, where the top could be taken for a verbalizer.
    share_sidecar(root, av, root / "ar")
    assert NLA.from_pretrained(root).spec.av_base == str(root)


def test_the_sidecars_source_where_the_names_agree(tmp_path: Path) -> None:
    source = build_source(tmp_path / "Llama-Tiny", "llama", seed=AV_SEEDS["llama"])
    av = build_lora_av(tmp_path / "av", "llama", source)
    wanted = tokens(NLA.from_pretrained(av=av))
    rename_base(av, "/workspace/models/llama-tiny")
    nla = NLA.from_pretrained(av=av)
    assert nla.spec.av_base == str(source) and tokens(nla) == wanted
    assert "the sidecar's source model" in nla.spec.origins["av_base"]
    rename_base(av, "/workspace/ckpt/av_sft_merged")
    with pytest.raises(
        NLAError,
        match=r"^adapter_config.json names /workspace/ckpt/av_sft.*: .* cannot be loaded.*base=",
    ):
        NLA.from_pretrained(av=av)
    by_hand = NLA.from_pretrained(av=av, base=source)
    assert tokens(by_hand) == wanted
    assert by_hand.spec.origins["av_base"] == f"base={str(source)!r}"


def test_a_name_in_a_cache_of_the_hub(tmp_path: Path) -> None:
    av = build_lora_av(tmp_path / "av", "llama", build_source(tmp_path / "s", "llama"))
    rename_base(av, "/scratch/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46")
    assert read_spec(av).av_base == "Qwen/Qwen3-8B"


def test_a_base_of_the_callers(tmp_path: Path, made) -> None:
    source = build_source(tmp_path / "s", "llama", seed=AV_SEEDS["llama"])
    av = build_lora_av(tmp_path / "av", "llama", source)
    config = av / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None})
    )
    ar = made("two_folders") / "ar"
    assert read_spec(av=av, ar=ar, base=source).av_base == str(source)
    assert read_spec(av=av, base={"av": str(source)}).av_base == str(source)
    for base, names in (
        ({"av": source, "ar": source}, "ar is no adapter"),
        ({"judge": source}, "must be a directory or hub repository"),
        (5, "must be a directory or hub repository"),
        ("nowhere", "base='nowhere' is neither"),
        ("owner/name/folder", r"owner/name cannot be fetched"),
    ):
        with pytest.raises(NLAError, match=names):
            read_spec(av=av, ar=ar, base=base)
    with pytest.raises(NLAError, match=r"base=.*two_folders/a[vr] is no adapter"):
        read_spec(made("two_folders"), base=source)
