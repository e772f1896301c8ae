"""What strangers wrote does nothing, wherever it stands; and nothing can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from nla_lens.foreign import harmless
from nla_lens.results.page import document

from .conftest import Visit
from .pages import good, row, story, token, write

EVIL = [
    "<img src=x onerror=\"window.hacked='img'\">",
    "</script><script>window.hacked='script'</script>",
    "<!-- <script> --> ]]> <![CDATA[ &lt;b&gt; &amp;",
    "\"'><svg onload=window.hacked='svg'>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<style>*{display:none}</style></noscript></textarea></title>",
    "javascript:window.hacked=1 {{ 7*7 }} ${7*7} \u2028\u2029 \\u003c \\",
    "\u202eright to left\u202c \u2066isolated \x1b[31m \x00 \ud83d",
    "__proto__",
]


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_what_strangers_wrote_does_nothing(visit: Visit, tmp_path: Path, evil: str) -> None:
    sample = {"text": evil, "cos": 0.5, "fve_nrm": 0.5}
    claims = [
        {"text": f"“{evil}”.", "kind": "sentence", "support": 0.1},
        {"text": evil, "kind": "quote", "in_context": False, "support": -0.1},
    ]
    said = {"text": evil, "hook_name": evil, "flags": [evil], "samples": [sample] * 2}
    rows = [
        row(0, evil, **said),
        row(1, evil, **said, claims=claims),
        row(2, evil, error=evil, text=None),
    ]
    between = {0: {"before": [evil], "after": [evil]}}
    doc = document(rows, name=evil, columns={evil: evil, "b": evil}, between=between)
    page = visit(write(tmp_path / "page.html", doc, doc, title=evil, about=evil))
    shown = harmless(evil)
    for i in range(3):
        token(page, i).click()
        expect(page.locator("aside .said").first).to_contain_text(shown.strip())
        page.keyboard.press("w")
    page.locator("#find").fill(shown[:8])
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(shown)
    expect(page.locator("nav b").first).to_have_text(shown)
    expect(page.locator("#columns dd").first).to_have_text(shown)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, svg, iframe, body style, a, object, embed").count() == 0
    assert page.locator("script").count() == 2
    assert page.evaluate("Object.prototype.polluted ?? ({}).x ?? null") is None


def test_nothing_can_be_loaded(visit: Visit, tmp_path: Path) -> None:
    """Even by a script of somebody who got in."""
    page = visit(write(tmp_path / "page.html", story()), quiet=False)
    put = "document.body.insertAdjacentHTML('beforeend', `{}`)"
    own = "document.body.append(Object.assign(document.createElement('script'), {})) "
    for attempt, directive in (
        (put.format("<img src=http://127.0.0.1:9/x>"), "img-src"),
        (put.format("<iframe src=http://127.0.0.1:9/x></iframe>"), "frame-src"),
        (put.format("<b onclick=1></b>"), "script-src-attr"),
        (own.replace("{}", "{textContent: 'window.hacked = 1'}"), "script-src-elem"),
        ("fetch('http://127.0.0.1:9/x').catch(() => 0)", "connect-src"),
    ):
        refused = page.evaluate(
            "attempt => new Promise((tell) => { addEventListener('securitypolicyviolation', "
            "(event) => tell(event.effectiveDirective), {once: true}); "
            f"{attempt}; }})"
        )
        assert refused == directive
    assert page.evaluate("window.hacked") is None


def test_writing_from_right_to_left_stays_in_its_place(visit: Visit, tmp_path: Path) -> None:
    arabic = good(1, "مرحبا بالعالم 123")
    page = visit(write(tmp_path / "page.html", arabic, story(), title="شجرة 45"))
    title, about = page.locator("h1").bounding_box(), page.locator("#find").bounding_box()
    assert title["x"] < about["x"]
    entry = page.locator("nav .doc").first
    assert entry.locator("small").inner_text().startswith("mean 0.900 · lowest 0.900")
