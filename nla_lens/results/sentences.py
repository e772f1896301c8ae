"""What an explanation claims: its sentences, and the spans it quotes.

>>> sentences("It reads like a story. It ends with “… the garlic.”.")
['It reads like a story.', 'It ends with “… the garlic.”.']
>>> quotes("It ends with “… the garlic.”.")
['the garlic.']
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_OPEN: Final = {"“": "”", "«": "»", "„": "“", "「": "」", '"': '"'}
_ENDS: Final = frozenset(".!?…。\uff01\uff1f")
_QUOTED: Final = re.compile(r"“([^“”]+)”|«([^«»]+)»|„([^„“]+)“|「([^「」]+)」|\"([^\"\n]+)\"")
_ELLIPSIS: Final = re.compile(r"^(?:…|\.\.\.)\s*|\s*(?:…|\.\.\.)$")
_NAME: Final = re.compile(r"(?<![.!?“\"]\s)(?<!^)\b[A-Z][a-zA-Z]{2,}\b")
_NUMBER: Final = re.compile(r"\b\d[\d.,]*\b")


def sentences(text: str) -> list[str]:
    """The sentences of a text, as they stand there; a stop inside a quotation ends none."""
    found, start, closing = [], 0, ""
    for i, character in enumerate(text):
        if closing:
            closing = "" if character == closing else closing
        elif character in _OPEN:
            closing = _OPEN[character]
        at_end = i + 1 == len(text) or text[i + 1].isspace()
        if character == "\n" or (not closing and at_end and _ends(text[: i + 1], text[i + 1 :])):
            found.append(text[start : i + 1].strip())
            start, closing = i + 1, ""
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def _ends(before: str, after: str) -> bool:
    """Whether a sentence ends here; with a stop inside a quotation, if the next one begins."""
    bare = before.rstrip("”»」\"')")
    following = after.lstrip()
    return bool(bare) and bare[-1] in _ENDS and (bare == before or not following[:1].islower())


def quoted_spans(text: str) -> list[tuple[int, int]]:
    """Where quotations stand, marks included."""
    return [match.span() for match in _QUOTED.finditer(text)]


def quotes(text: str) -> list[str]:
    """What is quoted, without marks and without the dots that say that it goes on."""
    found = (next(filter(None, match.groups())) for match in _QUOTED.finditer(text))
    return [bare for bare in (_ELLIPSIS.sub("", quoted).strip() for quoted in found) if bare]


def names_and_numbers(text: str) -> list[str]:
    """Capitalised words that begin no sentence, and numbers, outside quotations."""
    plain = _QUOTED.sub(" ", text)
    return [*_NAME.findall(plain), *(n.rstrip(".,") for n in _NUMBER.findall(plain))]


def folded(text: str) -> str:
    """A text without regard to case, spaces and forms of the same character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def stands_in(quoted: str, context: str) -> bool:
    """Whether a quotation stands verbatim in what was read so far, case and spaces aside."""
    return folded(quoted) in folded(context)
