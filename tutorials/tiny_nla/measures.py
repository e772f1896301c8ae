"""Measures of explanations against the vectors and the facts they are about."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import gold
import lexicon
import torch
from facts import Facts
from torch.nn import functional as F

from nla_lens.results.sentences import folded, quotes, sentences

QUOTED = re.compile(r"“[^”]*”")
NAME = re.compile(r"\b(" + "|".join(lexicon.NAMES) + r")\b", re.IGNORECASE)
PLACE = re.compile(r"\b(" + "|".join(lexicon.PLACES) + r")\b", re.IGNORECASE)
STRANGE = tuple(frame.split("[")[0].split(",")[0] for frame in gold.STRANGE)
EXPECTING = re.compile("|".join(max(re.split(r"{[xX]}", frame), key=len) for frame in gold.NEXT))
RETRIEVAL_SIZE = 80


def fve_nrm(guess_ND: torch.Tensor, vectors_ND: torch.Tensor, var_nrm: float) -> float:
    """Fraction of variance explained on normalised vectors: 1 - mean(2 (1 - cos)) / var_nrm.

    ``var_nrm`` is the mean over d of the squared distances at norm sqrt(d).
    """
    mse = 2 * (1 - F.cosine_similarity(guess_ND, vectors_ND))
    return 1 - mse.mean().item() / var_nrm


def retrieval(
    guess_ND: torch.Tensor, vectors_ND: torch.Tensor, size: int = RETRIEVAL_SIZE, rounds: int = 40
) -> float:
    """Share of texts whose reconstruction is nearest to the right one of ``size`` vectors."""
    generator = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(rounds):
        pick = torch.randperm(len(vectors_ND), generator=generator)[:size]
        similar = F.normalize(guess_ND[pick], dim=-1) @ F.normalize(vectors_ND[pick], dim=-1).T
        hits.append((similar.argmax(-1) == torch.arange(len(pick))).float().mean().item())
    return sum(hits) / len(hits)


def permuted(guess_ND: torch.Tensor) -> torch.Tensor:
    """Returns the reconstructions in another order, as if the texts had been shuffled."""
    order = list(range(len(guess_ND)))
    random.Random(0).shuffle(order)
    return guess_ND[order]


def is_strange(text: str) -> bool:
    """Tells whether an explanation calls the text unfamiliar."""
    return any(start in text for start in STRANGE)


def invented(text: str, prefix: str) -> bool:
    """Tells whether an explanation says a name that the text so far does not contain."""
    said = {name.lower() for name in NAME.findall(prefix)}
    return any(name.lower() not in said for name in NAME.findall(text))


def phrasings(texts: Sequence[str]) -> dict[str, int]:
    """Counts, for each part of an explanation, the phrasings that occur."""
    frames = {
        "about": gold.ABOUT,
        "about, no subject": gold.ABOUT_UNKNOWN,
        "unfamiliar": gold.STRANGE,
        "quote": gold.QUOTE,
        "quote at the start": gold.QUOTE_WHOLE,
        "next": gold.NEXT,
        "next open": gold.NEXT_OPEN,
    }
    patterns = {part: [_frame_pattern(frame) for frame in own] for part, own in frames.items()}
    return {
        part: sum(any(pattern.search(text) for text in texts) for pattern in own)
        for part, own in patterns.items()
    }


def _frame_pattern(frame: str) -> re.Pattern[str]:
    kinds = "|".join(gold.KIND_NOUNS.values())
    slots = {"{A}": "An?", "{a}": "an?", "{k}": f"(?:{kinds})", "{adj}": r"\w+"}
    pieces = re.split(r"(\{\w+\}|\[[^]]*\])", frame)
    body = "".join(
        slots.get(piece, "[^.]*") if piece[:1] in "{[" and piece else re.escape(piece)
        for piece in pieces
    )
    return re.compile(r"(?:^|[.?] )" + body)


def field_accuracy(
    texts: Sequence[str], facts: Sequence[Facts], prefixes: Sequence[str]
) -> dict[str, float]:
    """Shares of explanations that are right about each field.

    Args:
        texts: Explanations.
        facts: The true facts, in the same order.
        prefixes: The texts up to each position.
    """
    right: dict[str, list[bool]] = {}
    for text, fact, prefix in zip(texts, facts, prefixes, strict=True):
        bare = QUOTED.sub("", text)
        if fact.position:
            unfamiliar = fact.kind == "unfamiliar"
            right.setdefault("unfamiliar text recognised", []).extend(
                [is_strange(text)] * unfamiliar
            )
            right.setdefault("familiar text taken as such", []).extend(
                [not is_strange(text)] * (not unfamiliar)
            )
            right.setdefault("quote", []).append(f"“{fact.quote}”" in text)
        if fact.topic:
            names = {fact.topic, gold.TOPIC_ADJECTIVES.get(fact.topic, fact.topic)}
            right.setdefault("topic", []).append(any(n in bare.lower() for n in names))
        for key, pattern, value in (("name", NAME, fact.name), ("place", PLACE, fact.place)):
            found = pattern.findall(bare)
            if value:
                right.setdefault(key, []).append(found == [value])
            else:
                right.setdefault(f"no {key} where there is none", []).append(not found)
        right.setdefault("next", []).append(text.endswith(_next_part(gold.explanation(fact))))
        right.setdefault("invented name", []).append(invented(text, prefix))
    return {key: sum(values) / max(1, len(values)) for key, values in right.items()}


def errors(text: str, facts: Facts, prefix: str) -> set[str]:
    """What an explanation names that is wrong; what it leaves out is no error.

    Args:
        text: The explanation.
        facts: The true facts.
        prefix: The text up to the position.

    Returns:
        Any of "topic", "name" and "place" (another one than the text's), "quoted word" (what it
        says was just read is not how the text ends) and "expected word" (one that the source
        model does not expect).
    """
    listed = sentences(text)
    expecting = [sentence for sentence in listed if EXPECTING.search(sentence)]
    reading = [s for s in listed if QUOTED.search(s) and s not in expecting]
    about = " ".join(s for s in listed if s not in expecting and s not in reading).lower()
    named = QUOTED.sub("", " ".join(s for s in listed if s not in expecting))
    ending = folded(prefix.replace("\n", "\\n"))
    quoted = [quote for sentence in reading for quote in quotes(sentence)]
    expected = {word for sentence in expecting for word in quotes(sentence)}
    likely = {word for phrase in facts.next_words for word in quotes(phrase)}
    found = {
        "topic": {t for t in lexicon.TOPICS if _topic_pattern(t).search(about)} - {facts.topic},
        "name": set(NAME.findall(named)) - {facts.name},
        "place": set(PLACE.findall(named)) - {facts.place},
        "quoted word": [quote for quote in quoted if not ending.endswith(folded(quote))],
        "expected word": expected - likely,
    }
    return {kind for kind, wrong in found.items() if wrong}


def _topic_pattern(topic: str) -> re.Pattern[str]:
    adjective = gold.TOPIC_ADJECTIVES.get(topic, topic)
    return re.compile(rf"\b({topic}|{adjective})\b")


def _next_part(text: str) -> str:
    return text.rsplit(". ", 1)[-1]
