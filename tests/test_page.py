"""The page as it is written; `browser/` looks at it in a real Chromium."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nla_lens.results.flags as flags
from nla_lens.results.claim import Claim
from nla_lens.results.explanation import Explanation
from nla_lens.results.growing_store import GrowingStore
from nla_lens.results.page import document, documents_of, to_data, to_page
from nla_lens.results.rows import to_row

TEMPLATES = Path(flags.__file__).parent / "templates"


def one(**values: Any) -> Explanation:
    return Explanation(**{"text": "a", "raw_text": "a", "token_ids": [], "complete": True} | values)


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads, as HTML ends the block it stands in."""
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.lower().index("</script", start)])


# --- what is in it --------------------------------------------------------------------------------


def test_a_row_is_what_is_known_of_it() -> None:
    said = one(
        text="“a b”.",
        norm=2.0,
        cos=0.123456,
        fve_nrm=float("nan"),
        token="<s>",
        position=0,
        hook_name="h",
        trust=0.75,
        claims=(
            Claim("“a b”.", "sentence", support=0.5),
            Claim("a b", "quote", support=-0.25, in_context=False, agreement=1.0),
        ),
    )
    (found,) = documents_of([said, one(norm=float("inf"), token=" b", position=1, hook_name="g")])
    assert found == {
        "name": "b",
        "hook": "h",
        "tokens": ["<s>", " b"],
        "special": [0],
        "rows": [
            {
                "p": 0,
                "x": "“a b”.",
                "c": 0.1235,
                "n": 2.0,
                "u": 0.75,
                "k": [
                    {"x": "“a b”.", "u": 0.5},
                    {"x": "a b", "q": 1, "u": -0.25, "i": 0, "a": 1.0},
                ],
            },
            {"p": 1, "x": "a", "h": "g"},
        ],
        "columns": {},
    }
    assert data_of(to_page([found], title="t"))["documents"] == [found]


def test_texts_begin_where_positions_do_not_go_on() -> None:
    at = [0, 1, 2, 0, 5, 5, None, None]
    found = documents_of([one(norm=1.0, token=f" t{p}", position=p) for p in at])
    assert [len(doc["rows"]) for doc in found] == [3, 2, 3]
    (vectors,) = documents_of([one(norm=1.0), one(norm=1.0)])
    assert vectors["tokens"] == ["●", "●"]


def test_the_users_columns_are_said_whatever_they_hold() -> None:
    user = {
        "nan": float("nan"),
        "none": None,
        "long": "x" * 10_000,
        "big": 2**63 - 1,
        "odd": "\u202e",
    }
    found = document([], columns=user)
    assert data_of(to_page([found], title="t"))["documents"] == [found]
    shown = found["columns"]
    assert set(shown) == {"nan", "long", "big", "odd"} and len(shown["long"]) < 600
    assert (shown["big"], shown["odd"]) == (str(2**63 - 1), "\\u202e")


def test_a_users_column_that_is_called_as_one_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    # Of a store that was begun before there was a column of that name.
    about = {"n_rows": 1, "n_documents": 1, "user": {"trust": "string"}}
    store = GrowingStore.create(tmp_path / "s", {}, **about)
    store.write(0, [to_row(one(norm=1.0), document=0, row=0) | {"trust": "theirs"}])
    (found,) = data_of(store.to_html(tmp_path / "p.html").read_text(encoding="utf-8"))["documents"]
    assert found["columns"] == {"trust": "theirs"} and "u" not in found["rows"][0]


@pytest.mark.parametrize(
    "evil",
    ["</script>", "<!--<script>", "]]>", "\u2028\u2029", "\ud800", "&lt;", "\\u003c", "\x00"],
)
def test_what_strangers_wrote_stays_in_its_block(evil: str) -> None:
    said = one(text=evil, norm=1.0, token=evil, hook_name=evil, flags=(evil,), position=0)
    doc = document([{**said.to_dict(), "error": evil}], name=evil, columns={evil: evil})
    page = to_page([doc, *documents_of([said])], title=evil, about=evil)
    assert data_of(page)["documents"] == [doc, *documents_of([said])]
    assert page.encode("utf-8")
    block = page[page.index('id="data">') :].split(">", 1)[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(block)


def test_a_page_that_follows_may_ask_where_it_came_from_and_no_other() -> None:
    (still,) = re.findall('Policy" content="([^"]*)"', to_page([], title="t"))
    (live,) = re.findall('Policy" content="([^"]*)"', to_page([], title="t", live="1-2"))
    assert live == still + "; connect-src &#39;self&#39;"
    assert json.loads(to_data([], live="1-2")) == {"documents": [], "live": True, "token": "1-2"}


def test_every_flag_is_explained() -> None:
    names = {v for k, v in vars(flags).items() if k.isupper() and k[0] != "_" and type(v) is str}
    panel = (TEMPLATES / "view_panel.js").read_text(encoding="utf-8")
    told = re.search(r"const FLAGS = \{(.*?)\n\};", panel, re.DOTALL)
    assert told is not None
    assert set(re.findall(r"^  (\w+): ", told[1], re.MULTILINE)) == names


# --- colours --------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def colours(scheme: str, letter: str) -> np.ndarray:
    """The seven colours of the style sheet, in linear RGB."""
    css = (TEMPLATES / "view.css").read_text(encoding="utf-8")
    light, dark = css.split("@media (prefers-color-scheme: dark)", 1)
    block = {"light": light, "dark": dark}[scheme]
    found = dict(re.findall(rf"--{letter}(\d): (#[0-9a-f]{{6}});", block))
    srgb = np.array([[int(found[str(i)][k : k + 2], 16) for k in (1, 3, 5)] for i in range(7)])
    values = srgb / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb_N3: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB."""
    xyz = rgb_N3 @ np.array(TO_XYZ).T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("eyes", EYES)
def test_the_scale_is_read_by_every_eye(scheme: str, eyes: str) -> None:
    seen = np.clip(colours(scheme, "f") @ np.array(EYES[eyes]).T, 0, 1)
    differences = np.linalg.norm(lab(seen)[:, None] - lab(seen)[None], axis=-1)
    # 2.3 is just noticeable side by side.
    assert np.diag(differences, 1).min() > 6
    # What fell short of half and what is good are far apart.
    assert differences[:3, 5:].min() > 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_every_colour(scheme: str) -> None:
    luminance = np.array(TO_XYZ[1])
    ground, ink = colours(scheme, "f") @ luminance, colours(scheme, "i") @ luminance
    ratio = (np.maximum(ground, ink) + 0.05) / (np.minimum(ground, ink) + 0.05)
    assert ratio.min() > 4.5
