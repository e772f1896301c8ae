"""A real Chromium for `make test-browser`, which alone collects the tests here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

if "NLA_LENS_TEST_BROWSER" not in os.environ or find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]

Visit = Callable[..., "Page"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.fail("there is no chromium here; Debian has it in a package of that name")
    # Chromium's sandbox is not for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens pages; in the end none of them may have complained or asked for anything."""
    heard: list[str] = []
    contexts = []

    def visit(
        where: str | Path, *, width: int = 1280, dark: bool = False, quiet: bool = True, **more: Any
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if dark else "light",
            **more,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        address = where.as_uri() if isinstance(where, Path) else where
        if quiet:
            page.on("console", lambda message: heard.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: heard.append(f"error: {error}"))
            page.on("dialog", lambda dialog: (heard.append("dialog"), dialog.dismiss()))
            page.on(
                "request",
                lambda request: (
                    None
                    if request.url.startswith(address.split("#")[0])
                    else heard.append(f"request: {request.url}")
                ),
            )
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert heard == []
