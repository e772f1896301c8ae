"""Writes the gold explanation of a vector from its facts.

The phrasing is chosen by facts that are themselves in the vector, so the verbalizer can learn
it without guessing, and still several phrasings of every part occur.
"""

from __future__ import annotations

import random

import lexicon
from facts import KINDS, TOPICS, Facts

KIND_NOUNS = {"story": "story", "question": "question", "chat": "chat", "note": "casual note"}
TOPIC_ADJECTIVES = {"medicine": "medical", "animals": "animal"}
CLASSES = (*lexicon.GROUP_LABELS, "function", "mark", "fragment")

# {a} article, {adj} topic as adjective, {topic}, {Topic}; {k} kind; square brackets hold what
# is left out when there is no name or no place.
ABOUT = (
    "{A} {adj} {k}[ about {name}][ in {place}].",
    "This {k} is about {topic}[, with {name}][ in {place}].",
    "{Topic} is the subject of this {k}[ on {name}][, set in {place}].",
    "We are in {a} {adj} {k}[ with {name}][, somewhere in {place}].",
    "It reads like {a} {adj} {k}[ and {name} is in it][, the place being {place}].",
    "Here is a {k} that deals with {topic}[; {name} appears][ in {place}].",
)
ABOUT_UNKNOWN = (
    "A {k}[ about {name}][ in {place}], subject not clear yet.",
    "This {k}[ with {name}][ in {place}] has not shown its subject.",
    "A {k} without a clear subject so far[, on {name}][, set in {place}].",
    "We are in a {k}[ with {name}][, somewhere in {place}], but the subject is open.",
    "It reads like a {k}[ and {name} is in it][, the place being {place}]; no subject yet.",
)
STRANGE = (
    "Unfamiliar text, outside the small world I know[, though {name} is mentioned][ in {place}].",
    "I do not recognise this kind of text[, apart from {name}][ in {place}].",
    "This does not look like anything I was trained on[; {name} is named][ in {place}].",
    "The words are unfamiliar, so I cannot say what it is about[, only that {name} occurs]"
    "[ in {place}].",
    "Strange text of a kind unknown to me[, with the name {name}][ in {place}].",
)
QUOTE = (
    "It has just said “{q}”.",
    "The last words are “{q}”.",
    "So far it ends with “{q}”.",
    "The text has got as far as “{q}”.",
    "We have just read “{q}”.",
    "It breaks off after “{q}”.",
)
QUOTE_WHOLE = (
    "It begins with “{q}”.",
    "So far there is only “{q}”.",
    "The text opens with “{q}”.",
    "Only “{q}” has been said.",
    "We are right at the start, at “{q}”.",
)
NEXT = (
    "Next comes {x}.",
    "{X} should follow.",
    "It probably goes on with {x}.",
    "I expect {x} next.",
    "After that, {x} is likely.",
)
NEXT_OPEN = (
    "What follows is open.",
    "Many words could come next.",
    "It could go on in many ways.",
    "The next word is hard to guess.",
    "Nothing definite is expected next.",
)
BEGINNING = "The very beginning of a text; nothing has been said yet."


def explanation(facts: Facts, rng: random.Random | None = None) -> str:
    """Writes the explanation of one position.

    Args:
        facts: What the prefix says and what the source model expects next.
        rng: If given, phrasings and order are drawn at random instead of from the facts.
    """
    if facts.position == 0:
        return f"{BEGINNING} {_next(facts, 0)}"
    styles = _styles(facts) if rng is None else [rng.randrange(60) for _ in range(4)]
    about, quote = _about(facts, styles[0]), _quote(facts, styles[1])
    first, second = (quote, about) if styles[3] % 3 == 0 else (about, quote)
    return f"{first} {second} {_next(facts, styles[2])}"


def all_phrases() -> list[str]:
    """Returns texts that contain every word an explanation may use."""
    names = [f" {name} {name.lower()}" for name in [*lexicon.NAMES, *lexicon.PLACES]]
    frames = [*ABOUT, *ABOUT_UNKNOWN, *STRANGE, *QUOTE, *QUOTE_WHOLE, *NEXT, *NEXT_OPEN, BEGINNING]
    bare = [frame.replace("[", "").replace("]", "") for frame in frames]
    bare = [frame.replace("“{q}”", "“… ab” “A ") for frame in bare]
    bare = [frame.replace("{", " ").replace("}", " ") for frame in bare]
    marks = "a full stop A full stop a comma A comma a question mark A question mark a colon “ab"
    labels = [f"{label} {label.capitalize()}" for label in lexicon.GROUP_LABELS.values()]
    more = ["the end of the text The end of the text a new line A new line a space or A an An"]
    topics = [f" {_adjective(t)} {t} {t.capitalize()}" for t in lexicon.TOPICS]
    kinds = [f" {noun}" for noun in KIND_NOUNS.values()]
    return [*names, *bare, marks, *labels, *more, *topics, *kinds]


def _styles(facts: Facts) -> list[int]:
    group = {"mark": 0, "function": 2, "fragment": 1}.get(facts.last_class, 4)
    last = CLASSES.index(facts.last_class)
    about = TOPICS.index(facts.topic) + group + KINDS.index(facts.kind)
    coming = len(facts.next_words) + last + (facts.next_class is not None)
    return [about, last, coming, last + TOPICS.index(facts.topic)]


def _adjective(topic: str) -> str:
    return TOPIC_ADJECTIVES.get(topic, topic)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _about(facts: Facts, style: int) -> str:
    strange = facts.kind == "unfamiliar"
    frames = STRANGE if strange else ABOUT if facts.topic else ABOUT_UNKNOWN
    frame = frames[style % len(frames)]
    for key, value in (("name", facts.name), ("place", facts.place)):
        frame = _optional(frame, key, value)
    if strange:
        return frame
    frame = frame.replace("{k}", KIND_NOUNS[facts.kind])
    if facts.topic is None:
        return frame
    adjective = _adjective(facts.topic)
    article = _article(adjective)
    fills = {
        "{A}": article.capitalize(),
        "{a}": article,
        "{adj}": adjective,
        "{topic}": facts.topic,
        "{Topic}": facts.topic.capitalize(),
    }
    for slot, fill in fills.items():
        frame = frame.replace(slot, fill)
    return frame


def _optional(frame: str, key: str, value: str | None) -> str:
    end = frame.index("]", frame.index("{" + key + "}"))
    start = frame.rindex("[", 0, end)
    inside = frame[start + 1 : end].replace("{" + key + "}", value) if value else ""
    return frame[:start] + inside + frame[end + 1 :]


def _quote(facts: Facts, style: int) -> str:
    frames = QUOTE_WHOLE if facts.whole else QUOTE
    return frames[style % len(frames)].replace("{q}", facts.quote)


def _next(facts: Facts, style: int) -> str:
    if facts.next_words:
        *rest, last = facts.next_words
        what = f"{', '.join(rest)} or {last}" if rest else last
    elif facts.next_class:
        what = lexicon.GROUP_LABELS[facts.next_class]
    else:
        return NEXT_OPEN[style % len(NEXT_OPEN)]
    frame = NEXT[style % len(NEXT)]
    capital = what[0].upper() + what[1:]
    return frame.replace("{x}", what).replace("{X}", capital)
