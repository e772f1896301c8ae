"""nnsight: `.explain()` on block outputs read in a trace.

>>> with nla_lens.attach(model, nla):
...     with model.trace(prompt):
...         h = model.model.layers[20].output.save()
>>> h[0, -1].explain()

Serves every nnsight model around transformers blocks: TransformersModel, the deprecated
LanguageModel, NNsight; and inside it traces, invokes, generation and caches. What is read is the
residual at that moment, edits included.

Attaching gives the one model and its block envoys classes derived from their own, which read
through the original ones; `detach` gives the original classes back. nnsight and torch are not
patched, and what is sent to a server is pickled as if no probe were there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from nla_lens.adapters.nnsight_parts import envoy_of, text_stack
from nla_lens.adapters.nnsight_remote import explaining
from nla_lens.adapters.nnsight_run import Recorder
from nla_lens.adapters.nnsight_steering import patched_block, size_of_blocks, watched_stack_of
from nla_lens.adapters.nnsight_tracer import RecordingTracer, reduced
from nla_lens.engines.local.nnsight_threads import let_threads
from nla_lens.engines.ndif.source import NDIFSource, open_remote_source
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, table_rows, width_of
from nla_lens.models.passes import OwnPass
from nla_lens.models.proof import check_stream, say_dropout
from nla_lens.models.tokens import token_text
from nla_lens.nla import NLA
from nla_lens.stream.explainer import check_fit
from nla_lens.stream.frameworks import Probe
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.residual import ResidualTensor

patched, watched, size_of = patched_block, watched_stack_of, size_of_blocks
"""See `nla_lens.stream.patching`."""
_REMOTE_DEFAULTS: Final = {"remote": False, "blocking": True, "job_id": None, "verbose": False}


def attach(model: Any, nla: NLA) -> Probe:
    """Attaches an NLA to an nnsight model.

    Args:
        model: The model whose residual stream the NLA reads; its weights need not be loaded yet.
        nla: The NLA.

    Raises:
        NLAError: Not a whole nnsight model, another width, or a probe already there.
    """
    what = f"this {type(model).__name__}"
    stack = text_stack(model)
    if isinstance(model, _ProbedModel):
        raise NLAError(f"{what} has a probe already; detach it first")
    check_stream(stack)
    blocks = list(blocks_of(stack))
    check_fit(nla, d_model=width_of(stack), n_blocks=len(blocks), what=what)
    let_threads(model)
    envoys = [envoy_of(model, block) for block in blocks]
    tokenizer = getattr(model, "tokenizer", None)
    recorder = Recorder(
        {envoy.path: i for i, envoy in enumerate(envoys)},
        nla,
        None if tokenizer is None else token_text(tokenizer),
    )
    changed = [(model, type(model)), *((envoy, type(envoy)) for envoy in envoys)]
    for i, (envoy, cls) in enumerate(changed):
        mixin = _ProbedModel if i == 0 else _ProbedBlock
        # What is looked up on the class stays out of the instances, and so out of what is pickled.
        namespace = {"nla_base": cls, "nla_recorder": recorder, "__module__": cls.__module__}
        envoy.__class__ = type(cls.__name__, (mixin, cls), namespace)

    def undo() -> None:
        # Copies that `model.edit()` made keep the derived class, and no longer record.
        recorder.active = False
        for envoy, cls in changed:
            envoy.__class__ = cls

    return Probe(model, nla, undo)


def as_source(model: Any, tokenizer: Any = None) -> NNsightSource:
    """The model as a source of residual vectors for `nla_lens.extract`."""
    return NNsightSource(model, tokenizer)


def as_remote_source(model: Any, remote: str | bool, tokenizer: Any = None) -> NDIFSource:
    """The model, or one that is named, on an NDIF server as a source for `nla_lens.extract`."""
    return open_remote_source(model, remote, tokenizer)


class NNsightSource:
    """Reads the residual stream in a trace that stops behind the block; edits of the model apply.

    Attributes:
        tokenizer: The model's own, or the caller's.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        """Raises:
        NLAError: Not an nnsight model around transformers blocks, or no tokenizer.
        """
        self._stack = text_stack(model)
        check_stream(self._stack)
        say_dropout(self._stack)
        let_threads(model)
        self.model = model
        self.tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        if self.tokenizer is None:
            raise NLAError(f"this {type(model).__name__} has no tokenizer; pass tokenizer=")

    @property
    def is_whole(self) -> bool:
        """Whether there is an lm_head to write on with."""
        return self.model._module.get_output_embeddings() is not None

    @property
    def table_rows(self) -> int:
        """How many tokens it knows."""
        return table_rows(self._stack)

    @property
    def context_length(self) -> Any:
        """Most tokens the model was made for; None where its config does not say."""
        return getattr(self._stack.config, "max_position_embeddings", None)

    def check_place(self, place: ResidPost) -> None:
        """Raises an NLAError if there is no such block."""
        n_blocks = len(blocks_of(self._stack))
        if place.layer >= n_blocks:
            raise NLAError(
                f"layer {place.layer} does not exist: the model has {n_blocks} "
                f"blocks (0 to {n_blocks - 1})"
            )

    @torch.inference_mode()
    def resid(self, ids_BT: Tensor, place: ResidPost) -> Tensor:
        """`[B, T, d]`; blocks after `place.layer` do not run."""
        return block_output(self.model, ids_BT, place)

    @torch.inference_mode()
    def go_on(self, ids: Sequence[int], n: int) -> list[int]:
        """Argmax continuation, a whole pass per token: registered edits act on each pass alike."""
        from nla_lens.models.tokens import find_eos_ids

        grown = list(ids)
        ends = find_eos_ids(self.model._module)
        for _ in range(n):
            with OwnPass(self.model._module):
                out = self.model.trace(torch.tensor([grown]), trace=False)
            chosen = int(out.logits[0, -1].float().argmax())
            if chosen in ends:
                break
            grown.append(chosen)
        return grown[len(ids) :]


def block_output(model: Any, ids_BT: Tensor, place: ResidPost) -> Tensor:
    """Output of a block for token ids `[B, T]` without padding; later blocks do not run."""
    block = envoy_of(model, blocks_of(text_stack(model))[place.layer])
    with OwnPass(model._module), model.trace(ids_BT) as tracer:
        output = block.output
        resid = (output[0] if isinstance(output, tuple) else output).save()
        tracer.stop()
    return resid.as_ordinary() if isinstance(resid, ResidualTensor) else resid


class _Probed(Envoy):
    """An envoy whose class is put back before it is pickled for a server."""

    nla_base: type[Envoy]
    nla_recorder: Recorder

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self.nla_base, self.__getstate__())


class _ProbedBlock(_Probed):
    """A block whose input and output know where they come from."""

    @property
    def output(self) -> Any:
        """The block's output; see `Envoy.output`."""
        value = self.nla_base.output.__get__(self)
        mediator = Mediator.current(f"{self.path}.output")
        return self.nla_recorder.wrap(value, self.path, mediator.batch_group)

    @output.setter
    def output(self, value: Any) -> None:
        self.nla_base.output.__set__(self, _ordinary(value))

    @property
    def input(self) -> Any:
        """What enters the block; see `Envoy.input`."""
        value = self.nla_base.input.__get__(self)
        mediator = Mediator.current(f"{self.path}.input")
        return self.nla_recorder.wrap(value, self.path, mediator.batch_group, entering=True)

    @input.setter
    def input(self, value: Any) -> None:
        self.nla_base.input.__set__(self, _ordinary(value))

    @property
    def inputs(self) -> Any:
        """The block's arguments; see `Envoy.inputs`."""
        value = self.nla_base.inputs.__get__(self)
        mediator = Mediator.current(f"{self.path}.input")
        return self.nla_recorder.wrap_inputs(value, self.path, mediator.batch_group)

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self.nla_base.inputs.__set__(self, _ordinary(value))


class _ProbedModel(_Probed):
    """A model that notes rows, positions and tokens while it runs."""

    def trace(self, *inputs: Any, tracer_cls: Any = None, **kwargs: Any) -> Any:
        """See `Envoy.trace`; what a local trace caches can be explained, too."""
        remote, backend = kwargs.get("remote"), kwargs.get("backend")
        if backend is None and remote and remote != "local":
            settings = (kwargs.pop(n, d) for n, d in _REMOTE_DEFAULTS.items())
            backend = kwargs["backend"] = self._remote_backend(*settings)
        if isinstance(backend, RemoteBackend):
            explaining(backend, self.nla_recorder)
        elif tracer_cls is None and not remote and backend is None:
            tracer_cls = RecordingTracer
        return super().trace(*inputs, tracer_cls=tracer_cls, **kwargs)

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """See `Envoy.interleave`."""
        dispatch = getattr(self, "dispatch", None)
        if dispatch is not None and not _is_scanning():
            # Otherwise it happens on the way, and replaces the module that is watched.
            dispatch()
        with self.nla_recorder.watching(self):
            return super().interleave(fn, *args, **kwargs)

    def _remoteable_class(self) -> type:
        # The alias LanguageModel answers the class it stands for by itself.
        cls: type = super()._remoteable_class()
        return self.nla_base if cls is type(self) else cls


def _ordinary(value: Any) -> Any:
    """What goes into the model: the tensors it would hold without a probe."""
    if isinstance(value, ResidualTensor):
        return value.as_ordinary()
    if type(value) is tuple:
        return tuple(_ordinary(part) for part in value)
    if type(value) is dict:
        return {name: _ordinary(part) for name, part in value.items()}
    return value


def _is_scanning() -> bool:
    from torch._guards import detect_fake_mode

    return detect_fake_mode() is not None
