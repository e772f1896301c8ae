"""Documents to look at, made of rows without a model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import expect

from nla_lens.results.page import document, to_page

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

HOOK = "blocks.2.hook_resid_post"
WORDS = ["<s>", "Nora", " lives", " in", " Naples", ".", "\n\n", " The", " fox", " chased", " ␣"]


def row(position: int, token: str, **values: Any) -> dict[str, Any]:
    about = {"row": position, "position": position, "token": token, "hook_name": HOOK, "norm": 12.5}
    return {**about, "text": f"Text of {position}.", "cos": 0.9, "fve_nrm": 0.95, **values}


def story(**values: Any) -> dict[str, Any]:
    """One of each: special, low and negative scores, flags, a failure, samples."""
    special: dict[int, dict[str, Any]] = {
        2: {"fve_nrm": -0.4, "cos": 0.1, "flags": ["low_fidelity", "of_another_day"]},
        4: {"samples": [{"text": f"Sample {i}.", "cos": 0.8, "fve_nrm": 0.6} for i in range(3)]},
        7: {"fve_nrm": 0.3, "flags": ["truncated"]},
        8: {"error": "too long", "text": None, "cos": None, "fve_nrm": None, "norm": None},
    }
    rows = [row(i, word, **special.get(i, {})) for i, word in enumerate(WORDS)]
    return document(rows, name="A story", columns={"kind": "story", "place": "Naples"}, **values)


def good(n: int, name: str) -> dict[str, Any]:
    return document([row(i, f" word{i}", fve_nrm=0.9 + i / 1000) for i in range(n)], name=name)


def long_document(n: int) -> dict[str, Any]:
    """Texts as long as those of released pairs: 148 tokens, some 620 characters."""
    draw = random.Random(0)
    said = [f"{draw.choice('bcdfglmnprst')}{draw.choice('aeiou')}{i % 97}" for i in range(5000)]
    rows = [
        row(
            i,
            "\n\n" if i % 40 == 39 else " " + draw.choice(said),
            text=" ".join(draw.choices(said, k=128)),
            fve_nrm=draw.gauss(0.75, 0.15),
            flags=["low_fidelity"] if i % 97 == 0 else [],
        )
        for i in range(n)
    ]
    return document(rows, name="A long text")


def write(path: Path, *documents: dict[str, Any], title: str = "A page", **more: Any) -> Path:
    path.write_text(to_page(documents, title=title, **more), encoding="utf-8")
    return path


def token(page: Page, row: int) -> Locator:
    return page.locator(f"#text [data-row='{row}']")


def expect_at(page: Page, row: int) -> None:
    expect(page.locator(".here")).to_have_count(1)
    expect(page.locator(".here")).to_have_attribute("data-row", str(row))
