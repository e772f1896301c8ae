"""What a server sends back from a model with a probe: saved block outputs can be explained.

The server runs the block without the probe and answers with plain tensors by name. Where a name got
a block's output, as in `h = model.model.layers[20].output[0, -1].save()`, is read from the block's
source, and rows, positions and tokens from the prompt, which is tokenized here as it is there.
Anything less plain, such as invokes or steps of a generation, comes back as ordinary tensors.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from torch import Tensor

from nla_lens.adapters.nnsight_run import Recorder
from nla_lens.engines.ndif.results import MOST_BYTES, read_result
from nla_lens.engines.ndif.wire import read_response
from nla_lens.errors import NLARemoteError
from nla_lens.stream.origin import Origin, where_of_pass
from nla_lens.stream.residual import ResidualTensor


class ExplainingBackend:
    """Mixed into a remote backend: its results know where they came from.

    Attributes:
        nla_recorder: The probe's.
    """

    nla_recorder: Recorder

    def finalize(self, content: bytes) -> Any:
        """See `RemoteBackend.finalize`, which would run a server's code."""
        # nnsight's own compression of real numbers saves little.
        most_bytes = getattr(self, "most_bytes", max(MOST_BYTES, 64 * len(content)))
        with _beside_a_probe():
            return read_result(content, compressed=self.compress, most_bytes=most_bytes)  # type: ignore[attr-defined]

    def parse(self, message: str | bytes) -> Any:
        """See `RemoteBackend.parse`, which would run a server's code."""
        with _beside_a_probe():
            return read_response(message, getattr(self, "most_bytes", MOST_BYTES))

    def _push(self, result: dict[str, Any], tracer: Any) -> None:
        result |= _explainable(result, tracer, self.nla_recorder)
        super()._push(result, tracer)  # type: ignore[misc]


@contextlib.contextmanager
def _beside_a_probe() -> Iterator[None]:
    try:
        yield
    except NLARemoteError as error:
        raise NLARemoteError(
            f"{error}. (The model has a probe; without one, nnsight takes whatever a server sends, "
            "and runs the code in it.)",
            cause=error.cause,
        ) from None


def explaining(backend: Any, recorder: Recorder) -> Any:
    """The same backend, with results that can be explained."""
    cls = type(backend)
    backend.__class__ = type(cls.__name__, (ExplainingBackend, cls), {"nla_recorder": recorder})
    return backend


def _explainable(
    result: dict[str, Any], tracer: Any, recorder: Recorder
) -> Iterator[tuple[str, ResidualTensor]]:
    model = tracer.envoy
    if not recorder.active or not model._batch_size(*tracer.args, **tracer.kwargs):
        return
    args, kwargs = model._batch([(tracer.args, tracer.kwargs)], tracer.fn)
    where_BT3 = where_of_pass(args, kwargs)
    if where_BT3 is None:
        return
    frame = tracer.info.frame
    for name, owner, indices in _saved_outputs(tracer.node):
        value, envoy = result.get(name), _value(owner, frame)
        if not isinstance(envoy, Envoy) or type(value) is not Tensor:
            continue
        origin = recorder.origin(envoy.path, where_BT3)
        found = None if origin is None else _indexed(origin, value, indices, frame)
        if found is not None:
            yield name, ResidualTensor.wrap(value, found)


def _indexed(origin: Origin, value: Tensor, indices: list[ast.expr], frame: Any) -> Origin | None:
    """The origin of a part of a block's output; None where it is none."""
    wanted = [_value(index, frame) for index in indices]
    # A block that answers a tuple has the residual stream first.
    for picked in (wanted, wanted[1:] if wanted[:1] == [0] else wanted):
        whole = torch.empty(1).expand(*origin.where_LX3.shape[:-1], value.shape[-1])
        part: Any = ResidualTensor.wrap(whole, origin)
        try:
            for index in picked:
                part = part[index]
        except (IndexError, TypeError, RuntimeError):
            continue
        if isinstance(part, ResidualTensor) and part.shape == value.shape:
            return part.origin
    return None


def _saved_outputs(node: Any) -> Iterator[tuple[str, ast.expr, list[ast.expr]]]:
    """Names that get `OWNER.output[...]...save()` in a block: name, OWNER and the indices."""
    times: dict[str, int] = {}
    for inner in ast.walk(ast.Module(body=node.body, type_ignores=[])):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            times[inner.id] = times.get(inner.id, 0) + 1
    for statement in node.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        read, indices = _unsaved(statement.value), list[ast.expr]()
        while isinstance(read, ast.Subscript):
            indices.insert(0, read.slice)
            read = read.value
        name = statement.targets[0].id
        if isinstance(read, ast.Attribute) and read.attr == "output" and times[name] == 1:
            yield name, read.value, indices


def _unsaved(value: ast.expr) -> ast.expr | None:
    """X of `X.save()` and `nnsight.save(X)`."""
    if not isinstance(value, ast.Call) or value.keywords:
        return None
    called = value.func
    if isinstance(called, ast.Attribute) and called.attr == "save" and not value.args:
        return called.value
    last = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
    return value.args[0] if last == "save" and len(value.args) == 1 else None


def _value(expression: ast.expr, frame: Any) -> Any:
    """The value of a name, attribute or index in the caller's frame; None for anything else."""
    if any(isinstance(part, (ast.Call, ast.NamedExpr)) for part in ast.walk(expression)):
        return None
    tree = ast.fix_missing_locations(ast.Expression(body=expression))
    try:
        return eval(compile(tree, "<block>", "eval"), frame.f_globals, dict(frame.f_locals))
    # What a name is bound to decides what can be raised.
    except Exception:
        return None
