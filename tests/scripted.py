"""Engines that answer from a script, so that a test decides what a model writes and when it fails.

nla = scripted(nla, [" first", " second"])          # one answer per vector, in turn
nla = scripted(nla, answers, fail_after=2)          # raises after two rows
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nla_lens import NLA
from nla_lens.checkpoints.chat import Prompt
from nla_lens.engines import Job
from nla_lens.halves.reconstructor import Reconstructor
from nla_lens.halves.verbalizer import Verbalizer

EOS = 9_999
"""End-of-sequence of every scripted engine; an id that no tokenizer here has."""


class ScriptedVerbalizer:
    """Writes given texts, in batches as a model would; remembers the jobs it was given."""

    eos_ids = frozenset([EOS])

    def __init__(
        self,
        answers: Sequence[Sequence[int]],
        *,
        order: Sequence[int] | None = None,
        fail_after: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Args:
        answers: Token ids for each row.
        order: Rows in the order in which they finish; None is from the first on.
        fail_after: Raise when so many rows have been given out.
        error: What is raised.
        """
        self.answers, self.order = answers, order
        self.fail_after, self.error = fail_after, error or RuntimeError("the model fell over")
        self.jobs: list[Job] = []
        self.given: list[int] = []

    def embed(self, ids: Sequence[int]) -> Tensor:
        raise AssertionError("embed is not scripted")

    def generate(self, job: Job) -> Iterator[tuple[int, list[int]]]:
        self.jobs.append(job)
        for row in self.order or range(len(job.injected_ND)):
            if self.fail_after is not None and len(self.given) >= self.fail_after:
                raise self.error
            self.given.append(row)
            yield row, list(self.answers[row % len(self.answers)])


class ScriptedReconstructor:
    """Answers with given residuals, or raises; remembers the prompts."""

    def __init__(
        self, resid_ND: Tensor, *, fail_after: int | None = None, error: BaseException | None = None
    ) -> None:
        """Args:
        resid_ND: Handed out row after row, from the first again when they are used up.
        fail_after: Raise when so many calls have been answered.
        error: What is raised.
        """
        self.resid_ND = resid_ND
        self.fail_after, self.error = fail_after, error or RuntimeError("the backbone fell over")
        self.prompts: list[list[int]] = []
        self.calls = 0

    def last_resid(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        if self.fail_after is not None and self.calls >= self.fail_after:
            raise self.error
        self.calls += 1
        rows = [(len(self.prompts) + i) % len(self.resid_ND) for i in range(len(prompts))]
        self.prompts += [list(prompt) for prompt in prompts]
        return self.resid_ND[rows]


class Forbidden:
    """An engine that must not be called."""

    eos_ids = frozenset([EOS])

    def _refuse(self, *_: object) -> None:
        raise AssertionError("a model was run")

    embed = generate = last_resid = _refuse


def with_engines(nla: NLA, verbalizer: object, reconstructor: object = None) -> NLA:
    """The NLA with other engines; the head becomes the identity; None: no reconstructor."""
    av = nla.verbalizer
    prompt = Prompt(tuple(av.prompt_ids), av.marker_position)
    verb = Verbalizer(nla.spec, av.tokenizer, verbalizer, prompt)  # type: ignore[arg-type]
    if reconstructor is None:
        return NLA(verb)
    head = {"weight": torch.eye(nla.spec.d_model)}
    tokenizer = nla.reconstructor.tokenizer
    return NLA(verb, Reconstructor(nla.spec, tokenizer, reconstructor, head))  # type: ignore[arg-type]


def ids_of(nla: NLA, text: str, *, eos: bool = False) -> list[int]:
    """A text as the verbalizer's tokens."""
    ids = nla.verbalizer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, *([EOS] if eos else [])]


def scripted(
    nla: NLA,
    texts: Sequence[str],
    *,
    eos: bool = False,
    resid_ND: Tensor | None = None,
    **script: object,
) -> NLA:
    """An NLA whose verbalizer writes these texts, one per row, and so on from the first again."""
    engine = ScriptedVerbalizer([ids_of(nla, text, eos=eos) for text in texts], **script)  # type: ignore[arg-type]
    return with_engines(nla, engine, None if resid_ND is None else ScriptedReconstructor(resid_ND))
