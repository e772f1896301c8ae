"""That the outputs of a model's blocks are its residual stream, as its `hidden_states` say.

A family that transformers records by hooks on its blocks says so itself. Of others it is seen in a
pass of six tokens: two rows that differ in their last one.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.errors import NLAError, NLAWarning
from nla_lens.models.anatomy import blocks_of, input_device, text_model, width_of
from nla_lens.models.passes import OwnPass

_proven: weakref.WeakSet[Any] = weakref.WeakSet()
_CAUSAL_WITHIN: Final = 1e-3


def check_stream(model: Any) -> None:
    """Refuses a model of which it is not known that `hidden_states[K + 1]` leaves block K.

    Args:
        model: As for `text_model`. One whose weights are not here, or that is being trained with
            dropout, is taken at its class's word.

    Raises:
        NLAError: Names the class and what is not as it should be.
    """
    stack = text_model(model)
    if stack in _proven:
        return
    if not _is_recorded(stack):
        if not _has_weights(stack):
            # An nnsight model that runs elsewhere; nothing can be tried here.
            return
        _check_by_a_pass(stack)
    _proven.add(stack)


def _is_recorded(stack: Any) -> bool:
    """Whether transformers records the outputs of these blocks as `hidden_states`."""
    recorded = getattr(type(stack), "_can_record_outputs", None) or {}
    recorder = recorded.get("hidden_states") if isinstance(recorded, dict) else None
    for one in recorder if isinstance(recorder, (list, tuple)) else [recorder]:
        cls = getattr(one, "target_class", one)
        plain = getattr(one, "index", 0) == 0 and getattr(one, "layer_name", None) is None
        starts = getattr(one, "capture_initial_hidden_state", True)
        blocks = [getattr(block, "_orig_mod", block) for block in blocks_of(stack)]
        if isinstance(cls, type) and plain and starts and all(isinstance(b, cls) for b in blocks):
            return True
    return False


def _has_weights(stack: Any) -> bool:
    try:
        input_device(stack)
    except NLAError:
        return False
    return True


@torch.inference_mode()
def _check_by_a_pass(stack: Any) -> None:
    outputs: list[Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, (tuple, list)) else output)

    ids_BT = torch.tensor([[1, 2, 3], [1, 2, 4]], device=input_device(stack))
    options = {"output_hidden_states": True, "use_cache": False}
    with OwnPass(stack) as own_pass:
        for block in blocks_of(stack):
            own_pass.hook(block, hook)
        try:
            states = stack(input_ids=ids_BT, **options).hidden_states
        # Foreign classes do as they like with these arguments.
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise _unknown(stack, f"a plain pass fails ({reason})") from error
    shape = (*ids_BT.shape, width_of(stack))
    if len(outputs) != len(blocks_of(stack)) or any(out.shape != shape for out in outputs):
        raise _unknown(stack, "its blocks do not each put out one vector of d_model per token")
    if states is None or len(states) < len(outputs):
        raise _unknown(stack, "its hidden_states are not one more than its blocks")
    for layer, (out, state) in enumerate(zip(outputs[:-1], states[1:], strict=False)):
        if not torch.equal(out, state):
            raise _unknown(stack, f"hidden_states[{layer + 1}] is not the output of block {layer}")
    if not stack.training:
        first, second = outputs[-1][:, :2].float()
        if (first - second).norm() > _CAUSAL_WITHIN * first.norm():
            raise _unknown(stack, "its tokens see those after them")


def _unknown(stack: Any, reason: str) -> NLAError:
    return NLAError(
        f"the residual stream of {type(stack).__name__} is not known: {reason}. Vectors from "
        "anywhere can be given to nla.explain"
    )


def check_width(model: Any, resid_BTD: Tensor) -> None:
    """Refuses what is no residual stream, such as several streams side by side.

    Raises:
        NLAError: Names the class and the shape.
    """
    if resid_BTD.ndim != 3 or resid_BTD.shape[-1] != width_of(model):
        raise _unknown(
            text_model(model),
            f"a block puts out {list(resid_BTD.shape)} instead of one vector of d_model per token",
        )


def say_dropout(model: Any) -> None:
    """Warns where a model is in training mode and dropout makes each pass another."""
    where = _active_dropout(model)
    if where is not None:
        warnings.warn(
            f"this {type(model).__name__} is in training mode, and dropout acts at {where}: its "
            "residual vectors differ from pass to pass. Call model.eval() before",
            NLAWarning,
            stacklevel=2,
        )


def _active_dropout(model: Any) -> str | None:
    """Where dropout changes each pass, as a path and its rate; None: nowhere."""
    for path, module in text_model(model).named_modules():
        if not module.training:
            continue
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{path} ({module.p})"
        for name, value in vars(module).items():
            if ("dropout" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                return f"{path}.{name} ({value})"
    return None
