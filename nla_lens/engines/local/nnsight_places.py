"""Where in an nnsight model residuals are read and vectors injected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nla_lens.checkpoints.spec import NLASpec
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, embedding_of
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.injection import NORM_MATCHED_ADD_AT, unit


@dataclass(frozen=True)
class Places:
    """Envoys of a model by their paths from its root.

    Attributes:
        embedding: The token embedding.
        blocks: The decoder blocks, in order.
    """

    embedding: str
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, model: Any) -> Places:
        """Finds them in an nnsight model, a multimodal wrapper's own paths included."""
        module = model._module
        paths = {id(envoy._module): envoy.path for envoy in model.modules()}

        def path(found: Any) -> str:
            return str(paths[id(found)]).removeprefix(f"{model.path}.")

        blocks = tuple(path(block) for block in blocks_of(module))
        return cls(path(embedding_of(module)), blocks)

    def injection(self, spec: NLASpec) -> str:
        """Where the vectors of an AV go in.

        Raises:
            NLAError: The model has no block 1 for `norm_matched_add`.
        """
        if spec.injection == "replace":
            return self.embedding
        layer = NORM_MATCHED_ADD_AT.layer
        if len(self.blocks) <= layer:
            raise NLAError(
                f"norm_matched_add acts at the output of block {layer}; the model has fewer"
            )
        return self.blocks[layer]

    def resid(self, place: ResidPost) -> str:
        """Where the residual stream is read.

        Raises:
            NLAError: There is no such block.
        """
        if not 0 <= place.layer < len(self.blocks):
            raise NLAError(
                f"layer {place.layer} does not exist: the model has {len(self.blocks)} blocks "
                f"(0 to {len(self.blocks) - 1})"
            )
        return self.blocks[place.layer]


@dataclass(frozen=True)
class Injection:
    """Vectors on their way into a prompt.

    Attributes:
        path: The envoy at whose output they go in.
        vectors_BD: `replace`: the rows as they are to stand there; else vectors of norm 1.
        marker: Index of the token.
        adds: Whether they are added, times the norm of what is there, instead of replacing it.
    """

    path: str
    vectors_BD: Tensor
    marker: int
    adds: bool

    @classmethod
    def make(cls, path: str, spec: NLASpec, vectors_BD: Tensor, marker: int) -> Injection:
        """From a job's vectors, by the rule of the spec."""
        adds = spec.injection == "norm_matched_add"
        return cls(path, unit(vectors_BD) if adds else vectors_BD, marker, adds)
