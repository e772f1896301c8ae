"""The only place where layer numbering is spelled.

>>> ResidPost(20).name
'blocks.20.hook_resid_post'
>>> ResidPost(20).hidden_states_index
21
>>> ResidPost.parse("blocks.21.hook_resid_pre")
ResidPost(layer=20)

"Layer K" is the OUTPUT of decoder block K, counted from 0. Off-by-one is the classic error here:
`hidden_states[K]` of transformers is the *input* of block K.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from nla_lens.errors import NLAError

# TransformerBridge also caches a block's input and output as hook_in and hook_out.
_NAME = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|in|resid_post|out)")
_SIDES = {"in": "resid_pre", "out": "resid_post"}


@dataclass(frozen=True, order=True)
class ResidPost:
    """The residual stream after decoder block `layer`.

    Attributes:
        layer: Index of the block, from 0; -1 is what enters block 0.
    """

    layer: int

    @property
    def name(self) -> str:
        """TransformerLens' name: `blocks.K.hook_resid_post` (`blocks.0.hook_resid_pre` for -1)."""
        if self.layer < 0:
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.layer}.hook_resid_post"

    @property
    def hidden_states_index(self) -> int:
        """Index into transformers' `hidden_states`, whose entry 0 is the embedding.

        The last entry of that tuple has been through the final norm, so for the last block it is
        not this place.
        """
        return self.layer + 1

    @property
    def n_blocks(self) -> int:
        """How many blocks must run for this place to be reached."""
        return self.layer + 1

    @classmethod
    def parse(cls, name: str) -> ResidPost:
        """Reads a hook name; the input of block l is the output of block l-1.

        Raises:
            NLAError: `name` is not a residual-stream hook point between two blocks.
        """
        place = cls.find(name)
        if place is None:
            raise NLAError(
                f"{name!r} is not a place in the residual stream between blocks; "
                "expected blocks.K.hook_resid_post or blocks.K.hook_resid_pre"
            )
        return place

    @classmethod
    def find(cls, name: str | None) -> ResidPost | None:
        """Like `parse`, but None where the name is something else."""
        match = _NAME.fullmatch(name or "")
        if match is None:
            return None
        block, side = int(match[1]), match[2]
        return cls(block if side in ("resid_post", "out") else block - 1)


@functools.cache
def residual_names(n_blocks: int) -> dict[str, str]:
    """Every name of a hook point in the residual stream, and HookedTransformer's spelling of it.

    >>> residual_names(1)["blocks.0.hook_out"]
    'blocks.0.hook_resid_post'

    `hook_resid_mid`, between a block's attention and its MLP, is in the stream, too, but no layer's
    end: `ResidPost.find` does not know it.
    """
    sides = {side: side for side in ("resid_pre", "resid_mid", "resid_post")} | _SIDES
    return {
        f"blocks.{block}.hook_{side}": f"blocks.{block}.hook_{spelled}"
        for block in range(n_blocks)
        for side, spelled in sides.items()
    }
