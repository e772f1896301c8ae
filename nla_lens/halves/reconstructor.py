"""Texts to vectors: the first K+1 blocks of an LM and a linear head, read at the last token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.layout import HEAD_NAME
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.checks import is_unicode, naming
from nla_lens.engines import ReconstructorEngine
from nla_lens.errors import NLAError
from nla_lens.models.ambient import undisturbed
from nla_lens.models.tokens import check_ids, tokenize
from nla_lens.stream.template import fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reconstructor:
    """The AR: `AR(text) = W @ resid_K(prompt)[last token]`.

    Attributes:
        spec: What was loaded.
        tokenizer: The checkpoint's tokenizer.
        engine: Where the backbone runs.
        weight_DD: W, `[d, d]` float32.
        bias_D: Bias of the head, where it has one.
        mean_D: `[d]` float32, added to what is reconstructed; None adds nothing.
        context_length: Most tokens the model was made for; None where nobody says.
    """

    def __init__(
        self,
        spec: NLASpec,
        tokenizer: PreTrainedTokenizerBase,
        engine: ReconstructorEngine,
        head: dict[str, Tensor],
        mean_D: Tensor | None = None,
        context_length: int | None = None,
    ) -> None:
        """Joins what was loaded; `check_prompt(spec, tokenizer)` comes first."""
        self.mean_D, self.context_length = mean_D, context_length
        self.spec, self.tokenizer, self.engine = spec, tokenizer, engine
        self.weight_DD, self.bias_D = head["weight"], head.get("bias")

    def __repr__(self) -> str:
        return f"Reconstructor(d_model={self.spec.d_model}, {type(self.engine).__name__})"

    def prompt_ids(self, text: str) -> list[int]:
        """The tokenized prompt for one text, with the tokenizer's special tokens (BOS)."""
        ids = tokenize_prompt(self.spec, self.tokenizer, text)
        check_ids(self.tokenizer, ids, getattr(self.engine, "table_rows", None))
        return ids

    @undisturbed()
    def reconstruct(self, texts: Sequence[str]) -> Tensor:
        """Vectors for texts.

        Args:
            texts: Explanations, taken as they are: nothing is stripped, braces stay braces.

        Returns:
            `[n, d]` float32 on the CPU, not normalised.

        Raises:
            NLAError: Not a sequence of strings, or one longer than the model was made for.
        """
        prompts = [self.prompt_ids(text) for text in check_texts(texts)]
        for i, ids in enumerate(prompts):
            if self.context_length is not None and len(ids) > self.context_length:
                raise NLAError(
                    f"texts[{i}] is {len(ids)} tokens with its prompt, more than the "
                    f"{self.context_length} the reconstructor was made for "
                    "(max_position_embeddings): shorten it"
                )
        resid_ND = self.engine.last_resid(prompts)
        vec_ND = torch.nn.functional.linear(resid_ND, self.weight_DD, self.bias_D)
        return vec_ND if self.mean_D is None else vec_ND + self.mean_D

    @undisturbed()
    def difference(self, text: str, edited: str) -> Tensor:
        """`AR(edited) - AR(text)`, `[d]` float32 on the CPU."""
        original_D, edited_D = self.reconstruct([text, edited])
        return edited_D - original_D


def check_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list.

    Raises:
        NLAError: Not strings, or a single one; names the first that cannot be tokenized.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise NLAError(f"texts must be a list of strings, one per vector; found {texts!r:.80}")
    listed = list(texts)
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise NLAError(f"texts[{i}] is a {type(text).__name__}; expected a string")
        if not is_unicode(text):
            raise NLAError(f"texts[{i}] holds half of a surrogate pair: {text!r:.80}")
    return listed


def tokenize_prompt(spec: NLASpec, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The prompt for one text; special-token strings and braces inside it stay as they are."""
    prompt = fill(spec.ar_template or "", "{explanation}", text)
    ids = tokenize(tokenizer, prompt)
    if not ids:
        raise NLAError(f"the reconstructor's prompt {prompt!r:.80} has no tokens to be read at")
    return ids


def check_prompt(spec: NLASpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks the reconstructor's prompt against the live tokenizer.

    Raises:
        NLAError: No template, or other last ids than the sidecar's.
    """
    if spec.ar_template is None:
        raise NLAError("the reconstructor's sidecar has no prompt template (prompt_templates.ar)")
    with naming("prompt_templates.ar"):
        ids = tokenize_prompt(spec, tokenizer, "x")
    suffix = list(spec.critic_suffix_ids or ())
    if suffix and ids[-len(suffix) :] != suffix:
        raise NLAError(
            f"the reconstructor's prompt ends with {ids[-len(suffix) :]}, the sidecar says "
            f"{suffix} (tokens.critic_suffix_ids): the tokenizer or the template is not its own"
        )


def load_head(checkpoint: Checkpoint, d_model: int) -> dict[str, Tensor]:
    """`value_head.safetensors` in float32.

    Raises:
        NLAError: No file, not safetensors, or a weight that is not a finite `[d, d]`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path: Path = checkpoint.path / HEAD_NAME
    if not path.is_file():
        raise NLAError(
            f"no {HEAD_NAME} in {checkpoint.path}: it is the reconstructor's trained head and "
            "cannot be derived; is this an AR checkpoint?"
        )
    try:
        head = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise NLAError(f"{path} cannot be read as safetensors: {error}") from error
    shapes = {"weight": (d_model, d_model), "bias": (d_model,)}
    for name, tensor in head.items():
        if name not in shapes:
            raise NLAError(f"{path} holds {name!r}; expected weight [d, d] and at most a bias [d]")
        if tuple(tensor.shape) != shapes[name]:
            raise NLAError(f"{path}: {name} is {list(tensor.shape)}, expected {list(shapes[name])}")
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise NLAError(f"{path}: {name} is {dtype}; expected floating point")
        # Part by part: of a 70B's head the whole would take 600 MB for a moment.
        if not all(bool(part.float().isfinite().all()) for part in tensor.split(1024)):
            raise NLAError(f"{path}: {name} holds NaN or infinity")
    if "weight" not in head:
        raise NLAError(f"{path} has no tensor named weight")
    return {name: tensor.float() for name, tensor in head.items()}
