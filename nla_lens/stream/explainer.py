"""What residuals and probes need of an NLA: its `.explain`, and which residual stream it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from nla_lens.errors import NLAError


class Reads(Protocol):
    """Which residual stream an NLA reads; `NLASpec` says more.

    Attributes:
        d_model: Its width.
        layer: K; None where it is not known.
        hook_name: TransformerLens' name of the place; None where the layer is not known.
        source_model: The model it belongs to.
    """

    @property
    def d_model(self) -> int: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def hook_name(self) -> str | None: ...
    @property
    def source_model(self) -> str | None: ...


class Explainer(Protocol):
    """An NLA, as the residual stream sees it."""

    @property
    def spec(self) -> Reads: ...

    @property
    def explain(self) -> Callable[..., Any]:
        """Vectors to an `Explanation`, or to `Explanations` of several; takes its options."""
        ...


def check_nla(nla: object) -> None:
    """Refuses what is no NLA, such as the name of one.

    Raises:
        NLAError: Says how one is loaded.
    """
    if not callable(getattr(nla, "explain", None)):
        raise NLAError(f"{nla!r:.80} is not an NLA; load one first: NLA.from_pretrained(...)")


def check_fit(nla: Explainer, *, d_model: int, n_blocks: int, what: str) -> None:
    """Refuses a model whose residual stream the NLA cannot read.

    Raises:
        NLAError: Another width, or block K does not exist.
    """
    spec = nla.spec
    if d_model != spec.d_model:
        raise NLAError(
            f"{what} has d_model={d_model}, the NLA reads d_model={spec.d_model} (source model "
            f"{spec.source_model}); attach it to that model"
        )
    if spec.layer is not None and spec.layer >= n_blocks:
        raise NLAError(
            f"{what} has {n_blocks} blocks, the NLA reads {spec.hook_name}: not its source model"
        )
