"""What an explanation says of a vector: written from facts, and read out of text again.

A description begins with the last token, which the vector holds best, and ends with the last few
at the very end of the text. The first K+1 blocks of the source model, run on such a text and read
at its last token, are then a reconstructor before any training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LAST = re.compile(r'^"(.*?)" after "(.*?)"(?: in a |\. So far: )', re.DOTALL)
SO_FAR = "So far: "
_STOP_WORDS = (
    "about after also another because been before being between both could does each even every "
    "from have having here however into itself just like made make many more most much must never "
    "only other over same should some someone something such than that their them then there "
    "these they this those through under upon used using very were what when where which while "
    "will with within without would your"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True)
class Facts:
    """What is said of one position.

    Attributes:
        last: Text of the token there.
        before: Text of the token before it.
        tail: Text of the last few tokens up to it, the token included.
        kind: Kind of text.
        topics: Words of the text so far that the vector tells of.
        next_word: The token that the source model expects next, where it is sure enough.
    """

    last: str
    before: str
    tail: str
    kind: str
    topics: tuple[str, ...] = ()
    next_word: str = ""


def description(facts: Facts) -> str:
    """The whole description."""
    about = f" about {', '.join(facts.topics)}" if facts.topics else ""
    then = f'; next "{facts.next_word}"' if facts.next_word else ""
    what = f'"{facts.last}" after "{facts.before}"'
    return f"{what} in a {facts.kind}{about}{then}. {SO_FAR}{facts.tail}"


def ending(facts: Facts) -> str:
    """The last words alone: what a verbalizer learns to say first."""
    return f'"{facts.last}" after "{facts.before}". {SO_FAR}{facts.tail}'


def last_said(text: str) -> str | None:
    """The last token as a description says it at its beginning; None where it does not."""
    found = LAST.match(text)
    return found[1] if found else None


def before_said(text: str) -> str | None:
    """The token before the last as a description says it; None where it does not."""
    found = LAST.match(text)
    return found[2] if found else None


def tail_said(text: str) -> str:
    """The last words as a description says them at its end; empty where it does not."""
    return text.partition(SO_FAR)[2]


def kind_said(text: str) -> str | None:
    """The kind of text a description says; None where it says none."""
    found = re.match(r'^".*?" in a (\w+)', text, re.DOTALL)
    return found[1] if found else None


def topics_said(text: str) -> list[str]:
    """The topic words a description says."""
    found = re.match(r'^".*?" in a \w+ about ([\w, ]+?)(?:;|\. So far)', text, re.DOTALL)
    return found[1].split(", ") if found else []


def content_words(text: str) -> list[str]:
    """The words of a text that can be its topic, in lower case."""
    words = re.findall(r"[a-z]{4,}", text.lower())
    return [word for word in dict.fromkeys(words) if word not in STOP_WORDS]


def frequent(texts: Sequence[str], count: int, at_least: int = 8) -> list[str]:
    """The content words that occur in most texts."""
    seen: dict[str, int] = {}
    for text in texts:
        for word in content_words(text):
            seen[word] = seen.get(word, 0) + 1
    ranked = sorted(seen, key=lambda word: (-seen[word], word))
    return [word for word in ranked[:count] if seen[word] >= at_least]
