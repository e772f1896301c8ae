"""The layouts of public NLAs: both halves in one repository, beside what is not needed.

`two_folders`: `av/` and `ar/`, each with its sidecar. `steps`: `av_rl_lora_step400/` and
`rl_critic_step400/` under one sidecar. `adapters`: `av_base/`, `av_rl_adapters/iter_000300/` and
`ar_reconstructor/`. `LAYOUTS[name]` builds one; `CLUTTER` is what lies around in all of them.
"""

import json
import shutil
from pathlib import Path

import yaml

from .builders import AV_SEEDS, build_ar, build_av, build_source
from .lora import build_lora_av
from .sidecars import write_sidecar

CLUTTER = (
    "README.md", "loss.png", ".gitattributes", "training.log", "optimizer.pt", "scheduler.pt",
    "trainer_state.json", "consolidated.00.safetensors", "pytorch_model.bin", "training_args.bin",
    "optimizer_states/rank_0.safetensors", "eval/results.json",
)  # fmt: skip


def clutter(root: Path) -> None:
    """What trainers leave behind, at the top and in every folder."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in CLUTTER:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}" if name.endswith(".json") else "not needed")


def share_sidecar(root: Path, *halves: Path) -> None:
    """Puts one sidecar for all halves at the root; theirs go."""
    read = [yaml.safe_load((half / "nla_meta.yaml").read_text("utf-8")) for half in halves]
    av, ar = read
    merged = {**ar, **av}
    for key in ("extraction", "tokens", "prompt_templates"):
        merged[key] = {**ar[key], **{k: v for k, v in av[key].items() if v is not None}}
    del merged["role"]
    write_sidecar(root, merged)
    for half in halves:
        (half / "nla_meta.yaml").unlink()


def two_folders(root: Path, family: str = "llama") -> Path:
    """`av/` and `ar/`, full models."""
    build_av(root / "av", family)
    build_ar(root / "ar", family)
    return root


def steps(root: Path, family: str = "llama", base: str | Path | None = None) -> Path:
    """A LoRA verbalizer over `base`, a full reconstructor, one sidecar for both."""
    if base is None:
        base = build_source(root.parent / f"{root.name}-source", family, seed=AV_SEEDS[family])
    av = build_lora_av(root / "av_rl_lora_step400", family, base)
    ar = build_ar(root / "rl_critic_step400", family)
    share_sidecar(root, av, ar)
    return root


def adapters(
    root: Path, family: str = "llama", base: str = "/scratch/someone/runs/7/av_base"
) -> Path:
    """A verbalizer's adapters over a base in the same repository, which they name as `base`."""
    made = build_source(root / "av_base", family, seed=AV_SEEDS[family])
    av = build_lora_av(root / "av_rl_adapters" / "iter_000300", family, made)
    config = av / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base})
    )
    build_ar(root / "ar_reconstructor", family)
    return root


LAYOUTS = {"two_folders": two_folders, "steps": steps, "adapters": adapters}
HALVES = {
    "two_folders": ("av", "ar"),
    "steps": ("av_rl_lora_step400", "rl_critic_step400"),
    "adapters": ("av_rl_adapters/iter_000300", "ar_reconstructor"),
}


def without(root: Path, *folders: str) -> None:
    """Removes folders."""
    for folder in folders:
        shutil.rmtree(root / folder)
