"""The default engine: both halves in this process, injected by torch forward hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.engines.local import shared_prefix
from nla_lens.engines.local.self_check import check_reader, settle_caching
from nla_lens.engines.local.verbalizer import LocalVerbalizer
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, embedding_of, input_device, table_rows, width_of
from nla_lens.models.block_reader import BlockReader
from nla_lens.models.cache_keyword import cache_keyword, taken_by
from nla_lens.models.onednn import ByOneDNN
from nla_lens.models.passes import OwnPass
from nla_lens.models.pickling import Pickled
from nla_lens.models.placement import Placement
from nla_lens.models.tokens import find_eos_ids
from nla_lens.models.weights import load_backbone, load_causal_lm
from nla_lens.stream.injection import NORM_MATCHED_ADD_AT, norm_matched_add, replace

_OPTIONS: Final = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")
"""Of a pass, besides its cache; not every family takes them all."""


def load_verbalizer(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> TransformersVerbalizer:
    """The AV of a checkpoint directory."""
    engine = TransformersVerbalizer(
        load_causal_lm(checkpoint.path, base=checkpoint.base, **vars(placement)), spec
    )
    settle_caching(engine, engine.model, spec, "transformers")
    return engine


def load_reconstructor(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> TransformersReconstructor:
    """The truncated backbone of an AR directory; an adapter's base is cut after block K."""
    n_blocks = adapter_blocks(checkpoint, spec)
    model = load_backbone(
        checkpoint.path, n_blocks=n_blocks, base=checkpoint.base, **vars(placement)
    )
    engine = TransformersReconstructor(model)
    check_reader(model, engine.reader, "transformers")
    return engine


def adapter_blocks(checkpoint: Checkpoint, spec: NLASpec) -> int | None:
    """Blocks to keep of an AR adapter's base; None for an AR that comes truncated.

    Raises:
        NLAError: An adapter, and nothing says after which block its base is to be cut.
    """
    if not checkpoint.is_adapter:
        return None
    if spec.ar_blocks is not None:
        return spec.ar_blocks
    if spec.place is None:
        raise NLAError(
            f"{checkpoint.name} is an adapter over a whole model, and nothing says which layer to "
            "read (extraction_layer_index in its sidecar); pass layer="
        )
    return spec.place.n_blocks


class TransformersVerbalizer(Pickled, LocalVerbalizer):
    """An AV as a transformers causal LM.

    Attributes:
        model: The causal LM, frozen.
        hf_model: The same; what is written when an NLA is saved.
        eos_ids: See `VerbalizerEngine`.
    """

    def __init__(self, model: Any, spec: NLASpec) -> None:
        super().__init__(model, input_device(model), find_eos_ids(model))
        self.model = self.hf_model = model
        self._rule, self._family = spec.injection, model.config.model_type
        self._place = injection_module(model, spec)
        self._by_onednn = ByOneDNN(model)
        self._takes_cache_as = cache_keyword(model)
        self._taken = taken_by(model, (*_OPTIONS, self._takes_cache_as))
        self._keeps_shared = shared_prefix.enable(model)
        self._window = shared_prefix.narrowest_window(model)

    def can_share(self, n_columns: int) -> bool:
        """See `decoding.Forward`."""
        return self._keeps_shared and (self._window is None or n_columns <= self._window)

    @torch.inference_mode()
    def run(
        self,
        ids_BT: Tensor,
        cache: Any,
        *,
        mask_BL: Tensor | None = None,
        positions_BT: Tensor | None = None,
        injected_BD: Tensor | None = None,
        at: int = 0,
    ) -> Tensor:
        """See `decoding.Forward`."""
        said = {
            "attention_mask": None if mask_BL is None else mask_BL.long(),
            "position_ids": positions_BT,
            self._takes_cache_as: cache,
            "use_cache": cache is not None,
            "logits_to_keep": 1,
        }
        with (
            OwnPass(self.model) as own_pass,
            self._injected(own_pass, injected_BD, ids_BT.shape[1], at),
            self._by_onednn,
        ):
            out = self.model(input_ids=ids_BT, **{k: said[k] for k in said if k in self._taken})
        logits_BV: Tensor = out.logits[:, -1].float()
        return logits_BV

    @contextlib.contextmanager
    def _injected(
        self, own_pass: OwnPass, vectors_BD: Tensor | None, n_tokens: int, at: int
    ) -> Iterator[None]:
        """Injects at one token of a pass."""
        if vectors_BD is None:
            yield
            return
        fired: list[nn.Module] = []
        inject = replace if self._rule == "replace" else norm_matched_add

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            fired.append(module)
            resid_BTD = output[0] if isinstance(output, tuple) else output
            if resid_BTD.shape[1] != n_tokens:
                raise NLAError(
                    f"{type(module).__name__} puts out {resid_BTD.shape[1]} of {n_tokens} tokens, "
                    f"so {self._rule} cannot be told where its token is in a {self._family} model"
                )
            injected = inject(resid_BTD, vectors_BD, at)
            return (injected, *output[1:]) if isinstance(output, tuple) else injected

        own_pass.hook(self._place, hook)
        yield
        if len(fired) != 1:
            raise NLAError(
                f"the injection hook on {type(self._place).__name__} fired {len(fired)} times "
                "instead of once: this model's forward pass is not the one the rule was made for"
            )


class TransformersReconstructor(Pickled):
    """An AR's backbone as a transformers model without its final norm.

    Attributes:
        model: The truncated backbone, frozen.
        hf_model: The same; what is written when an NLA is saved.
        reader: Reads its last block.
    """

    def __init__(self, model: Any) -> None:
        self.model = self.hf_model = model
        self.reader = BlockReader(model, len(blocks_of(model)) - 1)

    @property
    def table_rows(self) -> int:
        """How many tokens it knows."""
        return table_rows(self.model)

    def last_resid(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """`[n, d]` float32; see `nla_lens.models.block_reader` for how few passes that takes."""
        if not prompts:
            return torch.empty(0, width_of(self.model))
        last = [[len(prompt) - 1] for prompt in prompts]
        return torch.cat(self.reader.read(prompts, last)).float().cpu()

    def forget_prefix(self) -> None:
        """Frees the kept prefix; needed only after the model's weights were changed."""
        self.reader.forget_prefix()


def injection_module(model: Any, spec: NLASpec) -> nn.Module:
    """The module whose output a vector is put into.

    Raises:
        NLAError: The model has no block 1 for `norm_matched_add`, or embeds in another width.
    """
    if spec.injection == "replace":
        embedding = embedding_of(model)
        width = getattr(embedding, "embedding_dim", width_of(model))
        if width != width_of(model):
            raise NLAError(
                f"replace puts a vector of d_model={width_of(model)} in place of a token's "
                f"embedding; those of this {model.config.model_type!r} model have {width} entries"
            )
        return embedding
    blocks = blocks_of(model)
    layer = NORM_MATCHED_ADD_AT.layer
    if len(blocks) <= layer:
        raise NLAError(f"norm_matched_add acts at the output of block {layer}; the model has fewer")
    block: nn.Module = blocks[layer]
    return block
