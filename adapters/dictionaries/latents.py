"""One way to look at any dictionary: ours, a `sae_lens.SAE`, or another object with its verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nla_lens.adapters.dictionaries.dictionary import Dictionary, check_indices
from nla_lens.errors import NLAError
from nla_lens.nla import NLA
from nla_lens.stream.hook_point import ResidPost

OTHER_LAYER = "other_layer"
UNKNOWN_PLACE = "unknown_place"
"""The dictionary does not say where in the model it reads."""


class Latents:
    """A dictionary seen through `W_dec`, `encode` and `decode`.

    Attributes:
        source: The dictionary itself.
        d_sae: Number of latents.
        d_in: Width of the vectors.
        hook_name: Where it reads; None when not known.
        model_name: Which model it reads; None when not known.
    """

    def __init__(self, source: Any) -> None:
        """Args:
        source: A `Dictionary`, or any object with `W_dec` `[d_sae, d]`, `encode` and `decode`.

        Raises:
            NLAError: Something else.
        """
        if isinstance(source, Latents):
            source = source.source
        if not isinstance(source, Dictionary):
            check_dictionary(source)
        self.source: Any = source
        # Of a dictionary in files W_dec would be read as a whole.
        own = isinstance(source, Dictionary)
        self.d_sae: int = source.cfg.d_sae if own else source.W_dec.shape[0]
        self.d_in: int = source.cfg.d_in if own else source.W_dec.shape[1]
        self.hook_name = _said(source, "hook_name")
        self.model_name = _said(source, "model_name")

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Decoder rows `[n, d]` float32 on the CPU.

        Raises:
            NLAError: No such latent, NaN or infinity.
        """
        if isinstance(self.source, Dictionary):
            return self.source.rows(indices)
        listed = check_indices(indices, self.d_sae)
        rows_ND = self.source.W_dec.detach()[listed].to("cpu", torch.float32)
        finite = rows_ND.isfinite().all(-1)
        if not finite.all():
            at = listed[int((~finite).nonzero()[0])]
            raise NLAError(f"W_dec holds NaN or infinity at latent {at}: get the dictionary again")
        return rows_ND

    def encode(self, x_ND: Tensor) -> Tensor:
        """Latents `[n, d_sae]` float32 on the CPU."""
        with torch.no_grad():
            latents: Tensor = self.source.encode(self._ready(x_ND))
        return (latents.to_dense() if latents.is_sparse else latents).to("cpu", torch.float32)

    def reconstruct(self, x_ND: Tensor) -> Tensor:
        """`decode(encode(x))`, `[n, d]` float32 on the CPU."""
        # Both verbs at once: some keep the norm of what they encoded for what they decode.
        with torch.no_grad():
            out: Tensor = self.source.decode(self.source.encode(self._ready(x_ND)))
        return out.to("cpu", torch.float32)

    def _ready(self, x_ND: Tensor) -> Tensor:
        if isinstance(self.source, Dictionary):
            return x_ND
        return x_ND.to(self.source.W_dec)

    def place_flags(self, nla: NLA) -> tuple[str, ...]:
        """What is to be said of where the dictionary reads, compared with where the NLA does.

        `blocks.l.hook_resid_pre` and `blocks.l-1.hook_resid_post` are one place.

        Returns:
            `()` at the same place, `other_layer` elsewhere in the residual stream,
            `unknown_place` where the dictionary does not say.

        Raises:
            NLAError: Another width, or a place that is not in the residual stream.
        """
        spec = nla.spec
        if self.d_in != spec.d_model:
            turned = (
                "; W_dec must be [d_sae, d], and seems transposed"
                if self.d_sae == spec.d_model
                else ""
            )
            raise NLAError(
                f"the dictionary reads width {self.d_in}, the NLA width {spec.d_model} (source "
                f"model {spec.source_model}){turned}"
            )
        if self.hook_name is None:
            return (UNKNOWN_PLACE,)
        place = ResidPost.find(self.hook_name)
        if place is None:
            raise NLAError(
                f"the dictionary reads {self.hook_name}, which is not in the residual stream "
                f"between blocks; the NLA reads {spec.hook_name}. If the files are wrong about it, "
                "say load_dictionary(..., hook_name=...)"
            )
        return () if spec.place in (None, place) else (OTHER_LAYER,)


def check_dictionary(source: Any) -> None:
    """Raises an NLAError unless `source` has `W_dec` `[d_sae, d]`, `encode` and `decode`."""
    missing = [
        name
        for name, there in (
            ("W_dec", isinstance(getattr(source, "W_dec", None), Tensor)),
            ("encode", callable(getattr(source, "encode", None))),
            ("decode", callable(getattr(source, "decode", None))),
        )
        if not there
    ]
    if missing:
        raise NLAError(
            f"a {type(source).__name__} is no dictionary: it has no {', '.join(missing)}; give a "
            "directory, a hub repository, or an object with W_dec [d_sae, d], encode and decode"
        )
    place, out = _said(source, "hook_name"), _said(source, "hook_name_out")
    if out not in (None, place):
        raise NLAError(
            f"a {type(source).__name__} that reads {place} and writes {out} is a transcoder: its "
            "directions are not in the space it reads"
        )
    if source.W_dec.ndim != 2:
        raise NLAError(f"W_dec has shape {tuple(source.W_dec.shape)}, expected [d_sae, d]")


def _said(source: Any, name: str) -> str | None:
    """What a dictionary's `cfg.metadata`, `cfg` or itself says."""
    cfg = getattr(source, "cfg", None)
    for holder in (getattr(cfg, "metadata", None), cfg, source):
        value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
        if isinstance(value, str) and value:
            return value
    return None
