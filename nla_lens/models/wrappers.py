"""What people put around a transformers model, and how the model inside is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nla_lens.errors import NLAError


def unwrapped(model: Any) -> Any:
    """The transformers model inside of PEFT, DataParallel, torch.compile or a module of the user's.

    Active adapters stay active: PEFT keeps them in the layers of the model inside. What a wrapper
    adds before or behind the model does not act on its residual stream.

    Raises:
        NLAError: None inside, several, or a PEFT model whose adapter is not in the layers.
    """
    if not isinstance(model, nn.Module):
        raise NLAError(f"a {type(model).__name__} is no torch module with decoder blocks")
    if is_transformers(model):
        return model
    _refuse_virtual_tokens(model)
    inside = list(_outermost(model))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise NLAError(
            f"{type(model).__name__} holds {len(inside)} transformers models "
            f"({', '.join(type(found).__name__ for found in inside)}); pass the one that is meant"
        )
    raise NLAError(
        f"no decoder blocks found in {type(model).__name__}: there is no transformers model in it"
    )


def is_transformers(model: Any) -> bool:
    """Whether something is a transformers model, foreign code's included."""
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    seen: set[int] = set()
    for child in module.children():
        for found in [child] if is_transformers(child) else _outermost(child):
            if id(found) not in seen:
                seen.add(id(found))
                yield found


def _refuse_virtual_tokens(model: Any) -> None:
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        active = getattr(module, "active_adapters", None) or ()
        if not isinstance(configs, dict) or not isinstance(active, (list, tuple)):
            continue
        for name in active:
            config: Any = configs.get(name)
            if getattr(config, "is_prompt_learning", False):
                kind = getattr(config.peft_type, "value", config.peft_type)
                raise NLAError(
                    f"the adapter {name!r} of this {type(module).__name__} is {kind}: it acts by "
                    "virtual tokens and not in the layers, so it has no residual stream of its "
                    "own; disable it, or pass get_base_model()"
                )
