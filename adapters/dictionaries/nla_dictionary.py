"""The NLA with a dictionary's verbs, for code that was written for sparse autoencoders.

>>> as_sae = NLADictionary(nla)
>>> as_sae.cfg.hook_name, as_sae.cfg.d_in
>>> as_sae.decode(as_sae.encode(x))                  # the latents are texts

Splicing it into a model's forward is in `nla_lens.adapters.dictionaries.splicing`.

AR(text) is a direction. What is spliced in has the length of the vector it stands for: a dictionary
would keep the length in its activations, and a text does not say it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.nla import NLA
from nla_lens.stream.explainer import check_nla
from nla_lens.stream.injection import norms, unit
from nla_lens.stream.residual import ResidualTensor
from nla_lens.stream.vectors import check_vectors

Edit = Callable[[str], str]


@dataclass(frozen=True)
class NLADictionaryConfig:
    """The part of SAELens' `cfg` that an NLA has.

    Attributes:
        d_in: Width of the vectors.
        hook_name: Where the NLA reads.
        model_name: Its source model.
        architecture: `nla`.
    """

    d_in: int
    hook_name: str
    model_name: str | None
    architecture: str = field(default="nla", init=False)

    @property
    def metadata(self) -> SimpleNamespace:
        """`hook_name` and `model_name`, where SAELens 6 has them."""
        return SimpleNamespace(hook_name=self.hook_name, model_name=self.model_name)


class NLADictionary:
    """An NLA as a dictionary whose latents are texts.

    Attributes:
        nla: The NLA.
        cfg: Where it reads, and how wide.
        options: Options of `NLA.explain` for every text.
    """

    def __init__(self, nla: NLA, **options: Any) -> None:
        """Args:
        nla: A pair.
        **options: Those of `NLA.explain`, for instance `max_new_tokens`.

        Raises:
            NLAError: There is no reconstructor, or nobody says which layer is read.
        """
        check_nla(nla)
        if nla.reconstructor is None:
            raise NLAError("this NLA has no reconstructor; load one with ar=")
        if nla.spec.hook_name is None:
            raise NLAError("which layer to read is not known; pass layer= to from_pretrained")
        self.nla, self.options = nla, options
        self.cfg = NLADictionaryConfig(nla.spec.d_model, nla.spec.hook_name, nla.spec.source_model)

    def encode(self, x: Tensor) -> list[str]:
        """Texts of vectors `[..., d]`, in row-major order."""
        return self.nla.encode(_plain(x), **self.options)

    def decode(self, texts: Sequence[str]) -> Tensor:
        """Directions `[n, d]` of texts, float32, as long as the reconstructor makes them."""
        return self.nla.decode(texts)

    def forward(self, x: Tensor, *, edit: Edit | None = None, keep_error: bool = False) -> Tensor:
        """AR(AV(x)), each at the length of its vector; shape, dtype and device of `x`.

        Args:
            x: `[..., d]`.
            edit: Changes each text on the way.
            keep_error: Add `x - AR(AV(x))`, so that without an edit x comes out, and with one only
                what the edit changed is changed.
        """
        batch = check_vectors(_plain(x), self.cfg.d_in)
        texts = self.encode(batch.vectors_ND)
        lengths_N1 = norms(batch.vectors_ND)
        clean_ND = unit(self.decode(texts)) * lengths_N1
        edited = texts if edit is None else [edit(text) for text in texts]
        out_ND = clean_ND if edited == texts else unit(self.decode(edited)) * lengths_N1
        if keep_error:
            out_ND = batch.vectors_ND + (out_ND - clean_ND)
        return out_ND.reshape(x.shape).to(x.device, x.dtype)

    __call__ = forward


def _plain(x: Tensor) -> Tensor:
    return x.as_ordinary() if isinstance(x, ResidualTensor) else x
