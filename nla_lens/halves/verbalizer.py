"""Vectors to texts: the prompt, the generation, and what is read out of the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from nla_lens.checkpoints.chat import Prompt
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.checks import is_unicode
from nla_lens.engines import Job, Unfinished, VerbalizerEngine
from nla_lens.errors import NLAError
from nla_lens.models.ambient import undisturbed
from nla_lens.models.tokens import check_ids, render_chat
from nla_lens.stream.injection import find_marker, replace, rescale
from nla_lens.stream.vectors import VectorsLike, check_vectors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INJECT: Final = "<INJECT>"
"""Stands in a custom prompt where the vector goes."""
_OPEN, _CLOSE = "<explanation>", "</explanation>"


@dataclass(frozen=True)
class Answer:
    """What a verbalizer wrote for one vector.

    Attributes:
        token_ids: Generated ids, an end-of-sequence id included.
        raw_text: Their text without the end-of-sequence.
        text: What stands between the tags, stripped.
        complete: The closing tag was reached.
        is_over: Nothing more will come.
    """

    token_ids: list[int]
    raw_text: str
    text: str
    complete: bool
    is_over: bool = True


class Verbalizer:
    """The AV: a causal LM that reads a vector at the marker of a fixed chat prompt.

    Attributes:
        spec: What was loaded.
        tokenizer: The checkpoint's tokenizer.
        engine: Where the model runs.
        mean_D: `[d]` float32, subtracted from vectors first; None takes them as they are.
        context_length: Most tokens the model was made for; None where nobody says.
    """

    def __init__(
        self,
        spec: NLASpec,
        tokenizer: PreTrainedTokenizerBase,
        engine: VerbalizerEngine,
        prompt: Prompt,
        mean_D: Tensor | None = None,
        context_length: int | None = None,
    ) -> None:
        """Joins what was loaded; `prompt` is `canonical_prompt(spec, tokenizer)`."""
        self.mean_D, self.context_length = mean_D, context_length
        self.spec, self.tokenizer, self.engine = spec, tokenizer, engine
        self._prompt = prompt
        self._texts: dict[int, str] = {}

    def __repr__(self) -> str:
        return (
            f"Verbalizer(prompt of {len(self.prompt_ids)} tokens, marker at "
            f"{self.marker_position}, {self.spec.injection}, {type(self.engine).__name__})"
        )

    @property
    def prompt_ids(self) -> list[int]:
        """The canonical prompt, chat template included."""
        return list(self._prompt.ids)

    @property
    def streams(self) -> bool:
        """Whether answers can be had while they are written."""
        return bool(getattr(self.engine, "streams", False))

    def check_streams(self) -> None:
        """Raises an NLAError where answers cannot be had while they are written."""
        if not self.streams:
            raise NLAError(
                f"stream=True: {type(self.engine).__name__} gives whole answers; leave it out, or "
                "use engine='transformers', 'transformer_lens' or 'nnsight'"
            )

    @property
    def marker_position(self) -> int:
        """Index in `prompt_ids` where vectors are injected."""
        return self._prompt.marker

    @undisturbed()
    def prompt_embeds(self, vectors: VectorsLike) -> Tensor:
        """The prompt with vectors injected, as it enters block 0.

        Args:
            vectors: As in `NLA.explain`, n in all.

        Returns:
            `[n, T, d]` float32 on the CPU.

        Raises:
            NLAError: The injection rule does not act on embeddings, or a vector cannot be injected.
        """
        if self.spec.injection != "replace":
            raise NLAError(
                f"the rule {self.spec.injection} acts at the output of block 1; "
                "no prompt embeddings stand for it"
            )
        vec_ND = check_vectors(vectors, self.spec.d_model).vectors_ND
        embed_TD = self.engine.embed(self._prompt.ids)
        embed_NTD = embed_TD.expand(len(vec_ND), -1, -1)
        return replace(embed_NTD, self._to_inject(vec_ND), self._prompt.marker)

    def _to_inject(self, vectors_ND: Tensor) -> Tensor:
        """Vectors at the norm the model learned to read; the add rule takes them as they are.

        Raises:
            NLAError: A vector that is the mean has no direction left.
        """
        if self.mean_D is not None:
            vectors_ND = vectors_ND - self.mean_D
            if not vectors_ND.any(-1).all():
                raise NLAError(
                    "a vector is the mean that this NLA subtracts (extraction.centre_mean): "
                    "nothing is left of it to explain; drop it"
                )
        if self.spec.injection_scale is None:
            return vectors_ND
        return rescale(vectors_ND, self.spec.injection_scale)

    @undisturbed()
    def marker_reading(self, max_new_tokens: int = 200) -> str:
        """What the model writes when nothing is injected and it reads the marker itself."""
        if self.spec.injection == "replace":
            injected_D = self.engine.embed(self._prompt.ids)[self._prompt.marker]
        else:
            injected_D = torch.zeros(self.spec.d_model)
        job = Job(
            self._prompt.ids, self._prompt.marker, injected_D[None], max_new_tokens, self.is_closed
        )
        return next(self.read(ids).text for _, ids in self.engine.generate(job))

    def answers(
        self,
        vectors_ND: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
        batch_size: int | None = None,
        prompt: str | None = None,
        watched: Callable[[int], bool] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Yields (index of the vector, its answer) as answers are done, in any order.

        Args:
            vectors_ND: `[n, d]` float32, finite and not zero.
            max_new_tokens: Longest answer.
            temperature: 0 is argmax.
            seeds: One per vector, above temperature 0.
            batch_size: Most rows at once; None lets the engine choose.
            prompt: Another user turn, with `<INJECT>` where the vector goes.
            watched: Of which vectors answers are wanted while they are written, see `engines.Job`.
        """
        chosen = self._prompt if prompt is None else self.custom_prompt(prompt)
        n_tokens = len(chosen.ids) + max_new_tokens
        longest = self.context_length
        if longest is not None and n_tokens > longest:
            raise NLAError(
                f"a prompt of {len(chosen.ids)} tokens and max_new_tokens={max_new_tokens} are "
                f"more than the {longest} tokens the verbalizer was made for "
                "(max_position_embeddings): pass a smaller max_new_tokens"
            )
        job = Job(
            prompt_ids=chosen.ids,
            marker=chosen.marker,
            injected_ND=self._to_inject(vectors_ND),
            max_new_tokens=max_new_tokens,
            is_finished=self.is_closed,
            temperature=temperature,
            seeds=seeds,
            batch_size=batch_size,
            stop=_CLOSE,
            watched=watched,
        )
        return ((row, self.read(ids)) for row, ids in self.engine.generate(job))

    def custom_prompt(self, prompt: str) -> Prompt:
        """Tokenizes another user turn.

        Raises:
            NLAError: `<INJECT>` is not there exactly once, or the marker stands there besides.
        """
        if not isinstance(prompt, str) or not is_unicode(prompt):
            raise NLAError(f"prompt= must be text with {INJECT} in it, found {prompt!r:.80}")
        if prompt.count(INJECT) != 1:
            raise NLAError(
                f"prompt= must contain {INJECT} exactly once (where the vector goes), found "
                f"{prompt.count(INJECT)}"
            )
        if self.spec.injection_char in prompt:
            raise NLAError(
                f"prompt= holds the injection character {self.spec.injection_char!r} itself, which "
                f"stands for the vector; say only {INJECT}"
            )
        ids = render_chat(
            self.tokenizer,
            prompt.replace(INJECT, self.spec.injection_char),
            options=self.spec.chat_template_kwargs,
        )
        self.check_ids(ids)
        return Prompt(tuple(ids), find_marker(ids, self.spec.injection_token_id))

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises an NLAError where the model lacks a token."""
        check_ids(self.tokenizer, ids, getattr(self.engine, "table_rows", None))

    def is_closed(self, ids: Sequence[int]) -> bool:
        """Whether ids end with, or overhang, the closing tag."""
        # Decoding each step would cost more than small models do; only ">" can close the tag.
        if ">" not in self._text_of(ids[-1]):
            return False
        return _CLOSE in self._decode(ids[-2 * len(_CLOSE) :])

    def _text_of(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._decode([token])
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def read(self, ids: Sequence[int]) -> Answer:
        """Reads an answer out of generated ids."""
        written = ids[:-1] if ids and ids[-1] in self.engine.eos_ids else ids
        raw_text = self._decode(written)
        # Cut off inside, or never opened: what was said, without the one tag that is there.
        said, close, _ = raw_text.partition(_CLOSE)
        before, opened, inside = said.partition(_OPEN)
        text = inside if opened else before
        is_over = not isinstance(ids, Unfinished)
        if not is_over:
            # A tag, or a character, of which only the beginning is there.
            text = _without_beginning(text.rstrip("\ufffd"), _CLOSE if opened else _OPEN)
        return Answer(list(ids), raw_text, text.strip(), complete=bool(close), is_over=is_over)


def _without_beginning(text: str, tag: str) -> str:
    """A text without the part of a tag that it ends with."""
    cut = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
    return text[: len(text) - cut]
