"""One HTML file to look at explanations in: it works from disk, and loads and asks for nothing.

What models and strangers wrote is data of the page, never its markup: it stands in a JSON block and
is shown as text. A content security policy names our own script and style by their hashes and
forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Final

from nla_lens.foreign import harmless
from nla_lens.results.explanation import Explanation
from nla_lens.results.templating import template

_TEMPLATES: Final = Path(__file__).parent / "templates"
_SCRIPTS: Final = ("view", "view_list", "view_text", "view_panel", "view_keys")
_SPECIAL: Final = re.compile(r"<\|?[^<>\s]+\|?>|\[[A-Z]+\]")
_NAME_LENGTH: Final = 60
_COLUMN_LENGTH: Final = 500
_TABLE_ROWS: Final = 100
"""Of the table that is shown where no script runs."""


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
    css, js = _asset("view.css"), "".join(_asset(f"{name}.js") for name in _SCRIPTS)
    policy = [
        "default-src 'none'",
        f"script-src {_hashed(js)}",
        f"style-src {_hashed(css)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if live is not None:
        policy.append("connect-src 'self'")
    rows = [cells for one in documents for cells in _cells(one)]
    return template("view.html.jinja").render(
        title=_shown(title),
        about=_shown(about),
        policy="; ".join(policy),
        css=css,
        js=js,
        data=to_data(documents, live=live),
        rows=rows[:_TABLE_ROWS],
        left_out=max(0, len(rows) - _TABLE_ROWS),
    )


def to_frame(page: str) -> str:
    """A page inside of another, as notebooks show it: its script reaches nothing around it."""
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(page)}" width="100%" height="460" '
        'style="border: 1px solid #dde2e9; border-radius: 6px"></iframe>'
    )


def to_data(documents: Sequence[Mapping[str, Any]], *, live: str | None = None) -> str:
    """What the page shows, as JSON that cannot end the block it stands in; see `to_page`."""
    data = {"documents": list(documents), "live": live is not None, "token": live}
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


def document(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str | None = None,
    between: Mapping[int, Mapping[str, Sequence[str]]] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One text and what was said at its tokens.

    Of `tokens`, those that stand alone were explained, row by row, and those in a list were not.

    Args:
        rows: In order, as `results.rows` makes them, or `Explanation.to_dict`.
        name: What the list of documents calls it; None: how it begins.
        between: Tokens that were not explained, by the number of the row they stand at: `before` it
            and `after` it.
        columns: The user's own values.
    """
    tokens: list[str | list[str]] = []
    special: set[int] = set()
    shown: list[dict[str, Any]] = []
    hook_name = None

    def add(text: str | None, explained: bool) -> None:
        if text is not None and _SPECIAL.fullmatch(text):
            special.add(len(tokens))
        word = "●" if text is None else _shown(text)
        tokens.append(word if explained else [word])

    for row in rows:
        around = (between or {}).get(row.get("row", -1), {})
        for text in around.get("before", ()):
            add(text, False)
        add(row.get("token"), True)
        hook_name = hook_name or _shown(row.get("hook_name"))
        shown.append(_row(row, hook_name))
        for text in around.get("after", ()):
            add(text, False)
    words = ("".join(token) for i, token in enumerate(tokens) if i not in special)
    begins = " ".join("".join(islice(words, _NAME_LENGTH)).split())[:_NAME_LENGTH]
    return {
        "name": _shown(name or begins or "vectors"),
        "hook": hook_name,
        "tokens": tokens,
        "special": sorted(special),
        "rows": shown,
        "columns": {
            _shown(key): _shown(_clipped(str(value)))
            for key, value in (columns or {}).items()
            if value is not None
        },
    }


def _row(row: Mapping[str, Any], hook_name: str | None) -> dict[str, Any]:
    """What the page needs of a row, under names of one letter: there are many.

    What is not known is left out, and so is a hook that is the document's.
    """
    hook = _shown(row.get("hook_name"))
    return _known(
        p=row.get("position"),
        x=_shown(row.get("text")),
        n=_rounded(row.get("norm")),
        h=None if hook == hook_name else hook,
        g=[_shown(flag) for flag in row.get("flags") or ()],
        e=_shown(row.get("error")),
        u=_rounded(row.get("trust")),
        s=[
            _known(x=_shown(sample["text"]), **_scores(sample))
            for sample in row.get("samples") or ()
        ],
        k=[_claim(claim) for claim in row.get("claims") or ()],
        **_scores(row),
    )


def _scores(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {"c": _rounded(row.get("cos")), "f": _rounded(row.get("fve_nrm"))}


def _claim(claim: Mapping[str, Any]) -> dict[str, Any]:
    return _known(
        x=_shown(claim["text"]),
        q=1 if claim["kind"] == "quote" else None,
        u=_rounded(claim.get("support")),
        i=None if claim.get("in_context") is None else int(claim["in_context"]),
        a=_rounded(claim.get("agreement")),
    )


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != []}


def _cells(one: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The rows of the table that is shown where no script runs."""
    explained = (token for token in one["tokens"] if isinstance(token, str))
    for token, row in zip(explained, one["rows"], strict=True):
        said, flags = row.get("x", row.get("e")), " ".join(row.get("g", ()))
        yield [row.get("p", ""), token, said, row.get("f", ""), row.get("c", ""), flags]


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
    # What is no number is no JSON, and as a score it is none.
    return round(value, 4) if value is not None and math.isfinite(value) else None


def _clipped(text: str) -> str:
    return text if len(text) <= _COLUMN_LENGTH else text[:_COLUMN_LENGTH] + " …"


def _shown(text: Any) -> Any:
    return harmless(text) if isinstance(text, str) else text


@cache
def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hashed(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
