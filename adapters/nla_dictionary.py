"""The NLA with a dictionary's verbs, for code that was written for sparse autoencoders.

>>> as_sae = NLADictionary(nla)
>>> as_sae.cfg.hook_name, as_sae.cfg.d_in
>>> as_sae.decode(as_sae.encode(x))                  # the latents are texts
>>> run_with_nla(model, tokens, nla)                 # logits with AR(AV(x)) spliced in

AR(text) is a direction. What is spliced in has the length of the vector it stands for: a dictionary
would keep the length in its activations, and a text does not say it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nla_lens.adapters.transformer_bridge import as_source
from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.frameworks import check_fit
from nla_lens.injection import norms, unit
from nla_lens.nla import NLA
from nla_lens.residual import ResidualTensor
from nla_lens.vectors import check_vectors

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


def run_with_nla(
    model: Any,
    tokens: Any,
    nla: NLA | NLADictionary,
    *,
    positions: int | slice | Sequence[int] | None = None,
    edit: Edit | None = None,
    keep_error: bool = False,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Runs a TransformerLens model with AR(AV(x)) in place of the residual the NLA reads.

    What `run_with_saes` of SAELens is for a dictionary. Nothing stays attached.

    Args:
        model: A TransformerBridge or HookedTransformer, the NLA's source model.
        tokens: What the model takes: a string, or token ids `[B, T]`. Rows that are padded must
            leave padding out of `positions`.
        nla: The NLA.
        positions: Which positions are replaced; None is all of them. The first one is often of a
            length nothing else has, and its text says little.
        edit: Changes each text before it is reconstructed.
        keep_error: Keep what the NLA misses; see `NLADictionary.forward`.
        options: Those of `NLA.explain`.
        **kwargs: Those of the model's forward, for instance `return_type`.

    Returns:
        What the model's forward returns.

    Raises:
        NLAError: Another width, too few blocks, centred weights, or a position there is not.
    """
    dictionary = nla if isinstance(nla, NLADictionary) else NLADictionary(nla, **(options or {}))
    what = f"this {type(model).__name__}"
    # Refuses other classes, and weights whose residual stream is another one.
    as_source(model, getattr(model, "tokenizer", None) or "none")
    check_fit(dictionary.nla, d_model=model.cfg.d_model, n_blocks=model.cfg.n_layers, what=what)

    def splice(resid_BTD: Tensor, hook: Any) -> Tensor:
        at = _columns(positions, resid_BTD.shape[1])
        out_BTD = resid_BTD.clone()
        spliced = dictionary.forward(resid_BTD[:, at], edit=edit, keep_error=keep_error)
        out_BTD[:, at] = spliced
        return out_BTD

    with torch.no_grad():
        return model.run_with_hooks(
            tokens, fwd_hooks=[(dictionary.cfg.hook_name, splice)], **kwargs
        )


def _columns(positions: int | slice | Sequence[int] | None, n_tokens: int) -> list[int]:
    """Positions as indices from 0.

    Raises:
        NLAError: A position the text does not have.
    """
    if positions is None:
        return list(range(n_tokens))
    if isinstance(positions, slice):
        return list(range(n_tokens))[positions]
    listed: list[Any] = [positions] if isinstance(positions, int) else list(positions)
    for position in listed:
        if not is_int(position) or not -n_tokens <= position < n_tokens:
            raise NLAError(f"position {position!r} does not exist: there are {n_tokens} tokens")
    return [int(p) % n_tokens for p in listed]


def _plain(x: Tensor) -> Tensor:
    return x.as_ordinary() if isinstance(x, ResidualTensor) else x
