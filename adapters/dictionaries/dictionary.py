"""A sparse dictionary: a direction per latent, and how strongly a vector holds each of them.

>>> sae = load_dictionary("path/to/sae")            # nla_lens.adapters.sae
>>> sae.rows([7560, 12])                             # [2, d], and no more than that is read
>>> sae.decode(sae.encode(x))                        # [n, d]

With x [d] the vector, f [d_sae] the latents and W_dec [d_sae, d] the directions:

    pre = (x - b_dec) W_enc + b_enc         x - 0 where `apply_b_dec_to_input` is false
    f   = act(pre)
    x^  = f W_dec + b_dec

    relu      act(p) = max(p, 0)
    jumprelu  act(p) = max(p, 0) where p > threshold, else 0     (arXiv 2407.14435, eq. 4)
    topk      the k largest of max(p, 0), the rest 0             (arXiv 2406.04093, eq. 2)
    gated     max(pre e^r_mag + b_mag, 0) where pre + b_gate > 0 (arXiv 2404.16014, eq. 6-7)

BatchTopK (arXiv 2412.06410) is jumprelu with one threshold once it is trained. With
`scale_by_decoder_norm`, f is measured in units of the directions' lengths: f_i = act(pre)_i
||W_dec_i||, and that is what k is chosen among and, with `threshold_by_decoder_norm`, what is
compared with the threshold; decoding divides by it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.adapters.dictionaries.stored_tensors import StoredTensor
from nla_lens.checks import is_int
from nla_lens.errors import NLAError

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What is computed with; of others the scales are elsewhere."""
_SCANNED: Final = 256 << 20
_ROWS_AT_ONCE: Final = 1024
_NEEDED: Final = {
    "relu": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


@dataclass(frozen=True)
class DictionaryConfig:
    """What a dictionary is; the names are those of SAELens' `cfg` where it has them.

    Attributes:
        format: Whose file format it came in.
        architecture: `relu`, `jumprelu`, `topk` or `gated`.
        d_in: Width of the vectors.
        d_sae: Number of latents.
        hook_name: Where it reads, TransformerLens' spelling; None when not known.
        model_name: The model it reads, as the files name it; None when they do not.
        k: With `topk`, how many latents there are at once.
        apply_b_dec_to_input: Whether b_dec is subtracted before encoding.
        scale_by_decoder_norm: Whether latents are in units of the directions' lengths.
        threshold_by_decoder_norm: Whether the threshold is in those units, too.
    """

    format: str
    architecture: str
    d_in: int
    d_sae: int
    hook_name: str | None = None
    model_name: str | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = False
    scale_by_decoder_norm: bool = False
    threshold_by_decoder_norm: bool = False

    def __post_init__(self) -> None:
        """Raises:
        NLAError: The files say a place or a model that is no name.
        """
        for name in ("hook_name", "model_name"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise NLAError(f"{name} in the dictionary's config is {value!r:.80}, no name")

    @property
    def metadata(self) -> SimpleNamespace:
        """`hook_name` and `model_name`, where SAELens 6 has them."""
        return SimpleNamespace(hook_name=self.hook_name, model_name=self.model_name)


@dataclass(frozen=True)
class Matrix:
    """A stored matrix and which way round it lies.

    Attributes:
        stored: The tensor in the file.
        latents_first: Whether it is `[d_sae, d]` rather than `[d, d_sae]`.
    """

    stored: StoredTensor
    latents_first: bool

    def check(self, d_in: int, d_sae: int) -> None:
        """Raises an NLAError if it has another shape; names a transposed one as such."""
        due = (d_sae, d_in) if self.latents_first else (d_in, d_sae)
        found, name = self.stored.shape, self.stored.name
        if found == due:
            return
        turned = " It is transposed." if found == due[::-1] else ""
        raise NLAError(
            f"{name} in {self.stored.path} has shape {list(found)}, expected {list(due)} for "
            f"{d_sae} latents of width {d_in}.{turned} Get the file again, or bring it into its "
            "format's layout"
        )

    def latents(self, indices: Sequence[int]) -> Tensor:
        """`[len(indices), d]` float32, read from the file as it is needed."""
        return self.stored.rows(indices) if self.latents_first else self.stored.columns(indices)

    def whole(self) -> Tensor:
        """`[d_sae, d]` float32; a view of the file where it can be."""
        whole = self.stored.whole()
        return whole if self.latents_first else whole.T


@dataclass(frozen=True)
class Dictionary:
    """A dictionary in files, read as it is needed.

    Attributes:
        cfg: What it is.
        encoder: `W_enc`.
        decoder: `W_dec`.
        vectors: The one-dimensional parameters by their SAELens names, float32: `b_dec` `[d]`;
            `b_enc`, `threshold`, `b_gate`, `b_mag`, `r_mag` `[d_sae]`.
    """

    cfg: DictionaryConfig
    encoder: Matrix
    decoder: Matrix
    vectors: Mapping[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        """Raises:
        NLAError: A parameter is missing, has another shape, or holds NaN or infinity. Large files
            are looked through as they are read; up to 256 MB at once.
        """
        cfg = self.cfg
        for matrix in (self.encoder, self.decoder):
            matrix.check(cfg.d_in, cfg.d_sae)
            if matrix.stored.mapped.nbytes <= _SCANNED:
                matrix.stored.scan()
        for name in ("b_dec", *_NEEDED[cfg.architecture]):
            if name not in self.vectors:
                raise NLAError(
                    f"{self.decoder.stored.path} has no {name}, which a {cfg.architecture} "
                    "dictionary needs"
                )
        if cfg.architecture == "topk" and not (is_int(cfg.k) and 0 < int(cfg.k or 0) <= cfg.d_sae):
            raise NLAError(
                f"{self.decoder.stored.path}: k={cfg.k!r:.80} of a topk dictionary must be an "
                f"integer from 1 to {cfg.d_sae}, the number of its latents; see its config"
            )

    def __repr__(self) -> str:
        cfg = self.cfg
        return (
            f"Dictionary({cfg.format}, {cfg.architecture}, d_in={cfg.d_in}, d_sae={cfg.d_sae}, "
            f"hook={cfg.hook_name!r})"
        )

    @property
    def hook_name(self) -> str | None:
        """Where it reads, TransformerLens' spelling; None when not known."""
        return self.cfg.hook_name

    @property
    def W_dec(self) -> Tensor:
        """The directions, `[d_sae, d]` float32."""
        return self.decoder.whole()

    @property
    def W_enc(self) -> Tensor:
        """The encoder, `[d, d_sae]` float32."""
        return self.encoder.whole().T

    @property
    def b_dec(self) -> Tensor:
        """The decoder's bias, `[d]` float32."""
        return self.vectors["b_dec"]

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Decoder rows `[n, d]` float32; reads these rows from the file and nothing else.

        Raises:
            NLAError: No such latent, or NaN or infinity in a row.
        """
        return self.decoder.latents(check_indices(indices, self.cfg.d_sae))

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., d_sae]` float32 of vectors `[..., d]`.

        Raises:
            NLAError: No tensor of numbers, another width, NaN or infinity.
        """
        cfg, given = self.cfg, self.vectors
        x = _single(x, "vectors", cfg.d_in)
        if cfg.apply_b_dec_to_input:
            x = x - given["b_dec"]
        pre = torch.nn.functional.linear(x, self.encoder.whole())
        if cfg.architecture == "gated":
            magnitude = torch.relu(pre * given["r_mag"].exp() + given["b_mag"])
            return self._scaled(magnitude * (pre + given["b_gate"] > 0))
        pre = pre + given["b_enc"]
        if cfg.threshold_by_decoder_norm:
            acts = self._scaled(torch.relu(pre))
            return acts * (acts > given["threshold"])
        if cfg.architecture == "jumprelu":
            return self._scaled(torch.relu(pre) * (pre > given["threshold"]))
        if cfg.architecture == "topk":
            top = self._scaled(torch.relu(pre)).topk(int(cfg.k or 0), dim=-1)
            return torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
        return self._scaled(torch.relu(pre))

    def _scaled(self, acts: Tensor) -> Tensor:
        return acts * self._lengths if self.cfg.scale_by_decoder_norm else acts

    def decode(self, latents: Tensor) -> Tensor:
        """Vectors `[..., d]` float32 of latents `[..., d_sae]`; reads the active rows alone.

        Raises:
            NLAError: No tensor of numbers, another number of latents, NaN or infinity.
        """
        latents = _single(latents, "latents", self.cfg.d_sae)
        flat = latents.reshape(-1, latents.shape[-1])
        active = flat.ne(0).any(0).nonzero()[:, 0].tolist()
        if self.cfg.scale_by_decoder_norm:
            # A row of zeros adds nothing, however active it is said to be.
            flat = flat / self._lengths.where(self._lengths > 0, 1.0)
        out = self.b_dec.expand(len(flat), -1).clone()
        for start in range(0, len(active), _ROWS_AT_ONCE):
            part = active[start : start + _ROWS_AT_ONCE]
            out += flat[:, part] @ self.rows(part)
        return out.reshape(*latents.shape[:-1], self.cfg.d_in)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions `[..., d]` float32 of vectors `[..., d]`."""
        return self.decode(self.encode(x))

    __call__ = forward

    @cached_property
    def _lengths(self) -> Tensor:
        """`||W_dec_i||`, `[d_sae]`."""
        return self.W_dec.norm(dim=-1)


def _single(given: Any, what: str, width: int) -> Tensor:
    """A caller's tensor, float32 on the CPU.

    Raises:
        NLAError: No tensor of real numbers, another width, NaN or infinity.
    """
    if not isinstance(given, Tensor) or given.is_complex() or given.device.type == "meta":
        kind = f"{given.dtype} on {given.device}" if isinstance(given, Tensor) else type(given)
        raise NLAError(f"{what} are {kind}; expected a tensor [..., {width}] of real numbers")
    if not given.ndim or given.shape[-1] != width:
        raise NLAError(
            f"{what} have shape {tuple(given.shape)}; this dictionary expects [..., {width}]"
        )
    single = given.detach().to("cpu", torch.float32)
    if not single.isfinite().all():
        raise NLAError(f"{what} hold NaN or infinity, or more than float32 can")
    return single


def check_indices(indices: Any, d_sae: int) -> list[int]:
    """One latent index, or several, as plain integers.

    Raises:
        NLAError: No integer, or not from 0 to d_sae - 1.
    """
    # Of arrays and tensors the entries are no integers.
    given = indices.tolist() if hasattr(indices, "tolist") else indices
    if isinstance(given, (str, bytes)) or not (is_int(given) or isinstance(given, Iterable)):
        raise NLAError(
            f"latents are {given!r:.80}; expected an integer from 0 to {d_sae - 1}, or several"
        )
    listed = [given] if is_int(given) else list(given)
    for index in listed:
        if not is_int(index) or not 0 <= index < d_sae:
            raise NLAError(
                f"latent {index!r:.80} does not exist: the dictionary has latents 0 to {d_sae - 1}"
            )
    return [int(i) for i in listed]
