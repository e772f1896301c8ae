"""The blocks of an nnsight model, and the envoys around them."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.envoy import Envoy
from torch import nn

from nla_lens.errors import NLAError
from nla_lens.models.anatomy import text_model


def text_stack(model: Any) -> Any:
    """The stack of decoder blocks inside an nnsight model.

    Raises:
        NLAError: An envoy that is not a whole model, or other modules than transformers blocks.
    """
    if not isinstance(model, Envoy) or not isinstance(model._module, nn.Module):
        raise NLAError(f"a {type(model).__name__} is no nnsight model around a torch module")
    if model.parent is not None:
        raise NLAError(
            f"{model.path} is one module of an nnsight model; pass the whole model, "
            f"{model.root.path}"
        )
    stack = text_model(model._module)
    if not hasattr(stack, "config"):
        raise NLAError(f"{type(stack).__name__} is no transformers model: it has no config")
    return stack


def envoy_of(model: Any, module: nn.Module) -> Any:
    """The envoy of a module; modules that two paths lead to have one."""
    for envoy in model.modules():
        if envoy._module is module:
            return envoy
    raise NLAError(f"nnsight wraps no {type(module).__name__} of this model; is it a copy?")
