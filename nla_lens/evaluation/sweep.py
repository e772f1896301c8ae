"""`nla_lens.sweep`: what a model says and holds as it is steered more and more, beside controls.

>>> edit = explanation, explanation.text.replace("Naples", "Oslo")
>>> swept = nla_lens.sweep(model, "Nora lives in", edit, [0.5, 1, 2], nla=nla, toward=" Oslo")
>>> swept.plot()

A push in any direction changes a model. So each strength stands beside a random direction, and,
where an edit of a text is given, beside what the words of the edited text in random order give.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.checks import check_seed, is_int, is_number
from nla_lens.errors import NLAError
from nla_lens.evaluation.swept import NONE, RANDOM, SHUFFLED, VECTOR, Sweep, Swept
from nla_lens.halves.options import Options
from nla_lens.models.ambient import undisturbed
from nla_lens.nla import NLA
from nla_lens.results.explanation import Explanation
from nla_lens.stream.explainer import check_nla
from nla_lens.stream.extraction import Text, encode, open_source, read_prompts
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.patching import logits
from nla_lens.stream.steering import Steering, steer
from nla_lens.stream.trail import Wanted

_TOP: Final = 5


@undisturbed()
def sweep(
    model: Any,
    prompt: Text,
    vector: Any,
    strengths: Sequence[float],
    controls: bool = True,
    *,
    nla: NLA | None = None,
    layer: int | None = None,
    positions: Wanted = -1,
    steps: Wanted = None,
    max_new_tokens: int = 16,
    toward: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    **options: Any,
) -> Sweep:
    """Steers a model at several strengths, and says what it then writes and holds.

    Args:
        model: As in `steer`; or the name of a checkpoint.
        prompt: A text, or chat messages.
        vector: `[d]`, or an edit: (explanation, edited text), which needs `nla`.
        strengths: In units of the residual's norm.
        controls: Also at each strength: a random direction and, of an edit, the edited text with
            its words in random order.
        nla: Explains the steered residual at the prompt's last token; and see `steer`.
        layer: As in `steer`.
        positions: As in `steer`.
        steps: As in `steer`.
        max_new_tokens: How far the model goes on; 0: the next token alone.
        toward: A text: the probability of its first token is followed.
        tokenizer: Instead of the model's own.
        seed: Of the controls.
        **options: Those of `NLA.explain`.

    Returns:
        The rows, first that of the model as it is; `.to_pandas()`, `.plot()`.

    Raises:
        NLAError: As `steer`; no strengths; an edit without an NLA that has a reconstructor.
    """
    check_seed(seed, may_be_none=False)
    listed = _strengths(strengths)
    if not is_int(max_new_tokens) or max_new_tokens < 0:
        raise NLAError(f"max_new_tokens={max_new_tokens!r} must be 0 or more")
    if nla is not None:
        check_nla(nla)
        nla.check_options(Options.of(options))
    edit = _edit(vector)
    if edit is not None:
        vector = _difference(nla, *edit)
    source: Any = open_source(model, tokenizer=tokenizer)
    model = getattr(source, "model", model)
    where: dict[str, Any] = {"positions": positions, "steps": steps, "nla": nla}
    first = steer(model, vector, layer=layer, **where)
    directions = {VECTOR: vector}
    if controls:
        directions |= _controls(edit, nla, len(first.vector_D), seed)
    steerings = [
        (name, steer(model, direction, strength=s, layer=first.place.layer, **where))
        for name, direction in directions.items()
        for s in listed
    ]
    ids = encode(source, prompt, for_answer=True)
    wanted = None if toward is None else _first_token(source.tokenizer, toward)
    read_at = None if nla is None else nla.spec.place or first.place
    runs = [
        _run(source, model, ids, how, max_new_tokens, read_at)
        for how in (None, *(how for _, how in steerings))
    ]
    explained: list[Any] = [None] * len(runs)
    if nla is not None:
        explained = list(nla.explain_iter([run.resid_D for run in runs], **options))
    names = [(NONE, 0.0), *((name, how.strength) for name, how in steerings)]
    rows = tuple(
        _row(name, strength, run, runs[0], wanted, source.tokenizer, said)
        for (name, strength), run, said in zip(names, runs, explained, strict=True)
    )
    read = prompt if isinstance(prompt, str) else source.tokenizer.decode(ids)
    token = None if wanted is None else source.tokenizer.decode([wanted])
    return Sweep(rows, read, first.place.name, token)


def _strengths(strengths: Sequence[float]) -> list[float]:
    try:
        listed = list(strengths)
    except TypeError:
        listed = []
    if not listed or not all(is_number(s) and math.isfinite(s) for s in listed):
        raise NLAError(f"strengths={strengths!r:.80} must be finite numbers, at least one")
    return [float(s) for s in listed]


def _edit(vector: Any) -> tuple[str, str] | None:
    """The texts of an edit; None for a vector."""
    if not isinstance(vector, (tuple, list)) or len(vector) != 2:
        return None
    if not all(isinstance(part, (str, Explanation)) for part in vector):
        return None
    return str(vector[0]), str(vector[1])


def _difference(nla: NLA | None, text: str, edited: str) -> Tensor:
    if nla is None or nla.reconstructor is None:
        raise NLAError("an edit of a text becomes a vector by a reconstructor; pass nla= with one")
    if text == edited:
        raise NLAError("the edited text is the text itself: there is no direction in it")
    return nla.steering_vector(text, edited)


def _controls(
    edit: tuple[str, str] | None, nla: NLA | None, d_model: int, seed: int
) -> dict[str, Tensor]:
    """Directions that mean nothing; their lengths do not matter."""
    found = {RANDOM: torch.randn(d_model, generator=torch.Generator().manual_seed(seed))}
    if edit is not None:
        words = edit[1].split()
        random.Random(seed).shuffle(words)
        shuffled = " ".join(words)
        if shuffled not in edit:
            found[SHUFFLED] = _difference(nla, edit[0], shuffled)
    return found


@dataclass(frozen=True)
class _Run:
    """One run: log-probabilities of the next token, what was written, the residual."""

    next_V: Tensor
    written: list[int]
    resid_D: Tensor | None


@torch.no_grad()
def _run(
    source: Any, model: Any, ids: list[int], how: Steering | None, n: int, place: ResidPost | None
) -> _Run:
    at = len(ids) - 1
    # Entered anew for each pass, so that none of them is a step of the one before.
    logits_BTV = _within(how, lambda: logits(model, torch.tensor([ids]), ResidPost(0), None))
    written = _within(how, lambda: source.go_on(ids, n)) if n else []
    resid_D = None
    if place is not None:
        (resid_ND,) = _within(how, lambda: read_prompts(source, [ids], [[at]], place))
        resid_D = resid_ND[0]
    return _Run(logits_BTV[0, at].float().log_softmax(-1).cpu(), written, resid_D)


def _within(how: Steering | None, call: Callable[[], Any]) -> Any:
    with nullcontext() if how is None else how:
        return call()


def _row(
    name: str,
    strength: float,
    run: _Run,
    base: _Run,
    wanted: int | None,
    tokenizer: Any,
    said: Explanation | None,
) -> Swept:
    next_V, before_V = run.next_V.double(), base.next_V.double()
    likeliest = run.next_V.topk(_TOP)
    top = tuple(
        (str(tokenizer.decode([token])), math.exp(value))
        for token, value in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    )
    return Swept(
        name,
        strength,
        tokenizer.decode(run.written),
        float((before_V.exp() * (before_V - next_V)).nan_to_num().sum()),
        top,
        None if wanted is None else float(next_V[wanted].exp()),
        said,
    )


def _first_token(tokenizer: Any, text: Any) -> int:
    is_said = isinstance(text, str) and text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if is_said else []
    if not ids:
        raise NLAError(f"toward={text!r:.80} has no token to be followed")
    return int(ids[0])
