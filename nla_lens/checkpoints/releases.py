"""What is known of released checkpoints that their sidecars may leave out.

The sidecar always wins; this table only fills gaps (injection rule, K, var_nrm). Sources: the model
cards and sidecars of the releases.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

Rule: TypeAlias = Literal["replace", "norm_matched_add"]
RULES: Final[tuple[Rule, ...]] = ("replace", "norm_matched_add")
"""The names of the injection rules; `stream.injection` has their arithmetic, and needs torch."""

_PACKAGE: Final = Path(__file__).parent.parent
TINY_DIR: Final = _PACKAGE / "tiny"
SMOL_DIR: Final = _PACKAGE / "smol"
EMBEDDED_DIRS: Final = (TINY_DIR, SMOL_DIR)
SMOL_SOURCE_NAME: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOL_SOURCE_DIR: Final = SMOL_DIR / "SmolLM2-135M-Instruct"
"""Where `make smol` puts the source model of the pair "smol"; elsewhere it is the hub's."""
TINY_SOURCE_NAME: Final = "nla_lens/tiny"
"""How the embedded sidecars name their source model; stands for `TINY_DIR / "source"`."""


def source_here(name: str, half: Path) -> str:
    """Where the source model of an embedded half lies on this machine; else its name.

    The model in `SMOL_SOURCE_DIR` is rounded to four bits, so it stands for the hub's in the pair
    that was trained on it, and in no other.

    Args:
        name: As the sidecar says it.
        half: Folder of the half.
    """
    if name == TINY_SOURCE_NAME:
        return str(TINY_DIR / "source")
    is_smol = name == SMOL_SOURCE_NAME and half.resolve().is_relative_to(SMOL_DIR)
    return str(SMOL_SOURCE_DIR) if is_smol and SMOL_SOURCE_DIR.is_dir() else name


def source_elsewhere(place: str) -> str:
    """The name that `source_here` has for a place; others stay as they are."""
    names = {str(TINY_DIR / "source"): TINY_SOURCE_NAME, str(SMOL_SOURCE_DIR): SMOL_SOURCE_NAME}
    return names.get(place, place)


@dataclass(frozen=True)
class KnownRelease:
    """One release.

    Attributes:
        av: Hub name of the verbalizer.
        ar: Hub name of the reconstructor; None where there is none.
        source_model: Hub name of the model that is read.
        layer: K.
        d_model: Width of the residual stream.
        injection: The injection rule.
        injection_scale: Norm for `replace`; None for `norm_matched_add`, which uses none.
        var_nrm: Baseline of `fve_nrm`.
        var_nrm_is_estimate: Taken from a run's notes, not measured by its authors.
        reported_fve_nrm: What its authors report; None where they do not.
    """

    av: str
    ar: str | None
    source_model: str | None
    layer: int | None
    d_model: int
    injection: Rule
    injection_scale: float | None
    var_nrm: float | None
    var_nrm_is_estimate: bool = False
    reported_fve_nrm: float | None = None

    @property
    def stem(self) -> str:
        """Name of the pair: what AV and AR have in common."""
        return self.av.removesuffix("-av")


def _kitft(
    stem: str, source: str, layer: int, d_model: int, scale: float, var_nrm: float, fve_nrm: float
) -> KnownRelease:
    return KnownRelease(
        f"{stem}-av",
        f"{stem}-ar",
        source,
        layer,
        d_model,
        "replace",
        scale,
        var_nrm,
        reported_fve_nrm=fve_nrm,
    )


def _nanonla(av: str, ar: str | None) -> KnownRelease:
    # var_nrm over 1000 held-out prompts, nanoNLA's own figure.
    return KnownRelease(av, ar, "Qwen/Qwen3-8B", 24, 4096, "norm_matched_add", None, 0.6704)


KNOWN_RELEASES: Final = (
    _kitft("kitft/nla-qwen2.5-7b-L20", "Qwen/Qwen2.5-7B-Instruct", 20, 3584, 150.0, 0.7335, 0.752),
    _kitft("kitft/nla-gemma3-12b-L32", "google/gemma-3-12b-it", 32, 3840, 80000.0, 0.0302, 0.768),
    _kitft("kitft/nla-gemma3-27b-L41", "google/gemma-3-27b-it", 41, 5376, 60000.0, 0.0579, 0.763),
    _kitft(
        "kitft/Llama-3.3-70B-NLA-L53",
        "meta-llama/Llama-3.3-70B-Instruct",
        53,
        8192,
        30.0,
        0.9169,
        0.80,
    ),
    _nanonla("ceselder/nanonla-l24-av-qwen3-8b", None),
    _nanonla("syvb/nanonla-qwen3-8b-L24-av", "syvb/nanonla-qwen3-8b-L24-ar"),
)


def find_release(name: str | None) -> KnownRelease | None:
    """The release a hub name, a pair's stem, or a local copy's directory name stands for."""
    if not name:
        return None
    last = Path(name).name
    for release in KNOWN_RELEASES:
        for known in filter(None, (release.av, release.ar, release.stem)):
            if name == known or last == Path(known).name:
                return release
    return None
