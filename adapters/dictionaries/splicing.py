"""AR(AV(x)) in place of the residual x, in a forward pass: what the NLA keeps of it, and what not.

>>> logits = run_with_nla(model, tokens, nla)                            # TransformerLens
>>> logits = run_with_nla(model, tokens, nla, keep_error=True, edit=f)   # only what f changes
>>> output = run_with_nla(nnsight_model, tokens, nla)                    # nnsight, in this process

What `run_with_saes` of SAELens is for a dictionary. Nothing stays attached to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nla_lens.adapters.dictionaries.nla_dictionary import Edit, NLADictionary
from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, width_of
from nla_lens.models.passes import OwnPass
from nla_lens.models.turns import turn
from nla_lens.nla import NLA
from nla_lens.stream.explainer import check_fit


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
    """Runs a model with AR(AV(x)) in place of the residual the NLA reads.

    Args:
        model: A TransformerBridge, HookedTransformer or nnsight model, the NLA's source model.
        tokens: What the model takes: a string, or token ids `[B, T]`. Of padded rows `positions`
            must leave the padding out.
        nla: The NLA.
        positions: Which positions are replaced; None is all of them. The first one is often of a
            length nothing else has, and its text says little.
        edit: Changes each text before it is reconstructed.
        keep_error: Keep what the NLA misses; see `NLADictionary.forward`.
        options: Those of `NLA.explain`.
        **kwargs: Those of the model's forward, for instance `return_type`; of nnsight's `trace`.

    Returns:
        What the model's forward returns; of nnsight its saved output.

    Raises:
        NLAError: Another kind of model, another width, too few blocks, centred weights, or a
            position there is not.
    """
    dictionary = nla if isinstance(nla, NLADictionary) else NLADictionary(nla, **(options or {}))

    def splice(resid_BTD: Tensor) -> Tensor:
        at = _columns(positions, resid_BTD.shape[1])
        out_BTD = resid_BTD.clone()
        out_BTD[:, at] = dictionary.forward(resid_BTD[:, at], edit=edit, keep_error=keep_error)
        return out_BTD

    packages = {base.__module__.split(".")[0] for base in type(model).__mro__}
    run = _in_nnsight if "nnsight" in packages else _in_transformer_lens
    with torch.no_grad():
        return run(model, tokens, dictionary, splice, kwargs)


def _in_transformer_lens(
    model: Any,
    tokens: Any,
    dictionary: NLADictionary,
    splice: Callable[..., Tensor],
    kwargs: dict[str, Any],
) -> Any:
    from nla_lens.adapters.transformer_bridge import as_source

    # Refuses other classes, and weights whose residual stream is another one.
    as_source(model, getattr(model, "tokenizer", None) or "none")
    what = f"this {type(model).__name__}"
    check_fit(dictionary.nla, d_model=model.cfg.d_model, n_blocks=model.cfg.n_layers, what=what)
    # Not by `run_with_hooks`, whose hooks act on other threads' passes, too.
    with OwnPass(model) as own_pass:
        point = model.hook_dict[dictionary.cfg.hook_name]
        own_pass.hook(point, lambda _, args, resid_BTD: splice(resid_BTD))
        return model(tokens, **kwargs)


def _in_nnsight(
    model: Any,
    tokens: Any,
    dictionary: NLADictionary,
    splice: Callable[..., Tensor],
    kwargs: dict[str, Any],
) -> Any:
    from nla_lens.adapters.nnsight_parts import envoy_of, text_stack
    from nla_lens.engines.local.nnsight_threads import let_threads

    if kwargs.get("remote"):
        raise NLAError("the NLA runs in this process: splicing works without remote=True only")
    stack = text_stack(model)
    layer = dictionary.nla.spec.layer or 0
    what = f"this {type(model).__name__}"
    d_model, n_blocks = width_of(stack), len(blocks_of(stack))
    check_fit(dictionary.nla, d_model=d_model, n_blocks=n_blocks, what=what)
    block = envoy_of(model, blocks_of(stack)[layer])
    let_threads(model)
    with turn(stack), model.trace(tokens, **kwargs):
        output = block.output
        # Blocks give a tensor in some versions of transformers, a tuple in others.
        is_tuple = isinstance(output, tuple)
        spliced = splice(output[0] if is_tuple else output)
        block.output = (spliced, *output[1:]) if is_tuple else spliced
        saved = model.output.save()
    return saved  # noqa: RET504 - what a trace saves is bound when it ends


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
