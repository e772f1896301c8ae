"""The two halves in training: LoRA over the source model, and what each is asked.

Products may be taken in bfloat16 (autocast); the residual stream, the LoRA matrices and the head
stay in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from sizes import Settings
from tiny import injected, pad
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

AV_TEMPLATE = "Explain:{injection_char}"
AR_TEMPLATE = "Some text: {explanation}"
CLOSING = "\n</explanation>"
MARKERS = ("式", "㈎")
"""Characters that may be one token: the first that is one is taken. Behind a blank none is."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORE = -100
HEAD = "value_head.safetensors"


class Prompt:
    """The verbalizer's prompt.

    Attributes:
        ids: Its tokens, chat template included.
        char, token: The marker and its id.
        marker: Its index in `ids`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Renders it.

        Raises:
            ValueError: No marker is one token.
        """
        for char in MARKERS:
            content = AV_TEMPLATE.replace("{injection_char}", char)
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            token = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(char))
            if len(token) == 1 and ids.count(token[0]) == 1:
                self.ids, self.char, self.token = ids, char, token[0]
                self.marker = ids.index(token[0])
                return
        raise ValueError(f"none of {MARKERS} is one token of this tokenizer")


class Verbalizer(nn.Module):
    """Vector to text: all blocks of the source, with LoRA."""

    def __init__(self, source: LlamaForCausalLM, prompt: Prompt, scale: float, settings: Settings):
        """Puts LoRA matrices onto a copy of the source model.

        Args:
            source: The source model.
            prompt: The prompt.
            scale: Norm of the injected embedding.
            settings: Sizes of the run.
        """
        super().__init__()
        self.prompt, self.scale = prompt, scale
        self.lora = with_lora(copy.deepcopy(source), settings)

    def forward(self, vectors_BD: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Mean cross entropy of the answers' tokens.

        What stands before the marker is the same in every row, and is run once.

        Args:
            vectors_BD: One vector per row.
            rows: Tokens of each answer.
        """
        model = self.lora.get_base_model()
        device, marker = vectors_BD.device, self.prompt.marker
        before = torch.tensor([self.prompt.ids[:marker]], device=device)
        cache = model.model(input_ids=before, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
        after = self.prompt.ids[marker:]
        ids_BT = pad([[*after, *row[:-1]] for row in rows], self.prompt.token).to(device)
        target_BA = pad(rows, IGNORE).to(device)
        with injected(model, vectors_BD, 0, self.scale):
            out = model.model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        answer_BAD = out.last_hidden_state[:, len(after) - 1 :]
        real_BA = target_BA != IGNORE
        logits_NV = model.lm_head(answer_BAD[real_BA])
        return F.cross_entropy(logits_NV.float(), target_BA[real_BA])


class Reconstructor(nn.Module):
    """Text to vector: blocks 0..K of the source with LoRA, and a head at the last token."""

    def __init__(self, source: LlamaForCausalLM, settings: Settings):
        """Cuts a copy of the source model and puts LoRA matrices onto it.

        Args:
            source: The source model.
            settings: Sizes of the run.
        """
        super().__init__()
        model = copy.deepcopy(source)
        model.model.layers = model.model.layers[: settings.layer + 1]
        model.model.norm = nn.Identity()
        model.config.num_hidden_layers = settings.layer + 1
        self.lora = with_lora(model, settings)
        self.value_head = nn.Linear(
            model.config.hidden_size, model.config.hidden_size, bias=False, device=source.device
        )
        nn.init.eye_(self.value_head.weight)

    def read(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Returns one vector `[d]` per prompt, read at its last token."""
        device = self.value_head.weight.device
        model = self.lora.get_base_model().model
        hidden_BTD = model(input_ids=pad(rows, 0).to(device), use_cache=False).last_hidden_state
        last_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        last_BD = hidden_BTD[torch.arange(len(rows), device=device), last_B].float()
        with torch.autocast(device.type, enabled=False):
            return self.value_head(last_BD)

    def forward(self, vectors_BD: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Mean squared error of normalised vectors, 2 (1 - cos)."""
        return 2 * (1 - F.cosine_similarity(self.read(rows), vectors_BD)).mean()


def with_lora(model: LlamaForCausalLM, settings: Settings) -> nn.Module:
    """Puts fresh LoRA matrices onto every linear map of the blocks."""
    rank = settings.rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def halve_frozen(network: nn.Module) -> None:
    """Holds the frozen matrices that only multiply in bfloat16, so that none is cast each step."""
    for name, module in network.named_modules():
        if name.endswith("base_layer"):
            module.weight.data = module.weight.data.bfloat16()
    model = network.lora.get_base_model()
    if isinstance(network, Verbalizer):
        # Tied to the embedding, which stays as it is.
        model.lm_head.weight = nn.Parameter(
            model.lm_head.weight.detach().bfloat16(), requires_grad=False
        )


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str, closing: str = CLOSING) -> list[int]:
    """The tokens a verbalizer is to write."""
    return tokenizer(text + closing, add_special_tokens=False)["input_ids"]


def ar_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of the reconstructor's prompt around an explanation."""
    return tokenizer(AR_TEMPLATE.replace("{explanation}", text))["input_ids"]


def trained_state(network: Verbalizer | Reconstructor) -> dict[str, torch.Tensor]:
    """What training changes: the adapter's tensors as PEFT names them, and the head's."""
    state = dict(get_peft_model_state_dict(network.lora, save_embedding_layers=False))
    if isinstance(network, Reconstructor):
        state[HEAD] = network.value_head.weight
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def load_trained(network: Verbalizer | Reconstructor, state: dict[str, torch.Tensor]) -> None:
    """Puts back what `trained_state` gave."""
    state = {name: tensor.float() for name, tensor in state.items()}
    if isinstance(network, Reconstructor):
        network.value_head.weight.data.copy_(state.pop(HEAD))
    set_peft_model_state_dict(network.lora, state)


def load_folder(network: Verbalizer | Reconstructor, folder: Path) -> None:
    """Begins with an adapter that was written."""
    state = load_file(folder / "adapter_model.safetensors")
    if isinstance(network, Reconstructor):
        state[HEAD] = load_file(folder / HEAD)["weight"]
    load_trained(network, state)
