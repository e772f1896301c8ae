"""The page, looked at: hovered, searched, by keyboard, on a phone, in the dark, without scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from nla_lens import NLA, examine, extract
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations

from .conftest import Visit
from .pages import expect_at, good, story, token, write

if TYPE_CHECKING:
    pass


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write(tmp_path / "page.html", story(), good(20, "A good one"), good(30, "Another"))


# --- looking at it --------------------------------------------------------------------------------


def test_what_is_shown(visit: Visit, three: Path) -> None:
    page = visit(three)
    expect(page).to_have_title("A page")
    expect(page.locator("nav .doc b")).to_have_text(["A story", "A good one", "Another"])
    expect(page.locator("nav .doc").first).to_contain_text("lowest failed · 2 flagged")
    expect(page.locator("#columns")).to_have_text("kind storyplace Naples")
    # The worst places come first: what failed, then what is lowest.
    worst = page.locator("#worst button")
    expect(worst).to_have_text(
        ["fox  failed", "lives  −0.400", "The  0.300", "<s>  0.950", "Nora  0.950"]
    )
    worst.nth(1).click()
    expect_at(page, 2)
    assert token(page, 0).get_attribute("class").split()[:2] == ["t", "special"]
    assert page.locator(".special").count() == 1
    # A token of line breaks is marked, and breaks the line; blanks stand outside of the colours.
    expect(token(page, 6)).to_have_text("⏎⏎")
    assert token(page, 7).bounding_box()["y"] > token(page, 5).bounding_box()["y"] + 40
    assert token(page, 2).inner_text() == "lives"
    assert page.locator(".part").first.inner_text().startswith("<s>Nora lives in Naples.")


def test_the_colours_are_those_of_the_legend(visit: Visit, three: Path, tmp_path: Path) -> None:
    page = visit(three)
    expect(page.locator("#scale span")).to_have_text(
        ["< 0", "0", "0.25", "0.5", "0.65", "0.8", "0.92"]
    )
    expect(page.locator("#unit")).to_have_text(
        "share of the vector's variance that the text gives back"
    )

    def colour(of: Any) -> str:
        return of.evaluate("element => getComputedStyle(element).backgroundColor")

    legend = [colour(page.locator("#scale span").nth(i)) for i in range(7)]
    assert len(set(legend)) == 7
    # -0.4, 0.3 and 0.95
    assert [colour(token(page, i)) for i in (2, 7, 3)] == [legend[0], legend[2], legend[6]]
    assert colour(token(page, 8)) not in legend
    # Another measure: cos is 0.9 but for one.
    page.locator("#measure").select_option("cos")
    assert [colour(token(page, i)) for i in (2, 7, 3)] == [legend[1], legend[5], legend[5]]
    # Without fve_nrm it is cos that is shown, and said.
    bare = write(
        tmp_path / "bare.html", {**story(), "tokens": ["a"], "rows": [{"x": "A text.", "c": 0.7}]}
    )
    page = visit(bare)
    expect(page.locator("#measure")).to_have_value("c")
    expect(page.locator("#unit")).to_contain_text("cosine")


def test_hover_and_hold(visit: Visit, three: Path) -> None:
    page = visit(three)
    said = page.locator("aside")
    token(page, 2).hover()
    expect_at(page, 2)
    expect(said).to_contain_text("Text of 2.")
    expect(said).to_contain_text("position 2 · blocks.2.hook_resid_post")
    expect(said.locator(".score b")).to_have_text("−0.400")
    expect(said).to_contain_text("norm ‖v‖12.50")
    flags = said.locator(".flags li")
    expect(flags).to_have_text(
        [re.compile("^low_fidelity.*less than half"), re.compile("^of_another_day$")]
    )
    token(page, 4).hover()
    boxes = [box.bounding_box() for box in said.locator(".samples > div").all()]
    assert len(boxes) == 3 and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    token(page, 8).hover()
    expect(said).to_contain_text("Could not be explained: too long")
    # Held by a click: the mouse can go elsewhere.
    token(page, 3).click()
    token(page, 5).hover()
    expect_at(page, 3)
    page.keyboard.press("Escape")
    token(page, 4).hover()
    token(page, 5).hover()
    expect_at(page, 5)
    # A text that moves under a mouse that rests is not pointed at.
    page.keyboard.press("Home")
    page.evaluate("document.querySelector('main').scrollTop = 30")
    page.wait_for_timeout(100)
    expect_at(page, 0)


def test_by_keyboard(visit: Visit, three: Path) -> None:
    page = visit(three)
    expect_at(page, 0)
    for key, at in (
        *(("ArrowRight", 1), ("l", 2), ("ArrowLeft", 1), ("h", 0), ("ArrowLeft", 0)),
        *(("Home", 0), ("End", 10), ("ArrowRight", 10)),
        *(("w", 8), ("w", 2), ("w", 7)),
        *(("f", 8), ("f", 2), ("f", 7), ("F", 2)),
    ):
        page.keyboard.press(key)
        expect_at(page, at)
    for key, name in (("ArrowDown", "A good one"), ("j", "Another"), ("ArrowDown", "Another")):
        page.keyboard.press(key)
        expect(page.locator("nav [aria-current='true'] b")).to_have_text(name)
    page.keyboard.press("End")
    expect_at(page, 29)
    page.keyboard.press("k")
    expect(page.locator("nav [aria-current='true'] b")).to_have_text("A good one")
    page.keyboard.press("c")
    expect(page.locator("#measure")).to_have_value("c")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    expect_at(page, 0)


def test_sorted_by_what_is_worst(visit: Visit, tmp_path: Path) -> None:
    page = visit(write(tmp_path / "p.html", good(5, "Fine"), story(), good(300, "Better")))
    page.locator("#sort").select_option("lowest")
    expect(page.locator("nav .doc b")).to_have_text(["A story", "Fine", "Better"])
    page.locator("#sort").select_option("mean")
    expect(page.locator("nav .doc b").first).to_have_text("A story")
    # Of a thousand documents only those are there that are seen.
    many = [good(3, f"Number {i}") for i in range(1000)]
    page = visit(write(tmp_path / "many.html", *many))
    assert page.locator("nav .doc").count() < 30
    page.locator("#scroll").evaluate("element => { element.scrollTop = 500 * 68 }")
    page.locator("nav .doc", has_text="Number 502").click()
    expect(page.locator("#text")).to_contain_text("word2")
    expect(page.locator("#where")).to_have_text("503 / 1000")


def test_searched(visit: Visit, three: Path) -> None:
    page = visit(three)
    page.keyboard.press("/")
    page.keyboard.type("text of 1")
    # 1 and 10; 1 and 10 to 19; the same.
    expect(page.locator("#found")).to_have_text("24 found")
    expect(page.locator(".hit")).to_have_count(2)
    expect(page.locator("nav .doc em")).to_have_text(["2 found · ", "11 found · ", "11 found · "])
    page.keyboard.press("Enter")
    expect_at(page, 1)
    expect(page.locator("aside mark")).to_have_text("Text of 1")
    expect(page.locator("#found")).to_have_text("1 of 24 found")
    page.keyboard.press("Shift+Enter")
    expect(page.locator("nav [aria-current='true'] b")).to_have_text("Another")
    expect_at(page, 19)
    page.keyboard.press("Escape")
    expect(page.locator(".hit")).to_have_count(0)
    page.keyboard.press("/")
    page.keyboard.type("no such text")
    expect(page.locator("#found")).to_have_text("nothing found")


def test_fidelity_along_the_text(visit: Visit, three: Path) -> None:
    page = visit(three)
    box = page.locator("#spark").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 7.5 / 11, box["y"] + 10)
    expect_at(page, 7)
    at = page.locator("#at").bounding_box()
    assert at["x"] + at["width"] / 2 == pytest.approx(box["x"] + box["width"] * 7.5 / 11, abs=1.5)
    painted = page.evaluate("""() => {
        const { width, height } = document.querySelector("#spark canvas");
        const context = document.querySelector("#spark canvas").getContext("2d");
        const { data } = context.getImageData(0, 0, width, height);
        const at = (x, y) => Math.floor(y * height) * width + Math.floor((x * width) / 11);
        const paint = (x, y) => data[4 * at(x, y) + 3];
        // Upwards from 0 where it is high, downwards where it is below 0, nothing where it failed.
        return [paint(3.5, .4), paint(2.5, .4), paint(2.5, .8), paint(8.5, .4)];
    }""")
    assert [alpha > 0 for alpha in painted] == [True, False, True, False]


def test_a_link_leads_to_a_token(visit: Visit, three: Path) -> None:
    page = visit(f"{three.as_uri()}#2.13")
    expect(page.locator("nav [aria-current='true'] b")).to_have_text("A good one")
    expect_at(page, 12)
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(600)
    assert page.evaluate("location.hash") == "#2.14"


# --- a phone, the dark ---------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_a_phone(visit: Visit, three: Path, dark: bool) -> None:
    page = visit(three, width=390, dark=dark, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    token(page, 2).tap()
    said = page.locator("aside")
    expect(said).to_contain_text("Text of 2.")
    panel, text = said.bounding_box(), page.locator("main").bounding_box()
    assert panel["y"] + panel["height"] <= 801 and text["y"] + text["height"] <= panel["y"] + 1
    assert panel["width"] == 390 and text["height"] > 200
    # What is tapped is large enough for a thumb.
    forward = said.locator("button", has_text="\u203a")
    assert forward.bounding_box()["width"] >= 44
    forward.tap()
    expect(said).to_contain_text("Text of 3.")
    expect(page.locator("nav")).to_be_hidden()
    page.locator("#menu").tap()
    page.locator("nav .doc", has_text="Another").tap()
    expect(page.locator("nav")).to_be_hidden()
    expect(page.locator("#where")).to_have_text("3 / 3")
    expect(page.locator("#scale")).to_be_visible()


CONTRASTS = """() => {
    const channels = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((v) => {
        const c = Number(v) / 255;
        return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    const light = (colour) => {
        const [r, g, b] = channels(colour);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        const { backgroundColor } = getComputedStyle(element);
        return /, 0\\)$/.test(backgroundColor) ? ground(element.parentElement) : backgroundColor;
    };
    const found = {};
    for (const element of document.querySelectorAll("body *:not(script):not(option)")) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        if (!own || !element.getClientRects().length) continue;
        const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const name = `${element.tagName}.${element.className}`;
        found[name] = Math.min(found[name] ?? 99, ratio);
    }
    return found;
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everything_can_be_read(visit: Visit, three: Path, dark: bool) -> None:
    page = visit(three, dark=dark)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") != dark
    page.keyboard.press("w")
    page.keyboard.press("w")
    page.keyboard.press("/")
    page.keyboard.type("text")
    expect(page.locator("#found")).to_contain_text("found")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 20
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


def test_without_scripts_it_is_a_table(visit: Visit, three: Path) -> None:
    page = visit(three, java_script_enabled=False)
    rows = page.locator("noscript tbody tr")
    expect(rows).to_have_count(61)
    expect(rows.nth(2)).to_contain_text("lives")
    expect(rows.nth(2)).to_contain_text("Text of 2.")
    expect(rows.nth(8)).to_contain_text("too long")


def test_in_a_notebook(visit: Visit, tmp_path: Path) -> None:
    shown = [
        Explanation(f"Text of {i}.", "", [], True, 1.0, fve_nrm=0.5, token=f" t{i}", position=i)
        for i in range(5)
    ]
    cell = tmp_path / "cell.html"
    cell.write_text(f"<!doctype html><meta charset=utf-8>{Explanations(shown)._repr_html_()}")
    page = visit(cell)
    frame = page.frame_locator("iframe")
    frame.locator("[data-row='3']").hover()
    expect(frame.locator("aside")).to_contain_text("Text of 3.")
    expect(page.locator("table")).to_be_hidden()
    page.locator("summary").click()
    expect(page.locator("table")).to_contain_text("Text of 4.")


# --- claims --------------------------------------------------------------------------------------


def test_quotations_are_looked_up(visit: Visit, tmp_path: Path) -> None:
    nla = NLA.from_pretrained("tiny")
    read = "Nora lives in Naples. The fox chased the dog"
    e = nla.explain_text(read, positions=[-1])[0]
    told = "It is an animal story. It says “lives in Naples” and then “the bishop of Durham”."
    explanation = Explanation(**{**vars(e), "text": told})
    (residual,) = extract(nla.spec.source_model, [read], nla.spec.layer, positions=[-1])
    looked_at = examine(nla, explanation, vector=residual[0], context=read, num_samples=2)
    assert [(c.text, c.in_context) for c in looked_at.claims if c.kind == "quote"] == [
        ("lives in Naples", True),
        ("the bishop of Durham", False),
    ]
    page = visit(Explanations([looked_at.explanation]).to_html(tmp_path / "page.html"))
    said = page.locator("aside")
    expect(said.locator(".unseen")).to_have_text(["the bishop of Durham"])
    expect(said.locator(".seen")).to_have_text(["lives in Naples"])
    expect(said.locator(".claim:not(.within) .said")).to_have_text(
        [
            "It is an animal story.",
            "It says “lives in Naples”✓ in the text and then “the bishop of Durham”"
            "✗ not in the text.",
        ]
    )
    # A bar of support under each sentence and each quotation, as long as it is supported.
    bars = said.locator(".bar i")
    supports = [claim.support for claim in looked_at.claims]
    assert bars.count() == len(supports) == 4
    most = max(map(abs, supports))
    for bar, support in zip(bars.all(), supports, strict=True):
        shown = bar.evaluate("e => e.getBoundingClientRect().width / e.parentElement.clientWidth")
        assert shown == pytest.approx(abs(support) / most, abs=0.01)
        assert ("against" in (bar.get_attribute("class") or "")) == (support < 0)
    expect(said.locator(".claim small").first).to_contain_text("agreement")
