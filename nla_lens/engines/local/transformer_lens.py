"""Both halves as TransformerBridge models; the injection is a function on a HookPoint.

`replace` acts on `embed.hook_out` (alias `hook_embed`), `norm_matched_add` on
`blocks.1.hook_resid_post`. For those who want their own hooks on the verbalizer while it reads:
`nla.verbalizer.engine.bridge` is a TransformerBridge like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.engines.local.self_check import settle_caching
from nla_lens.engines.local.transformers import adapter_blocks
from nla_lens.engines.local.verbalizer import LocalVerbalizer
from nla_lens.errors import NLAError
from nla_lens.models.anatomy import final_norm_name, text_model
from nla_lens.models.batching import length_batches
from nla_lens.models.cache_keyword import cache_keyword
from nla_lens.models.passes import OwnHook, OwnPass
from nla_lens.models.placement import Placement
from nla_lens.models.tokens import find_eos_ids
from nla_lens.models.weights import load_backbone, load_causal_lm
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.injection import NORM_MATCHED_ADD_AT, norm_matched_add, replace

_INJECTION: Final = {
    "replace": ("hook_embed", replace),
    "norm_matched_add": (NORM_MATCHED_ADD_AT.name, norm_matched_add),
}


def load_verbalizer(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> TransformerLensVerbalizer:
    """The AV of a checkpoint directory as a bridge."""
    model = load_causal_lm(checkpoint.path, base=checkpoint.base, **vars(placement))
    eos_ids = find_eos_ids(model)
    text_lm = as_text_lm(text_model(model), model.get_output_embeddings())
    engine = TransformerLensVerbalizer(to_bridge(text_lm, checkpoint), spec, eos_ids)
    settle_caching(engine, text_lm, spec, "transformer_lens", "transformer-lens")
    engine.loaded_by = load_verbalizer, (checkpoint, spec, placement)
    return engine


def load_reconstructor(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement
) -> TransformerLensReconstructor:
    """The truncated backbone of an AR directory as a bridge."""
    n_blocks = adapter_blocks(checkpoint, spec)
    stack = text_model(
        load_backbone(checkpoint.path, n_blocks=n_blocks, base=checkpoint.base, **vars(placement))
    )
    half = TransformerLensReconstructor(to_bridge(as_text_lm(stack), checkpoint))
    half.loaded_by = load_reconstructor, (checkpoint, spec, placement)
    return half


class _Half:
    """A half that is loaded again where its pickle is opened: TransformerLens' bridges have none.

    Attributes:
        loaded_by: What loads it, and the arguments.
    """

    loaded_by: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    def __reduce__(self) -> Any:
        """Raises an NLAError where it was made by hand."""
        if self.loaded_by is None:
            raise NLAError(
                f"this {type(self).__name__} was not loaded from a checkpoint and cannot be "
                "pickled: TransformerBridge has no pickle"
            )
        return self.loaded_by

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copied as it is, weights that were changed since included."""
        memo[id(self)] = copied = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


class TransformerLensVerbalizer(_Half, LocalVerbalizer):
    """An AV as a TransformerBridge.

    Attributes:
        bridge: The bridge.
        eos_ids: See `VerbalizerEngine`.
    """

    def __init__(self, bridge: Any, spec: NLASpec, eos_ids: frozenset[int]) -> None:
        """Raises:
        NLAError: The model has no block 1 for `norm_matched_add`.
        """
        super().__init__(bridge.original_model, torch.device(bridge.cfg.device), eos_ids)
        self.bridge = bridge
        self._takes_cache_as = cache_keyword(bridge.original_model)
        self._hook_name, self._inject = _INJECTION[spec.injection]
        if self._hook_name not in bridge.hook_dict:
            raise NLAError(
                f"{spec.injection} acts at {self._hook_name}; the model has no such hook"
            )

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

        masked = {} if mask_BL is None else {"attention_mask": mask_BL.long()}
        placed = {} if positions_BT is None else {"position_ids": positions_BT}
        with OwnPass(self.bridge) as own_pass:
            if injected_BD is not None:
                # A hook of torch's: those of `add_hook` another thread may reset.
                own_pass.hook(
                    self.bridge.hook_dict[self._hook_name],
                    lambda _, args, resid_BTD: self._inject(resid_BTD, injected_BD, at),
                )
            logits_BTV = self.bridge(
                ids_BT,
                return_type="logits",
                use_cache=cache is not None,
                **{self._takes_cache_as: cache},
                **masked,
                **placed,
            )
        logits_BV: Tensor = logits_BTV[:, -1].float()
        return logits_BV


class TransformerLensReconstructor(_Half):
    """An AR's backbone as a TransformerBridge, read at its last block's `hook_resid_post`.

    Attributes:
        bridge: The bridge.
        table_rows: How many tokens it knows.
    """

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self._last = ResidPost(bridge.cfg.n_layers - 1)
        self.table_rows = int(bridge.cfg.d_vocab)

    @torch.inference_mode()
    def last_resid(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """`[n, d]` float32; only prompts of equal length share a batch, so nothing is padded."""
        out_ND = torch.empty(len(prompts), self.bridge.cfg.d_model)
        for rows in length_batches([len(p) for p in prompts], torch.device("cpu")):
            ids_BT = torch.tensor([list(prompts[r]) for r in rows])
            out_ND[rows] = resid_post(self.bridge, self._last, ids_BT)[:, -1].float().cpu()
        return out_ND


@torch.inference_mode()
def resid_post(model: Any, place: ResidPost, ids_BT: Tensor) -> Tensor:
    """What passes a block's last hook point, behind all hooks on it; no later block runs.

    Not by `run_with_cache`: the hooks that it sets act on other threads' passes, too.
    """
    with OwnPass(model) as own_pass:
        found: Tensor = own_pass.output_of(
            model.hook_dict[place.name],
            lambda: model(ids_BT.to(model.cfg.device), return_type=None),
            last=model.blocks[place.layer],
        )
    return found


def as_text_lm(stack: Any, lm_head: nn.Module | None = None) -> Any:
    """A causal LM around a stack of blocks, sharing its weights.

    A multimodal wrapper must not reach TransformerBridge: booting one makes TransformerLens 4.3
    install torchvision, and with it another torch.

    Args:
        stack: The text model inside (`text_model`), with or without its final norm.
        lm_head: The model's own; None ties it to the embedding, for a stack read by hooks alone.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(stack.config, dtype=stack.dtype)
    empty = text_model(whole)
    name = final_norm_name(stack)
    if name is not None and isinstance(getattr(stack, name), nn.Identity):
        # A bridge wants the norm to be there; nothing is read after it.
        norm = getattr(empty, name).to_empty(device=stack.device)
        for key, parameter in norm.named_parameters():
            (nn.init.zeros_ if key.endswith("bias") else nn.init.ones_)(parameter)
        setattr(stack, name, norm)
    # A wrapper's nested text config names no class, and TransformerBridge goes by the name.
    whole.config.architectures = [type(whole).__name__]
    path = next(path for path, module in whole.named_modules() if module is empty)
    parent, _, own = path.rpartition(".")
    setattr(whole.get_submodule(parent), own, stack)
    if lm_head is None:
        whole.get_output_embeddings().weight = stack.get_input_embeddings().weight
    else:
        whole.set_output_embeddings(lm_head)
    return whole.eval().requires_grad_(False)


def to_bridge(text_lm: Any, checkpoint: Checkpoint) -> Any:
    """Boots a loaded text model.

    Raises:
        NLAError: transformer_lens is not installed, or has no TransformerBridge.
    """
    from nla_lens.models.weights import load_tokenizer

    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise NLAError(
            "engine='transformer_lens' needs TransformerLens 3.9 or later (TransformerBridge): "
            "pip install 'transformer-lens>=3.9'"
        ) from error
    bridge = TransformerBridge.boot_transformers(
        str(checkpoint.path),
        hf_model=text_lm,
        tokenizer=load_tokenizer(checkpoint.tokenizer_path),
        dtype=text_lm.dtype,
        device=text_lm.device,
    )
    let_attention_find_its_cache(bridge)
    return bridge


def let_attention_find_its_cache(bridge: Any) -> list[Any]:
    """Hands attention its cache under the name that TransformerLens looks for.

    Where TransformerLens (4.3 at least) computes attention itself, it reads `past_key_values`
    alone, and decodes without a cache when a block of transformers 5.24 hands it on as `cache`.

    Returns:
        Handles of the hooks; none where the two agree.
    """
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    def act(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"past_key_values": kwargs.get("cache"), **kwargs}

    if cache_keyword(bridge.original_model) != "cache":
        return []
    # In every pass, and none of anybody's that has to be respected: nothing but a name is added.
    hook = OwnHook(lambda: True, act)
    return [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in bridge.modules()
        # The others leave it to the layer inside, which knows its own name.
        if isinstance(module, AttentionBridge) and type(module).forward != AttentionBridge.forward
    ]
