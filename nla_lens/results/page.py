"""One HTML file to look at explanations in: it works from disk, and loads and asks for nothing.

What models and strangers wrote is data of the page, never its markup: it stands in a JSON block and
is shown as text. A content security policy names our own script and style by their hashes and
forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from nla_lens.foreign import harmless
from nla_lens.results.explanation import Explanation
from nla_lens.results.templating import template

_TEMPLATES: Final = Path(__file__).parent / "templates"
_SPECIAL: Final = re.compile(r"<\|?[^<>\s]+\|?>|\[[A-Z]+\]")
_NAME_LENGTH: Final = 60


def to_page(
    documents: Sequence[Mapping[str, Any]],
    *,
    title: str,
    about: str = "",
    live: str | None = None,
) -> str:
    """The page.

    Args:
        documents: As `document` makes them.
        title: Its heading.
        about: A line beside it.
        live: Of a page that follows a job: what `state` says as long as the page is up to date.
    """
    css, js = _asset("view.css"), _asset("view.js")
    policy = [
        "default-src 'none'",
        f"script-src {_hashed(js)}",
        f"style-src {_hashed(css)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if live is not None:
        policy.append("connect-src 'self'")
    data = {"documents": list(documents), "live": live is not None, "token": live}
    return template("view.html.jinja").render(
        title=_shown(title),
        about=_shown(about),
        policy="; ".join(policy),
        css=css,
        js=js,
        data=_json(data),
    )


def document(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str | None = None,
    between: Mapping[int, Mapping[str, Sequence[str]]] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One text and what was said at its tokens.

    Args:
        rows: In order, as `results.rows` makes them.
        name: What the list of documents calls it; None: how it begins.
        between: Tokens that were not explained, by the number of the row they stand at: `before` it
            and `after` it.
        columns: The user's own values.
    """
    tokens: list[list[Any]] = []
    shown: list[dict[str, Any]] = []
    for row in rows:
        around = (between or {}).get(row.get("row", -1), {})
        tokens += [_token(text, -1) for text in around.get("before", ())]
        tokens.append(_token(row.get("token"), len(shown)))
        shown.append(_row(row))
        tokens += [_token(text, -1) for text in around.get("after", ())]
    begins = "".join(text for text, _, special in tokens if not special)
    return {
        "name": _shown(name or " ".join(begins.split())[:_NAME_LENGTH] or "vectors"),
        "tokens": tokens,
        "rows": shown,
        "columns": {k: v for k, v in (columns or {}).items() if v is not None},
    }


def _token(text: str | None, row: int) -> list[Any]:
    shown = "●" if text is None else text
    return [_shown(shown), row, int(text is not None and bool(_SPECIAL.fullmatch(text)))]


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a row, under names of one letter: there are many."""
    return {
        "p": row.get("position"),
        "t": _shown(row.get("token")),
        "x": _shown(row.get("text")),
        "c": _rounded(row.get("cos")),
        "f": _rounded(row.get("fve_nrm")),
        "n": row.get("norm"),
        "h": row.get("hook_name"),
        "g": list(row.get("flags") or ()),
        "e": _shown(row.get("error")),
        "s": [
            {"x": _shown(s["text"]), "c": _rounded(s.get("cos")), "f": _rounded(s.get("fve_nrm"))}
            for s in row.get("samples") or ()
        ],
    }


def documents_of(explanations: Sequence[Explanation]) -> list[dict[str, Any]]:
    """Explanations as documents: a new one begins where positions do not go on."""
    groups: list[list[dict[str, Any]]] = []
    last = None
    for e in explanations:
        at = e.position
        if not groups or (at is not None and last is not None and at <= last):
            groups.append([])
        groups[-1].append({**e.to_dict(), "token": e.label})
        last = at
    return [document(group) for group in groups]


def _rounded(value: float | None) -> float | None:
    # A NaN is no JSON, and as a score it is none.
    return None if value is None or value != value else round(value, 4)


def _shown(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    return harmless(text.encode("utf-8", "backslashreplace").decode())


def _json(data: Any) -> str:
    """JSON that cannot end the block it stands in."""
    written = json.dumps(
        data, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str
    )
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


@cache
def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hashed(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
