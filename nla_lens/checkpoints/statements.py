"""What every source says of a checkpoint: sidecars, configs, the known releases, the caller."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.releases import KnownRelease, find_release
from nla_lens.checkpoints.sidecar import Sidecar
from nla_lens.checks import is_int
from nla_lens.errors import NLAError, NLAWarning


def find_known(av: Checkpoint, ar: Checkpoint | None) -> KnownRelease | None:
    """The known release of this name.

    Where the width is another one, the checkpoint is not that release itself but one made like it:
    its rule still holds, its numbers do not.
    """
    release = find_release(av.name) or find_release(ar.name if ar else None)
    if release is None:
        return None
    width = av.sidecar.d_model or av.config.get("hidden_size")
    if width in (None, release.d_model):
        return release
    warnings.warn(
        f"d_model is {width} ({av.sidecar.path}), but the release {release.stem} is known with "
        f"{release.d_model}; only its injection rule is taken over",
        NLAWarning,
        stacklevel=5,
    )
    return replace(
        release, d_model=width, layer=None, source_model=None, injection_scale=None, var_nrm=None
    )


class Sources:
    """Collects a value from every source that states it, and refuses contradictions."""

    def __init__(self, av: Checkpoint, ar: Checkpoint | None, release: KnownRelease | None) -> None:
        self.av, self.ar, self.release = av, ar, release
        self.d_model_origin = "sidecar"

    def known(self, name: str) -> tuple[str, Any]:
        """What the known release says of a field of the spec."""
        return "known release", getattr(self.release, name, None)

    def d_model(self) -> int:
        """The width of the residual stream.

        Raises:
            NLAError: Nobody says it, or two say different things; names the files.
        """
        said: dict[str, Any] = {}
        for half in filter(None, (self.av, self.ar)):
            said[str(half.sidecar.path)] = half.sidecar.d_model
            if "hidden_size" in half.config:
                said[f"{half.path / 'config.json'} (hidden_size)"] = half.config["hidden_size"]
        width = _agreed("d_model", said)
        if not isinstance(width, int) or width < 1:
            raise NLAError(
                f"{self.av.name}: d_model is {width!r}; neither sidecar nor config says it"
            )
        if self.av.sidecar.d_model is None:
            self.d_model_origin = "config"
        return width

    def layer(self, asked: int | None) -> int | None:
        """K; `asked` is the caller's word.

        Raises:
            NLAError: Two say different things; names them.
        """
        if asked is not None and (not is_int(asked) or asked < 0):
            raise NLAError(f"layer={asked!r} must be the index of a block, from 0")
        said: dict[str, Any] = {"layer=": asked, str(self.av.sidecar.path): self.av.sidecar.layer}
        if self.ar is not None:
            said[str(self.ar.sidecar.path)] = self.ar.sidecar.layer
            blocks = self.ar.config.get("num_hidden_layers")
            if isinstance(blocks, int) and self.ar_blocks() is None:
                said[f"{self.ar.path / 'config.json'} (num_hidden_layers - 1)"] = blocks - 1
        layer = _agreed("layer", said, _CUT_ELSEWHERE if self.ar is not None else "")
        for half in filter(None, (self.av, self.ar)):
            trained_on = half.sidecar.layers
            if trained_on and layer not in trained_on:
                raise NLAError(
                    f"{half.sidecar.path}: it was trained on layers {list(trained_on)} "
                    f"(extraction.layers), and layer is {layer}; pass layer= with one of them"
                )
        return layer

    def ar_blocks(self) -> int | None:
        """Blocks of a reconstructor that is not cut after block K; None where it is.

        Raises:
            NLAError: Its sidecar says another number than its config.json.
        """
        if self.ar is None or self.ar.sidecar.ar_blocks is None:
            return None
        said: dict[str, Any] = {f"{self.ar.sidecar.path} (ar.n_blocks)": self.ar.sidecar.ar_blocks}
        if not self.ar.is_adapter:
            where = f"{self.ar.path / 'config.json'} (num_hidden_layers)"
            said[where] = self.ar.config.get("num_hidden_layers")
        return _agreed("number of the reconstructor's blocks", said)


_CUT_ELSEWHERE: Final = (
    " (a reconstructor that is cut after another block than K says so in its sidecar: "
    "ar: {n_blocks: N})"
)


def _agreed(name: str, said: Mapping[str, Any], remedy: str = "") -> Any:
    known = {where: value for where, value in said.items() if value is not None}
    values = list(known.values())
    if any(value != values[0] for value in values):
        listed = "; ".join(f"{where} says {value!r}" for where, value in known.items())
        raise NLAError(f"contradictory {name}: {listed}; the two do not belong together{remedy}")
    return values[0] if values else None


def compare(
    values: Mapping[str, Any], origins: Mapping[str, str], release: KnownRelease, side: Sidecar
) -> None:
    """Warns where a checkpoint under the name of a known release is not what is known of it."""
    for name in ("layer", "injection", "injection_scale"):
        value, known = values[name], getattr(release, name)
        if None not in (value, known) and value != known:
            warnings.warn(
                f"{name} is {value!r} ({origins[name]}, {side.path}), but the release "
                f"{release.stem} is known with {known!r}; {value!r} is used",
                NLAWarning,
                stacklevel=5,
            )
