"""Generates the documents of the small world; standard library only.

``python corpus.py --seed 7 --documents 3`` prints one JSON object per line with ``text``,
``kind``, ``topic``, ``name`` and ``place``. The same seed gives the same documents everywhere.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import lexicon
import sentences
import unfamiliar

SLOT = re.compile(r"\{(?:(a|A):)?(\w+)\}")
CROP_SHARE = 0.45
TYPO_SHARE = 0.04


@dataclass(frozen=True)
class Document:
    """One text of the small world and what was drawn to write it.

    Attributes:
        text: The document.
        kind: story, question, chat, note, unfamiliar or mixed.
        topic: One of ``lexicon.TOPICS``; None in unfamiliar text.
        name: The person it may mention; a cropped text may have lost the mention.
        place: The place it may mention, likewise.
    """

    text: str
    kind: str
    topic: str | None
    name: str | None
    place: str | None


@dataclass(frozen=True)
class Person:
    """Who a text is about: a name or None, and the words that stand for them."""

    name: str | None
    subject: str
    possessive: str
    object: str


def documents(seed: int, count: int) -> Iterator[Document]:
    """Yields ``count`` documents, the same ones for the same seed.

    Args:
        seed: Seed of the generator.
        count: How many documents.
    """
    rng = random.Random(seed)
    for _ in range(count):
        yield document(rng)


def document(rng: random.Random, plain: bool = False) -> Document:
    """Draws one document.

    Args:
        rng: Source of randomness.
        plain: Whether to leave out everything unfamiliar.
    """
    kind = rng.choices(
        ("story", "question", "chat", "note", "unfamiliar", "mixed"),
        weights=(58, 10, 10, 9, 0, 0) if plain else (58, 10, 10, 9, 11, 2),
    )[0]
    if kind == "unfamiliar":
        return Document(unfamiliar.document(rng), kind, None, None, None)
    topic = rng.choice(lexicon.TOPICS)
    person = _person(rng)
    place = rng.choice(lexicon.PLACES)
    writer = {"question": _questions, "chat": _chat, "note": _notes}.get(kind, _story)
    text = writer(rng, topic, person, place)
    if kind == "mixed":
        text = f"{text} {unfamiliar.document(rng)}"
    elif rng.random() < TYPO_SHARE and not plain:
        text = _with_typo(rng, text)
    if rng.random() < CROP_SHARE:
        text = _crop(rng, text)
    return Document(text, kind, topic, person.name, place)


def crop_words() -> frozenset[str]:
    """Returns the words at which a cropped text may begin."""
    starts = lexicon.words(
        "the The a A and but in In on On at with of to for from by after After because near about "
        "was were had is it It she She he He they They we We I my My her his our their not no "
        "before when asked said took more too very left went made came under behind next"
    )
    return frozenset([*starts, *lexicon.NAMES, *lexicon.PLACES])


def _person(rng: random.Random) -> Person:
    draw = rng.random()
    if draw < 0.75:
        girl = rng.random() < 0.5
        name = rng.choice(lexicon.GIRLS if girl else lexicon.BOYS)
        return Person(name, "she", "her", "her") if girl else Person(name, "he", "his", "him")
    choices = (("we", "our", "us"), ("they", "their", "them"), ("I", "my", "me"))
    return Person(None, *rng.choice(choices))


def _fill(rng: random.Random, text: str, topic: str, person: Person, place: str) -> str:
    """Replaces every slot of a template; two slots of one group get different words."""
    used: set[str] = set()

    def draw(match: re.Match[str]) -> str:
        article, slot = match.groups()
        fixed = {
            "N": person.name or person.subject,
            "P": place,
            "s": person.subject,
            "his": person.possessive,
            "him": person.object,
        }
        if slot == "S":
            use_name = person.name is not None and rng.random() < 0.35
            return person.name if use_name else _capital(person.subject)
        if slot in fixed:
            return fixed[slot]
        group = lexicon.GROUPS[topic].get(slot) or lexicon.SHARED[slot]
        word = rng.choice([word for word in group if word not in used])
        used.add(word)
        if article is None:
            return word
        an = word[0] in "aeiou"
        return f"{article}{'n' if an else ''} {word}"

    return SLOT.sub(draw, text)


def _capital(word: str) -> str:
    return word[0].upper() + word[1:]


def _opener(rng: random.Random, person: Person) -> str | None:
    draw = rng.random()
    if person.name is None:
        return rng.choice(sentences.PLACE_OPENERS) if draw < 0.5 else None
    if draw < 0.6:
        return rng.choice(sentences.OPENERS)
    if draw < 0.8:
        return rng.choice(sentences.NAME_OPENERS)
    return None


def _story(rng: random.Random, topic: str, person: Person, place: str) -> str:
    opener = _opener(rng, person)
    count = rng.randint(1, 3) if opener else rng.randint(2, 3)
    templates = rng.sample(sentences.SENTENCES[topic], count)
    parts = [opener, *templates] if opener else templates
    return " ".join(_fill(rng, part, topic, person, place) for part in parts)


def _things(rng: random.Random, topic: str) -> dict[str, str]:
    groups = [g for name, g in lexicon.GROUPS[topic].items() if name not in lexicon.VERB_GROUPS]
    first, second = rng.sample([word for group in groups for word in group], 2)
    return {"{x}": first, "{y}": second}


def _with_things(rng: random.Random, template: str, topic: str) -> str:
    for slot, word in _things(rng, topic).items():
        template = template.replace(slot, word)
    return template


def _questions(rng: random.Random, topic: str, person: Person, place: str) -> str:
    templates = rng.sample(sentences.QUESTIONS, rng.randint(2, 3))
    parts = [_with_things(rng, template, topic) for template in templates]
    opener = _opener(rng, person)
    if opener and rng.random() < 0.5:
        parts.insert(0, opener)
    return " ".join(_fill(rng, part, topic, person, place) for part in parts)


def _chat(rng: random.Random, topic: str, person: Person, place: str) -> str:
    first = person.name or rng.choice(lexicon.NAMES)
    second = rng.choice([name for name in lexicon.NAMES if name != first])
    lines = []
    for turn in range(rng.randint(2, 4)):
        pool = sentences.CHAT_ANSWERS if turn % 2 else sentences.CHAT_ASKS
        line = _with_things(rng, rng.choice(pool), topic)
        lines.append(f"{second if turn % 2 else first}: {line}")
    return " ".join(_fill(rng, line, topic, person, place) for line in lines)


def _notes(rng: random.Random, topic: str, person: Person, place: str) -> str:
    templates = rng.sample(sentences.NOTES, rng.randint(2, 4))
    lines = [_with_things(rng, template, topic) for template in templates]
    name = person.name or rng.choice(lexicon.NAMES)
    lines = [line.replace("{n}", name).replace("{p}", place) for line in lines]
    return ", ".join(_fill(rng, line, topic, person, place) for line in lines).lower()


def _with_typo(rng: random.Random, text: str) -> str:
    parts = text.split(" ")
    parts[rng.randrange(len(parts))] = unfamiliar.pseudo_word(rng)
    return " ".join(parts)


def _crop(rng: random.Random, text: str) -> str:
    """Starts the text at a random word, leaving at least four words."""
    parts = text.split(" ")
    starts = [i for i, word in enumerate(parts[:-4]) if i and word in crop_words()]
    return " ".join(parts[rng.choice(starts) :]) if starts else text


def main() -> None:
    """Prints documents as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=100)
    args = parser.parse_args()
    for item in documents(args.seed, args.documents):
        print(json.dumps(asdict(item), ensure_ascii=False))


if __name__ == "__main__":
    main()
