"""TransformerLens: `.explain()` on what `run_with_cache` returns.

>>> with nla_lens.attach(model, nla):
...     logits, cache = model.run_with_cache(prompt)
>>> cache["resid_post", 20][0, -1].explain()

Serves TransformerBridge (3.x, 4.x) and HookedTransformer (2.x, 3.x). Attaching shadows
`run_with_cache` on the one instance and nothing else: the run itself is TransformerLens' own, and
what comes back is viewed, not copied.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.extraction import token_text
from nla_lens.frameworks import Probe, check_fit
from nla_lens.hook_point import ResidPost
from nla_lens.nla import NLA
from nla_lens.residual import Origin, ResidualTensor, locate

_ROWS_LOOKED_AT = 256
_CENTRED = 1e-4


def attach(model: Any, nla: NLA) -> Probe:
    """Attaches an NLA to a TransformerBridge or HookedTransformer.

    Args:
        model: The model whose residual stream the NLA reads.
        nla: The NLA.

    Raises:
        NLAError: Another width, weights centred when they were loaded, or a probe already there.
    """
    if "run_with_cache" in vars(model):
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
    # Into __dict__ itself: TransformerBridge forwards some attribute writes to the wrapped model.
    vars(model)["run_with_cache"] = _recording(model, nla)
    return Probe(model, nla, undo=lambda: vars(model).pop("run_with_cache", None))


def as_source(model: Any, tokenizer: Any = None) -> TransformerLensSource:
    """The model as a source of residual vectors for `nla_lens.extract`."""
    return TransformerLensSource(model, tokenizer)


class TransformerLensSource:
    """Reads the residual stream by `run_with_cache` with `stop_at_layer`.

    Attributes:
        tokenizer: The model's own, or the caller's.
        is_whole: TransformerLens models have all their blocks.
    """

    is_whole = True

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        """Raises:
        NLAError: There is no tokenizer.
        """
        self.model = model
        self.tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        if self.tokenizer is None:
            raise NLAError(f"this {type(model).__name__} has no tokenizer; pass tokenizer=")

    def check_place(self, place: ResidPost) -> None:
        """Raises an NLAError if there is no such block."""
        if place.layer >= self.model.cfg.n_layers:
            raise NLAError(
                f"layer {place.layer} does not exist: the model has "
                f"{self.model.cfg.n_layers} blocks"
            )

    @torch.inference_mode()
    def resid(self, ids_BT: Tensor, place: ResidPost) -> Tensor:
        """`[B, T, d]`; blocks after `place.layer` do not run."""
        _, cache = type(self.model).run_with_cache(
            self.model,
            ids_BT.to(self.model.cfg.device),
            return_type=None,
            return_cache_object=False,
            names_filter=place.name,
            stop_at_layer=place.n_blocks,
        )
        resid_BTD: Tensor = cache[place.name]
        return resid_BTD

    @torch.inference_mode()
    def go_on(self, ids: Sequence[int], n: int) -> list[int]:
        """Argmax continuation, without a cache: the same in every TransformerLens version."""
        grown = list(ids)
        for _ in range(n):
            ids_BT = torch.tensor([grown], device=self.model.cfg.device)
            chosen = int(self.model(ids_BT, return_type="logits")[0, -1].float().argmax())
            if chosen == self.tokenizer.eos_token_id:
                break
            grown.append(chosen)
        return grown[len(ids) :]


def _recording(model: Any, nla: NLA) -> Callable[..., Any]:
    """`run_with_cache` whose residual entries know where they came from."""
    original = type(model).run_with_cache

    @functools.wraps(original)
    def run_with_cache(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        with _tokens_seen(model) as seen:
            output, cache = original(model, *args, **kwargs)
        entries = getattr(cache, "cache_dict", cache)
        to_token = None if model.tokenizer is None else token_text(model.tokenizer)
        _wrap_entries(entries, nla, to_token, _Where(model, seen, args, kwargs))
        return output, cache

    return run_with_cache


@contextlib.contextmanager
def _tokens_seen(model: Any) -> Iterator[list[Tensor]]:
    """Token ids as they reach the embedding: after BOS, padding and truncation."""
    seen: list[Tensor] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        found = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if found is not None and not found.is_floating_point():
            seen.append(found)

    handle = model.embed.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _wrap_entries(
    entries: MutableMapping[str, Any],
    nla: NLA,
    to_token: Callable[[int], str] | None,
    where: _Where,
) -> None:
    for name, value in entries.items():
        if ResidPost.find(name) is None or not isinstance(value, Tensor):
            continue
        where_LX3 = where.of(value)
        # An entry of another shape than the tokens is left as it is.
        if where_LX3 is not None and where_LX3.shape[:-1] == value.shape[:-1]:
            entries[name] = ResidualTensor.wrap(value, Origin(name, where_LX3, to_token, nla))


class _Where:
    """Rows, positions and tokens of one run's cached residuals, worked out when first needed."""

    def __init__(self, model: Any, seen: list[Tensor], args: Any, kwargs: dict[str, Any]) -> None:
        self._model, self._kwargs = model, kwargs
        self._input = args[0] if args else kwargs.get("input")
        # From start_at_layer on the input is a residual; whatever was embedded was not it.
        self._ids_BT = seen[0] if seen and kwargs.get("start_at_layer") is None else None
        self._found: Tensor | None = None

    def of(self, entry: Tensor) -> Tensor | None:
        """`[*leading, 3]` for a cached entry."""
        if self._found is None:
            self._found = self._locate(entry)
        if self._found is None:
            return None
        return self._found[0] if entry.ndim == 2 else self._found

    def _locate(self, entry: Tensor) -> Tensor | None:
        if self._ids_BT is None or self._ids_BT.ndim != 2:
            return None
        where_BT3 = locate(self._ids_BT, self._attention_mask(self._ids_BT))
        where_BT3[..., 1] += self._cached_before()
        return _sliced(where_BT3, self._kwargs.get("pos_slice"))

    def _cached_before(self) -> int:
        past = self._kwargs.get("past_kv_cache")
        return 0 if past is None else int(past[0].past_keys.shape[1])

    def _attention_mask(self, ids_BT: Tensor) -> Tensor | None:
        """Which tokens are real; only a batch, or a caller's own mask, can have padding."""
        given = self._kwargs.get("attention_mask")
        if given is not None:
            return given[:, -ids_BT.shape[1] :]
        if len(ids_BT) == 1 or self._model.tokenizer is None:
            return None
        side = self._kwargs.get("padding_side")
        tokenizer = self._model.tokenizer
        kept = tokenizer.padding_side
        try:
            # The function of 2.18 takes no side of its own.
            tokenizer.padding_side = side if side in ("left", "right") else kept
            mask: Tensor = _tool("get_attention_mask")(
                tokenizer, ids_BT, bool(self._model.cfg.default_prepend_bos)
            )
        finally:
            tokenizer.padding_side = kept
        return mask


def _sliced(where_BT3: Tensor, pos_slice: Any) -> Tensor:
    """Applies run_with_cache's `pos_slice` to what is known of the positions."""
    if pos_slice is None:
        return where_BT3
    sliced: Tensor = _tool("Slice").unwrap(pos_slice).apply(where_BT3, dim=1)
    return sliced


def _tool(name: str) -> Any:
    """One of TransformerLens' own helpers: in `utils` up to 3.x, in `utilities` from 3.x on."""
    for module in ("utilities", "utils"):
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(f"transformer_lens.{module}"), name, None)
            if found is not None:
                return found
    raise NLAError(f"this version of TransformerLens has no {name}; 2.18, 3.9 and 4.x are tested")


def _refuse_centred(model: Any) -> None:
    """Refuses centred writing weights: they take each residual vector's mean away.

    Folding a norm's weights, or rotating value and key biases into others, leaves it as it is.

    Raises:
        NLAError: Every embedding row has mean zero.
    """
    embed_VD = model.W_E.detach()[:_ROWS_LOOKED_AT].float()
    means, sizes = embed_VD.mean(-1).abs(), embed_VD.std(-1)
    if bool((means <= _CENTRED * sizes).all()) and bool((sizes > 0).any()):
        raise NLAError(
            f"the weights of this {type(model).__name__} were centred (center_writing_weights): "
            "its residual stream is not the one the NLA was trained on. Load it with "
            "center_writing_weights=False, or from_pretrained_no_processing"
        )
