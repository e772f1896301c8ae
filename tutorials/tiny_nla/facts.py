"""What a prefix of a text says for certain: the facts that explanations are made of.

Every fact depends on the prefix alone, never on how the document goes on, so that a residual
vector can carry it and an explanation can be right or wrong about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lexicon
from tokenizers import Tokenizer

KINDS = ("story", "question", "chat", "note", "unfamiliar")
TOPICS = (None, *lexicon.TOPICS)
NAMES = (None, *lexicon.NAMES)
PLACES = (None, *lexicon.PLACES)
UNFAMILIAR_SHARE = 0.3
QUOTED = 3


@dataclass(frozen=True)
class Facts:
    """The facts of one position.

    Attributes:
        position: Token position; 0 is the beginning-of-text token.
        kind: One of ``KINDS``.
        topic: Topic of the latest word that belongs to one topic only, or None.
        name: The latest name mentioned, or None.
        place: The latest place mentioned, or None.
        quote: The last words of the prefix.
        whole: Whether the quote is all of the text so far.
        last_class: Word group of the last token, or "function", "mark", "fragment".
        next_words: How the likely next tokens are called, none if no token is likely.
        next_class: Word group of the next token if only that is likely, else None.
    """

    position: int
    kind: str
    topic: str | None
    name: str | None
    place: str | None
    quote: str
    whole: bool
    last_class: str
    next_words: tuple[str, ...] = ()
    next_class: str | None = None


class WordTables:
    """Looks up what each token of the vocabulary stands for.

    Attributes:
        classes: Word group per token id.
        names, places, topics: The name, place or topic a token id stands for, or None.
        familiar: Whether a token id occurs in familiar text.
    """

    def __init__(self, tokenizer: Tokenizer, familiar_pieces: set[str]):
        size = tokenizer.get_vocab_size()
        self.tokenizer = tokenizer
        self.surface = [tokenizer.decode([i], skip_special_tokens=False) for i in range(size)]
        self.familiar = [tokenizer.id_to_token(i) in familiar_pieces for i in range(size)]
        words = [text.strip() for text in self.surface]
        by_name = {form: name for name in lexicon.NAMES for form in (name, name.lower())}
        by_place = {form: place for place in lexicon.PLACES for form in (place, place.lower())}
        by_topic, by_group = _word_groups()
        self.names = [by_name.get(word) for word in words]
        self.places = [by_place.get(word) for word in words]
        self.topics = [by_topic.get(word) for word in words]
        self.notes = [
            word in lexicon.NOTE_WORDS or (word in (by_name | by_place) and word.islower())
            for word in words
        ]
        self.starts = [word in lexicon.QUESTION_STARTS for word in words]
        self.classes = [
            "name"
            if self.names[i]
            else "place"
            if self.places[i]
            else by_group.get(word) or self._plain_class(i)
            for i, word in enumerate(words)
        ]

    def _plain_class(self, token_id: int) -> str:
        text = self.surface[token_id].strip()
        if not any(character.isalpha() for character in text):
            return "mark"
        return "function" if self.familiar[token_id] else "fragment"

    def prefix_facts(self, ids: Sequence[int], quotes: bool = True) -> list[Facts]:
        """Returns the facts at every position of one tokenized text.

        Args:
            ids: Token ids, the beginning-of-text token first.
            quotes: Whether to write the quotations too, which takes most of the time.
        """
        name = place = topic = None
        kind, questioning, chatting, noting, strange = "story", False, False, False, 0
        out = []
        for position, token in enumerate(ids):
            if position:
                name = self.names[token] or name
                place = self.places[token] or place
                topic = self.topics[token] or topic
                chatting |= self.surface[token] == ":"
                noting |= self.notes[token]
                questioning |= self.starts[token] or self.surface[token] == "?"
                strange += not self.familiar[token]
            unfamiliar = strange >= UNFAMILIAR_SHARE * max(position, 1)
            if position and unfamiliar:
                kind = "unfamiliar"
            else:
                kind = "chat" if chatting else "note" if noting else "story"
                kind = "question" if kind == "story" and questioning else kind
            quote, whole = self.quote(ids[: position + 1]) if quotes else ("", False)
            out.append(
                Facts(
                    position,
                    kind,
                    None if kind == "unfamiliar" else topic,
                    name,
                    place,
                    quote,
                    whole,
                    self.classes[token],
                )
            )
        return out

    def quote(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Returns the last tokens as text, and whether nothing stands before them.

        Args:
            ids: Token ids of a prefix, the beginning-of-text token first.
        """
        body = list(ids[1:])
        text = self.tokenizer.decode(body[-QUOTED:], skip_special_tokens=False)
        if len(body) <= QUOTED:
            return text.strip().replace("\n", "\\n"), True
        if text[0] in ".?!" and text[1:2] == " ":
            text = text[1:]
        return "…" + text.replace("\n", "\\n"), False

    def next_name(self, token: int) -> str:
        """Returns how an explanation calls a token that is expected next."""
        text = self.surface[token]
        plain = {
            ".": "a full stop",
            ",": "a comma",
            "?": "a question mark",
            ":": "a colon",
            "</s>": "the end of the text",
            "\n": "a new line",
        }
        return plain.get(text.strip(" "), f"“{text.strip()}”" if text.strip() else "a space")


def _word_groups() -> tuple[dict[str, str], dict[str, str]]:
    """Maps words to their topic (where they have one only) and to their group."""
    owners: dict[str, set[str]] = {}
    groups: dict[str, str] = {}
    for group, words in lexicon.SHARED.items():
        for word in words:
            groups.setdefault(word, group)
            owners.setdefault(word, set()).add("")
    for topic, parts in lexicon.GROUPS.items():
        for group, words in parts.items():
            for word in words:
                groups.setdefault(word, group)
                owners.setdefault(word, set()).add(topic)
    topics = {word: next(iter(own)) for word, own in owners.items() if len(own) == 1}
    return {word: topic for word, topic in topics.items() if topic}, groups
