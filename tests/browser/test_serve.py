"""`nla-lens view --serve`: the page of a store that a job is still writing."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from nla_lens import open_store
from nla_lens.cli.page_server import make_server
from nla_lens.results.growing_store import GrowingStore

from .conftest import Visit
from .pages import row


@pytest.fixture
def store(tmp_path: Path) -> GrowingStore:
    return GrowingStore.create(
        tmp_path / "job", {}, n_rows=9, n_documents=3, user={"kind": "string"}
    )


@pytest.fixture
def address(store: GrowingStore) -> Iterator[str]:
    with make_server(open_store(store.path), 0, None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def shard(store: GrowingStore, first: int, n: int = 3) -> None:
    rows = [
        {
            **row(i, f" word{i}"),
            **{
                "document": i // 3,
                "raw_text": "",
                "token_ids": [],
                "complete": True,
                "mse_nrm": 0.1,
            },
            **{"flags": [], "samples": [], "error": None, "kind": "note"},
        }
        for i in range(first, first + n)
    ]
    store.write(first, rows)


def test_a_store_that_grows(visit: Visit, store: GrowingStore, address: str) -> None:
    page = visit(address)
    expect(page.locator("#about")).to_have_text(re.compile("^0 of 9 rows"))
    expect(page.locator("aside")).to_contain_text("Nothing was explained")
    shard(store, 0, 2)
    expect(page.locator("#text [data-row]")).to_have_count(2)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("p")
    page.keyboard.press("/")
    page.keyboard.type("text")
    expect(page.locator("#found")).to_have_text("2 found")
    shard(store, 2, 2)
    # What was looked at, held and searched for stays so.
    expect(page.locator("#text [data-row]")).to_have_count(3)
    expect(page.locator("nav .doc")).to_have_count(2)
    expect(page.locator("#found")).to_have_text("4 found")
    expect(page.locator(".here")).to_have_attribute("data-row", "1")
    expect(page.locator("aside .held")).to_be_visible()
    assert page.evaluate("performance.getEntriesByType('navigation')[0].type") == "navigate"
    shard(store, 4, 5)
    expect(page.locator("nav .doc")).to_have_count(3)
    expect(page.locator("#about")).to_have_text(re.compile("^9 rows"))
