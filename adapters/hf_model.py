"""transformers: `.explain()` on the `hidden_states` that a model answers.

>>> with nla_lens.attach(model, nla):
...     out = model(**inputs, output_hidden_states=True)
>>> out.hidden_states[21][0, -1].explain()       # leaves block 20

Entry 0 is what enters block 0, entry k leaves block k - 1; the last one has been through the final
norm, is no place in the residual stream and is left as it is. So it is in what `generate` answers,
in tuples (`return_dict=False`), and where the model inside is called by itself. PEFT, DataParallel,
torch.compile and modules of the user's own around a model may stay there.

Attaching puts two hooks on the model and each model inside it that holds the blocks. They look at
arguments and answers; the blocks run as they did.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, text_model, width_of
from nla_lens.models.proof import check_stream
from nla_lens.models.tokens import token_text
from nla_lens.models.weights import load_tokenizer
from nla_lens.models.wrappers import is_transformers, unwrapped
from nla_lens.nla import NLA
from nla_lens.stream.explainer import check_fit
from nla_lens.stream.frameworks import Probe
from nla_lens.stream.hf_source import HFSource
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.origin import Origin, where_of_pass
from nla_lens.stream.residual import ResidualTensor


def attach(model: Any, nla: NLA) -> Probe:
    """Attaches an NLA to a transformers model, or to one inside something else.

    Args:
        model: The model whose residual stream the NLA reads.
        nla: The NLA.

    Raises:
        NLAError: No decoder-only transformers model, another width, too few blocks, or a probe
            already there.
    """
    inside, stack = unwrapped(model), text_model(model)
    what = f"this {type(inside).__name__}"
    if any(_is_probed(module) for module in inside.modules()):
        raise NLAError(f"{what} has a probe already; detach it first")
    n_blocks = len(blocks_of(stack))
    check_fit(nla, d_model=width_of(stack), n_blocks=n_blocks, what=what)
    check_stream(inside)
    recorder = _Recorder(n_blocks, width_of(stack), nla, _text_of_tokens(inside))
    handles: list[Any] = []
    for module in _around(model, stack):
        begin, end = _Look(recorder, recorder.begin), _Look(recorder, recorder.end)
        if module._compiled_call_impl is not None:
            handles.append(_Compiled(module, begin, end))
        handles += [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            # Also where the pass fails, so that it is over.
            module.register_forward_hook(end, always_call=True),
        ]

    def undo() -> None:
        # Copies of the model keep their hooks, and no longer record.
        recorder.active = False
        for handle in handles:
            handle.remove()

    return Probe(model, nla, undo)


def as_source(model: Any, tokenizer: Any = None) -> HFSource:
    """The model as a source of residual vectors for `nla_lens.extract`."""
    return HFSource(model, tokenizer)


class _Recorder:
    """Says of hidden states where they come from.

    Attributes:
        active: Whether they are to be told; False after `detach`.
    """

    def __init__(
        self, n_blocks: int, width: int, nla: NLA, to_token: Callable[[int], str | None]
    ) -> None:
        self.active = True
        # What leaves the last block is not among them.
        self._names = [ResidPost(i - 1).name for i in range(n_blocks)]
        self._width, self._nla, self._to_token = width, nla, to_token
        self._thread = _Passes()

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Notes a forward call, before the pass: a cache grows in it."""
        if kwargs is None:
            # Another thread's, begun in the moment of attaching: torch had the hook, not its kind.
            return
        passes = self._thread.entered
        where_BT3 = (
            where_of_pass(args, kwargs) if _may_answer_states(module, args, kwargs) else None
        )
        outer_BT3 = passes[-1][-1] if passes else None
        # A model inside that gets embeddings does not see the tokens.
        if where_BT3 is not None and outer_BT3 is not None and "input_ids" not in kwargs:
            where_BT3 = outer_BT3 if outer_BT3.shape == where_BT3.shape else where_BT3
        passes.append((module, args, kwargs, where_BT3))

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The same answer, its hidden states told where they come from."""
        passes = self._thread.entered
        if not any(entered is module for entered, *_ in passes):
            return None
        while (found := passes.pop())[0] is not module:
            # Those that an exception ended before their hooks ran.
            pass
        where_BT3, given = found[-1], (*found[1], *found[2].values())
        return None if where_BT3 is None else self._told(output, where_BT3, given)

    def _told(self, output: Any, where_BT3: Tensor, given: tuple[Any, ...]) -> Any:
        """An output with its hidden states wrapped; None where there are none."""
        if isinstance(output, Mapping):
            states = self._wrapped(output.get("hidden_states"), where_BT3, given)
            if states is not None:
                output["hidden_states"] = states  # type: ignore[index]
            return None
        if type(output) is not tuple:
            return None
        parts = [self._wrapped(part, where_BT3, given) for part in output]
        if not any(parts):
            return None
        return tuple(
            part if told is None else told for part, told in zip(output, parts, strict=True)
        )

    def _wrapped(self, states: Any, where_BT3: Tensor, given: tuple[Any, ...]) -> Any:
        """A tuple of hidden states that know their place; None for anything else."""
        if type(states) is not tuple or len(states) != len(self._names) + 1:
            return None
        shape = (*where_BT3.shape[:-1], self._width)
        # Attentions, as many as there are blocks, and states asked for by index have gaps.
        if not all(state is None or getattr(state, "shape", None) == shape for state in states):
            return None
        told = list(states)
        for i, name in enumerate(self._names):
            if type(states[i]) is Tensor:
                origin = Origin(name, where_BT3, self._to_token, self._nla)
                is_given = any(states[i] is value for value in given)
                told[i] = _told_in_place(states[i], origin, is_given)
        return tuple(told)


class _Passes(threading.local):
    """The forward calls that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.entered: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor | None]] = []


class _Look:
    """A hook that only looks. Copies of the model share it; what is pickled has one that is blind.

    Attributes:
        recorder: Whose hook it is; None in another process.
        only_looks: See `nla_lens.models.passes.has_hooks`.
    """

    only_looks = True

    def __init__(
        self, recorder: _Recorder | None = None, look: Callable[..., Any] | None = None
    ) -> None:
        self.recorder, self._look = recorder, look

    def __call__(self, *args: Any) -> Any:
        # Compiled code is not stopped for it: a compiled model's answer is told outside.
        if torch.compiler.is_compiling() or self.recorder is None or not self.recorder.active:
            return None
        return None if self._look is None else self._look(*args)

    def __copy__(self) -> _Look:
        return self

    def __deepcopy__(self, memo: Any) -> _Look:
        return self

    def __reduce__(self) -> Any:
        return _Look, ()


class _Compiled:
    """Looks at the passes of what `module.compile()` compiled in place, hooks and all."""

    def __init__(self, module: nn.Module, begin: _Look, end: _Look) -> None:
        self._module, self._call = module, module._compiled_call_impl
        module._compiled_call_impl = functools.partial(_looked_at, self._call, module, begin, end)

    def remove(self) -> None:
        """Leaves what was compiled as it was."""
        self._module._compiled_call_impl = self._call


def _looked_at(
    call: Any, module: nn.Module, begin: _Look, end: _Look, *args: Any, **kw: Any
) -> Any:
    begin(module, args, kw)
    output = None
    try:
        output = call(*args, **kw)
    finally:
        # Also where the pass fails, so that it is over.
        told = end(module, args, output)
    return output if told is None else told


def _may_answer_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_hidden_states")
    if asked is None:
        # By position, or a wrapper that has no config.
        asked = len(args) > 2 or getattr(
            getattr(module, "config", None), "output_hidden_states", True
        )
    return asked is not False


def _told_in_place(state: Tensor, origin: Origin, is_given: bool) -> Tensor:
    """A hidden state that knows where it comes from.

    One with a gradient stays the tensor that the loss is computed from, so that `retain_grad` and
    `torch.autograd.grad` find it in the graph; a view would not be there. The caller's own tensor
    is viewed.
    """
    if not state.requires_grad or is_given:
        return ResidualTensor.wrap(state, origin)
    state.__class__ = ResidualTensor
    return state.told(origin)  # type: ignore[attr-defined]


def _around(model: nn.Module, stack: nn.Module) -> Iterator[nn.Module]:
    """The models around the blocks, and what hands arguments and answers on as they are."""
    outer: Any = model
    while not is_transformers(outer):
        inner = getattr(outer, "_orig_mod", None)
        if inner is None and isinstance(
            outer, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = outer.module
        if inner is None:
            break
        yield outer
        outer = inner
    for module in unwrapped(model).modules():
        if is_transformers(module) and any(part is stack for part in module.modules()):
            yield module


def _is_probed(module: nn.Module) -> bool:
    return any(
        isinstance(hook, _Look) and hook.recorder is not None and hook.recorder.active
        for hook in list(module._forward_hooks.values())
    )


def _text_of_tokens(model: Any) -> Callable[[int], str | None]:
    """Text of token ids, by the tokenizer the model was saved with; it is loaded when it is needed.

    None for each where there is none.
    """
    path = str(getattr(model, "name_or_path", ""))

    @functools.cache
    def text() -> Callable[[int], str] | None:
        try:
            return token_text(load_tokenizer(path)) if path else None
        except NLAError:
            return None

    def to_token(token_id: int) -> str | None:
        of = text()
        return None if of is None else of(token_id)

    return to_token
