"""Draws the pictures of a page in docs/images: the included NLA's, light and dark.

    python docs/site/screenshots.py

Needs playwright and Debian's chromium, as `make test-browser` does.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import nla_lens

IMAGES = Path(__file__).parents[1] / "images"
TEXTS = (
    "The two governments signed a treaty. The chef fried the garlic in Oslo.",
    "Nora lives in Naples. The fox chased the dog out of the kennel.",
    "Who took the hockey stick on Monday? Liam did.",
    "It rains in Seoul, and the stock market fell by nine percent.",
)


def explanations() -> nla_lens.Explanations:
    """Every position of every text, claim by claim."""
    nla = nla_lens.NLA.from_pretrained("tiny")
    found = []
    for text in TEXTS:
        explained = nla.explain_text(text, progress=False)
        (read,) = nla_lens.extract(nla.spec.source_model, [text], nla.spec.layer)
        context = ""
        for e, vector in zip(explained, read, strict=True):
            context += "" if e.position == 0 else e.token
            found.append(nla_lens.examine(nla, e, vector=vector, context=context).explanation)
    return nla_lens.Explanations(found)


def main() -> None:
    program = shutil.which("chromium") or "chromium"
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = explanations().to_html(Path(folder) / "page.html")
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        for scheme in ("light", "dark"):
            view = {"width": 1180, "height": 640}
            page = browser.new_page(viewport=view, color_scheme=scheme)
            page.goto(page_file.as_uri())
            page.keyboard.press("w")
            page.wait_for_timeout(500)
            drawn = Image.open(io.BytesIO(page.screenshot()))
            # Few colours are in it: a palette is a third of the size.
            drawn.convert("RGB").quantize(128).save(IMAGES / f"page-{scheme}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
