"""`NLA.from_pretrained`, step by step: everything small is checked before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_lens.checkpoint import open_checkpoint
from nla_lens.checks import naming
from nla_lens.engines import Placement, load_reconstructor_engine, load_verbalizer_engine
from nla_lens.errors import NLAError
from nla_lens.hf import load_tokenizer
from nla_lens.reconstructor import Reconstructor, check_prompt, load_head
from nla_lens.spec import build_spec
from nla_lens.verbalizer import Verbalizer, canonical_prompt


@dataclass(frozen=True)
class Request:
    """What a caller of `from_pretrained` asked for; see there."""

    av: str | Path
    ar: str | Path | None
    placement: Placement
    revision: str | None = None
    injection: str | None = None
    injection_scale: float | None = None
    layer: int | None = None
    engine: str = "transformers"


def load_halves(request: Request) -> tuple[Verbalizer, Reconstructor | None]:
    """Loads what was asked for.

    Raises:
        NLAError: Not found, not an NLA, incomplete or contradictory.
    """
    av = open_checkpoint(request.av, revision=request.revision)
    ar = None if request.ar is None else open_checkpoint(request.ar, revision=request.revision)
    spec = build_spec(
        av,
        ar,
        injection=request.injection,
        injection_scale=request.injection_scale,
        layer=request.layer,
    )
    foreign_code = request.placement.trust_remote_code
    tokenizer = load_tokenizer(av.path, trust_remote_code=foreign_code)
    with naming(av.sidecar.path):
        prompt = canonical_prompt(spec, tokenizer)
    reconstructor = None
    if ar is not None:
        ar_tokenizer = load_tokenizer(ar.path, trust_remote_code=foreign_code)
        with naming(ar.sidecar.path):
            check_prompt(spec, ar_tokenizer)
        head = load_head(ar, spec.d_model)
        backbone = load_reconstructor_engine(request.engine, ar, spec, request.placement)
        reconstructor = Reconstructor(spec, ar_tokenizer, backbone, head)
    engine = load_verbalizer_engine(request.engine, av, spec, request.placement)
    return Verbalizer(spec, tokenizer, engine, prompt), reconstructor


def torch_dtype(dtype: Any) -> Any:
    """A torch dtype from its name; anything else is passed on.

    Raises:
        NLAError: Not the name of a floating-point dtype.
    """
    import torch

    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise NLAError(f"dtype={dtype!r} is not a floating-point dtype such as torch.bfloat16")
    return found
