"""`NLA.from_pretrained`, step by step: everything small is checked before any weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nla_lens.checkpoints.centre import load_mean
from nla_lens.checkpoints.chat import canonical_prompt
from nla_lens.checkpoints.fetching import fetch_file
from nla_lens.checkpoints.files import Checkpoint, open_checkpoint
from nla_lens.checkpoints.folders import Name
from nla_lens.checkpoints.layout import HEAD_NAME
from nla_lens.checkpoints.pairs import Bases, open_halves
from nla_lens.checkpoints.spec import build_spec
from nla_lens.checkpoints.template import own_template
from nla_lens.checks import is_int, naming
from nla_lens.engines import (
    is_remote,
    is_served,
    load_reconstructor_engine,
    load_verbalizer_engine,
    per_half,
)
from nla_lens.engines.served.prompt_rows import open_small
from nla_lens.errors import NLAError
from nla_lens.halves.reconstructor import Reconstructor, check_prompt, load_head
from nla_lens.halves.verbalizer import Verbalizer
from nla_lens.models.ambient import undisturbed
from nla_lens.models.placement import Placement
from nla_lens.models.weights import load_tokenizer


@dataclass(frozen=True)
class Request:
    """What a caller of `from_pretrained` asked for; see there."""

    av: Name
    ar: Name | None
    placement: Placement
    revision: str | None = None
    injection: str | None = None
    injection_scale: float | None = None
    layer: int | None = None
    engine: str | Mapping[str, str] = "transformers"
    url: Any = None
    base: Bases = None
    chat_template_kwargs: Mapping[str, Any] | None = None


@undisturbed()
def load_halves(request: Request) -> tuple[Verbalizer, Reconstructor | None, Checkpoint]:
    """Loads what was asked for; the files of the verbalizer come with it.

    Raises:
        NLAError: Not found, not an NLA, incomplete or contradictory.
    """
    engines = per_half(request.engine)
    served = is_served(engines["av"])
    if request.url is not None and not served:
        raise NLAError(f"url= has no meaning with engine={request.engine!r}, only with a server's")
    av, ar = open_halves(
        request.av,
        request.ar,
        bases=request.base,
        opening={half: _opening(request, engines[half]) for half in ("av", "ar")},
    )
    spec = build_spec(
        av,
        ar,
        injection=request.injection,
        injection_scale=request.injection_scale,
        layer=request.layer,
        chat_template_kwargs=request.chat_template_kwargs,
    )
    mean_D = load_mean(av, ar, spec.d_model)
    foreign_code = request.placement.trust_remote_code
    tokenizer = load_av_tokenizer(av, trust_remote_code=foreign_code)
    with naming(av.sidecar.path):
        prompt = canonical_prompt(spec, tokenizer)
    verbalizing = (engines["av"], av, spec, request.placement, request.url)
    # A server costs no memory here, and whether it will do is soon known.
    engine = load_verbalizer_engine(*verbalizing) if served else None
    reconstructor = None
    if ar is not None:
        ar_tokenizer = load_tokenizer(ar.tokenizer_path, trust_remote_code=foreign_code)
        with naming(ar.sidecar.path):
            check_prompt(spec, ar_tokenizer)
        if is_remote(engines["ar"]):
            # Beside the small files that are there already.
            fetch_file(ar, HEAD_NAME)
        head = load_head(ar, spec.d_model)
        backbone = load_reconstructor_engine(engines["ar"], ar, spec, request.placement)
        reconstructor = Reconstructor(
            spec, ar_tokenizer, backbone, head, mean_D, _context_length(ar)
        )
        reconstructor.prompt_ids("x")
    engine = engine or load_verbalizer_engine(*verbalizing)
    verbalizer = Verbalizer(spec, tokenizer, engine, prompt, mean_D, _context_length(av))
    verbalizer.check_ids(prompt.ids)
    return verbalizer, reconstructor, av


def _context_length(checkpoint: Checkpoint) -> int | None:
    found: Any = checkpoint.config.get("max_position_embeddings")
    return int(found) if is_int(found) else None


def load_av_tokenizer(av: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a verbalizer, with the chat template that is its own.

    An adapter's template may lie beside it while its tokenizer is its base's, or the other way
    round.

    Raises:
        NLAError: It cannot be loaded.
    """
    tokenizer = load_tokenizer(av.tokenizer_path, trust_remote_code=trust_remote_code)
    template = own_template(av)
    if template is not None:
        tokenizer.chat_template = template
    elif not tokenizer.chat_template and av.is_adapter and av.base is not None:
        tokenizer.chat_template = load_tokenizer(av.base).chat_template
    return tokenizer


def _opening(request: Request, engine: str) -> Callable[..., Checkpoint]:
    """What opens a half's files; its weights only where it runs here."""
    revision, foreign_code = request.revision, request.placement.trust_remote_code
    if is_remote(engine):
        return partial(open_checkpoint, revision=revision, weights=False)
    opened = open_small if is_served(engine) else open_checkpoint
    return partial(opened, revision=revision, foreign_code=foreign_code)
