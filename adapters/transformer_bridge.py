"""TransformerLens: `.explain()` on what `run_with_cache` returns.

>>> with nla_lens.attach(model, nla):
...     logits, cache = model.run_with_cache(prompt)
>>> cache["resid_post", 20][0, -1].explain()

Serves TransformerBridge (3.x, 4.x) and HookedTransformer (2.x, 3.x). Attaching shadows
`run_with_cache` and `forward` on the one instance: the run itself is TransformerLens' own, and what
comes back is viewed, not copied. For hooks see `nla_lens.adapters.transformer_bridge_live`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from nla_lens.adapters.transformer_bridge_live import Live
from nla_lens.adapters.transformer_bridge_run import Run
from nla_lens.adapters.transformer_bridge_steering import patched_point, watched_model
from nla_lens.adapters.transformer_bridge_tokenizer import plain_tokenizer
from nla_lens.engines.local.transformer_lens import let_attention_find_its_cache, resid_post
from nla_lens.errors import NLAError
from nla_lens.models.block_reader import may_cut
from nla_lens.models.passes import OwnPass, stack_of
from nla_lens.models.tokens import find_eos_ids
from nla_lens.models.turns import turn
from nla_lens.nla import NLA
from nla_lens.stream.explainer import check_fit
from nla_lens.stream.frameworks import Probe
from nla_lens.stream.hook_point import ResidPost, residual_names
from nla_lens.stream.origin import Origin
from nla_lens.stream.residual import ResidualTensor

_METHOD = "run_with_cache"
_ROWS_LOOKED_AT = 256
# In units of what chance gives, 1/sqrt(d_model): centred rows have 1e-6 of it in float32 and 1e-3
# in bfloat16, rows of models that were not centred about 1.
_CENTRED = 0.03


def attach(model: Any, nla: NLA) -> Probe:
    """Attaches an NLA to a TransformerBridge or HookedTransformer.

    Args:
        model: The model whose residual stream the NLA reads.
        nla: The NLA.

    Raises:
        NLAError: No such model, another width, weights centred when they were loaded, or a probe
            already there.
    """
    _check_kind(model)
    own = vars(model)
    if _METHOD in own:
        raise NLAError(
            f"this {type(model).__name__} has a probe already (or a replaced run_with_cache); "
            "detach it first"
        )
    check_fit(
        nla,
        d_model=model.cfg.d_model,
        n_blocks=model.cfg.n_layers,
        what=f"this {type(model).__name__}",
    )
    _refuse_centred(model)
    live = Live(model, nla)
    shadows = _shadows(model, nla, live)
    own.update(shadows)
    # What is recorded behind a cache has to be what the model computes there.
    bridged = hasattr(model, "original_model")
    handles = let_attention_find_its_cache(model) if bridged else []

    def undo() -> None:
        for handle in handles:
            handle.remove()
        live.undo()
        for name, shadow in shadows.items():
            if own.get(name) is shadow:
                del own[name]

    return Probe(model, nla, undo)


def _shadows(model: Any, nla: NLA, live: Live) -> dict[str, MethodType]:
    """What attaching puts into the model's `__dict__`.

    Bound methods, so that a deep copy of the model runs itself and not the original.
    """
    cls = type(model)
    functions = {_METHOD: _recording(cls, nla, live)}
    if "forward" not in vars(model):
        functions["forward"] = _running(cls, live)
    return {name: MethodType(function, model) for name, function in functions.items()}


def as_source(model: Any, tokenizer: Any = None) -> TransformerLensSource:
    """The model as a source of residual vectors for `nla_lens.extract`."""
    _check_kind(model)
    _refuse_centred(model)
    return TransformerLensSource(model, tokenizer)


def size_of(model: Any) -> tuple[int, int]:
    """Width and number of blocks of a model that can be steered.

    Raises:
        NLAError: Of another class, or with centred weights.
    """
    _check_kind(model)
    _refuse_centred(model)
    return model.cfg.d_model, model.cfg.n_layers


patched, watched = patched_point, watched_model
"""See `nla_lens.stream.patching`."""


class TransformerLensSource:
    """Reads the residual stream at its hook points, in a pass that ends there.

    Attributes:
        tokenizer: The model's own, or the caller's; see `transformer_bridge_tokenizer`.
        is_whole: TransformerLens models have all their blocks.
    """

    is_whole = True

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        """Raises:
        NLAError: There is no tokenizer.
        """
        self.model = model
        self.tokenizer = tokenizer if tokenizer is not None else plain_tokenizer(model.tokenizer)
        if self.tokenizer is None:
            raise NLAError(f"this {type(model).__name__} has no tokenizer; pass tokenizer=")

    @property
    def ignores_what_follows(self) -> bool:
        """Whether texts may be cut and padded on the right."""
        return may_cut(self.model, self.model.cfg.d_model)

    @property
    def table_rows(self) -> int:
        """How many tokens it knows."""
        return int(self.model.cfg.d_vocab)

    def check_place(self, place: ResidPost) -> None:
        """Raises an NLAError if there is no such block."""
        if place.layer >= self.model.cfg.n_layers:
            raise NLAError(
                f"layer {place.layer} does not exist: the model has "
                f"{self.model.cfg.n_layers} blocks"
            )

    def resid(self, ids_BT: Tensor, place: ResidPost) -> Tensor:
        """`[B, T, d]`; blocks after `place.layer` do not run."""
        return resid_post(self.model, place, ids_BT)

    @torch.inference_mode()
    def go_on(self, ids: Sequence[int], n: int) -> list[int]:
        """Argmax continuation, without a cache: the same in every TransformerLens version."""
        ends, grown = self._eos_ids(), list(ids)
        for _ in range(n):
            ids_BT = torch.tensor([grown], device=self.model.cfg.device)
            with OwnPass(self.model):
                chosen = int(self.model(ids_BT, return_type="logits")[0, -1].float().argmax())
            if chosen in ends:
                break
            grown.append(chosen)
        return grown[len(ids) :]

    def _eos_ids(self) -> frozenset[int | None]:
        # A HookedTransformer keeps nothing of the generation_config.
        wrapped = getattr(self.model, "original_model", None)
        if wrapped is None:
            return frozenset([self.tokenizer.eos_token_id])
        return frozenset(find_eos_ids(wrapped))


def _recording(cls: Any, nla: NLA, live: Live) -> Callable[..., Any]:
    """`run_with_cache` whose residual entries know where they came from."""
    original = cls.run_with_cache
    positional = _positional_names(cls)

    @functools.wraps(original)
    def run_with_cache(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        _refuse_centred(model)
        run = Run(model, dict(zip(positional, args, strict=False)) | kwargs)
        # TransformerLens caches whatever passes the model meanwhile, so none of ours may.
        with turn(stack_of(model)), live.caching(run):
            output, cache = original(model, *args, **kwargs)
        names = residual_names(model.cfg.n_layers) | live.dictionary_inputs(model)
        _wrap_entries(getattr(cache, "cache_dict", cache), names, run, nla)
        return output, cache

    return run_with_cache


def _running(cls: Any, live: Live) -> Callable[..., Any]:
    """`forward` whose hooks can explain, and that takes what a probe recorded as its input.

    HookedTransformer insists on a tensor that is of no subclass.
    """
    original = cls.forward
    positional = _names_of(original)

    @functools.wraps(original)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        plain_args = [_ordinary(value) for value in args]
        plain = {name: _ordinary(value) for name, value in kwargs.items()}
        with live.running(model, dict(zip(positional, plain_args, strict=False)) | plain):
            return original(model, *plain_args, **plain)

    return forward


def _ordinary(value: Any) -> Any:
    return value.as_ordinary() if isinstance(value, ResidualTensor) else value


def _positional_names(cls: Any) -> tuple[str, ...]:
    """What positional arguments of `run_with_cache` are called.

    TransformerBridge names its own; HookedTransformer hands them on to `forward`.
    """
    return _names_of(cls.run_with_cache) or _names_of(cls.forward)


def _names_of(method: Any) -> tuple[str, ...]:
    """Names of positional arguments; () where any number of them is taken."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _wrap_entries(
    entries: MutableMapping[str, Any], names: Mapping[str, str], run: Run, nla: NLA
) -> None:
    where_LX3 = run.where()
    if where_LX3 is None:
        return
    leading = where_LX3.shape[:-1]
    # TransformerBridge caches each tensor under two names; it is the same one afterwards, too.
    wrapped: dict[int, ResidualTensor] = {}
    # Looked up by name: the cache has ten times as many entries.
    for key, hook_name in names.items():
        value = entries.get(key)
        if value is None:
            continue
        known = wrapped.get(id(value))
        if known is None:
            # An entry of another shape than the tokens is left as it is.
            if not isinstance(value, Tensor) or value.shape[:-1] != leading:
                continue
            origin = Origin(hook_name, where_LX3, run.to_token, nla)
            known = wrapped[id(value)] = ResidualTensor.wrap(value, origin)
        entries[key] = known


def _check_kind(model: Any) -> None:
    """Raises an NLAError if a model has no token embedding and blocks in this process."""
    if not isinstance(model, nn.Module) or not all(
        hasattr(model, name) for name in (_METHOD, "cfg", "embed", "blocks")
    ):
        raise NLAError(
            f"cannot record the residual stream of a {type(model).__name__}: of TransformerLens' "
            "classes a TransformerBridge or HookedTransformer can be read. Vectors from anywhere "
            "can be given to nla.explain"
        )


def _refuse_centred(model: Any) -> None:
    """Refuses centred writing weights: they take each residual vector's mean away.

    Folding a norm's weights, or rotating value and key biases into others, leaves it as it is.

    Raises:
        NLAError: Every embedding row has mean zero.
    """
    # Of models with RMSNorm TransformerLens centres none, whatever it is asked.
    if "RMS" in str(model.cfg.normalization_type):
        return
    embed_VD = model.W_E.detach()[:_ROWS_LOOKED_AT].float()
    mean, spread = (x.square().mean().sqrt() for x in (embed_VD.mean(-1), embed_VD.std(-1)))
    if mean <= _CENTRED * spread / embed_VD.shape[-1] ** 0.5 and spread > 0:
        raise NLAError(
            f"the weights of this {type(model).__name__} were centred (center_writing_weights): "
            "its residual stream is not the one the NLA was trained on. Load it with "
            "center_writing_weights=False, or from_pretrained_no_processing"
        )
