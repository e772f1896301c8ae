"""The model whose vectors an NLA reads, loaded when it is first needed and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.models.placement import Placement
from nla_lens.models.turns import turn
from nla_lens.progress import waiting
from nla_lens.stream.extraction import Positions, Source, Text, open_source, read_text
from nla_lens.stream.residual import ResidualTensor


class OwnSource:
    """Reads texts at block K, with a model that a caller gives or the one that the spec names.

    Attributes:
        loaded: The spec's own, a `Source`, once it was needed; None before.
    """

    def __init__(
        self, spec: NLASpec, placement: Placement | None = None, remote: str | bool = False
    ) -> None:
        """Loads nothing yet.

        Args:
            spec: Which model, and which layer.
            placement: How it is loaded.
            remote: Where it runs, if not here; see `engines.remote_host`.
        """
        self._spec, self._remote = spec, remote
        self._placement = placement or Placement()
        self.loaded: Any = None

    def read(
        self, text: Text, positions: Positions, model: Any, generate: int, progress: bool | None
    ) -> ResidualTensor:
        """The vectors of a text; see `NLA.explain_text` for what the arguments mean.

        Raises:
            NLAError: No source model or layer is known, or a position the text does not have.
        """
        if not is_int(generate) or generate < 0:
            raise NLAError(f"generate={generate!r} must be the number of tokens to write, or 0")
        place = self._spec.place
        if place is None:
            raise NLAError("which layer to read is not known; pass layer= to from_pretrained")
        source = self.open(model, whole=generate > 0)
        with waiting("reading the text", progress):
            return read_text(source, text, place, positions=positions, generate=generate)

    def open(self, model: Any = None, *, whole: bool = False) -> Source:
        """The model whose residual stream is read.

        Args:
            model: A loaded model or a checkpoint's name; None: the spec's own, loaded once.
            whole: It must go on writing, too; else blocks after K are not loaded.

        Raises:
            NLAError: No source model is known.
        """
        name, place = self._spec.source_model, self._spec.place
        n_blocks = None if whole or not place else place.n_blocks
        if model is not None:
            return open_source(model, n_blocks=n_blocks)
        if name is None:
            raise NLAError("the checkpoint does not name its source model; pass model=")
        with turn(self):
            if self.loaded is None or (whole and not self.loaded.is_whole):
                # The caller trusts the checkpoint's code, and not that of whatever it names: a
                # source with code of its own is loaded by the caller, and passed as model=.
                placement = replace(self._placement, trust_remote_code=False)
                how = {"remote": self._remote, **vars(placement)}
                self.loaded = open_source(name, n_blocks=n_blocks, **how)
            loaded: Source = self.loaded
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: the model is loaded again when it is needed."""
        return {**vars(self), "loaded": None}
