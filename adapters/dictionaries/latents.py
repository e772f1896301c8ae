"""One way to look at any dictionary: ours, a `sae_lens.SAE`, or another object with its verbs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nla_lens.adapters.dictionaries import places
from nla_lens.adapters.dictionaries.dictionary import FLOATS, Dictionary, check_indices
from nla_lens.errors import NLAError
from nla_lens.nla import NLA

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
            given = self.source.encode(self._ready(x_ND))
        if _is_top(given):
            dense_NF = torch.zeros(len(x_ND), self.d_sae, dtype=given.top_acts.dtype)
            given = dense_NF.scatter_(-1, given.top_indices.cpu(), given.top_acts.cpu())
        return self._checked(given, "encode", (len(x_ND), self.d_sae))

    def reconstruct(self, x_ND: Tensor) -> Tensor:
        """`decode(encode(x))`, `[n, d]` float32 on the CPU."""
        # Both verbs at once: some keep the norm of what they encoded for what they decode.
        with torch.no_grad():
            given = self.source.encode(self._ready(x_ND))
            given = (given.top_acts, given.top_indices) if _is_top(given) else (given,)
            out = self.source.decode(*given)
        return self._checked(out, "decode", tuple(x_ND.shape))

    def _ready(self, x_ND: Tensor) -> Tensor:
        """Vectors where, and as, the dictionary's own are.

        Raises:
            NLAError: They hold more than its dtype can.
        """
        if isinstance(self.source, Dictionary):
            return x_ND
        ready_ND = x_ND.to(self.source.W_dec)
        if not ready_ND.isfinite().all():
            raise NLAError(
                f"a vector holds {float(x_ND.abs().max()):g}, more than {ready_ND.dtype} of this "
                f"{type(self.source).__name__} can; give it as float32"
            )
        return ready_ND

    def _checked(self, given: Any, verb: str, shape: tuple[int, ...]) -> Tensor:
        """What a verb of the dictionary gave, float32 on the CPU.

        Raises:
            NLAError: No tensor of that shape, NaN or infinity.
        """
        what = f"{verb} of this {type(self.source).__name__}"
        if not isinstance(given, Tensor) or tuple(given.shape) != shape:
            found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise NLAError(f"{what} gave {found}; expected a tensor {list(shape)}")
        dense = given.detach()
        dense = (dense.to_dense() if dense.is_sparse else dense).to("cpu", torch.float32)
        if not dense.isfinite().all():
            raise NLAError(f"{what} gave NaN or infinity: get the dictionary again")
        return dense

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
        place = places.of_name(self.hook_name)
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
    if any(_values(source, "transcode")):
        raise NLAError(
            f"a {type(source).__name__} with transcode=True is a transcoder: its directions are "
            "not in the space it reads"
        )
    W_dec = source.W_dec
    if W_dec.ndim != 2:
        raise NLAError(f"W_dec has shape {tuple(W_dec.shape)}, expected [d_sae, d]")
    if W_dec.dtype not in FLOATS or W_dec.layout != torch.strided or W_dec.is_meta:
        raise NLAError(
            f"W_dec is {W_dec.dtype}, {W_dec.layout} on {W_dec.device}; expected a plain tensor "
            f"with its values in one of {', '.join(map(str, FLOATS))}"
        )


def _is_top(encoded: Any) -> bool:
    """Whether it is what `SparseCoder.encode` of EleutherAI's sparsify gives."""
    return hasattr(encoded, "top_acts") and hasattr(encoded, "top_indices")


def _said(source: Any, name: str) -> str | None:
    """What a dictionary says in words."""
    found = (v for v in _values(source, name) if isinstance(v, str) and v)
    return next(found, None)


def _values(source: Any, name: str) -> Iterator[Any]:
    """What a dictionary's `cfg.metadata`, `cfg` and itself say."""
    cfg = getattr(source, "cfg", None)
    for holder in (getattr(cfg, "metadata", None), cfg, source):
        yield holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
