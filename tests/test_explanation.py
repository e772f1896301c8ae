"""`Explanation`, `Explanations` and flags: indexing, storing, showing, warning."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nla_lens import NLA, Explanation, Explanations, NLAError, explain_corpus
from nla_lens.results import plots
from nla_lens.results.claim import Claim
from nla_lens.results.flags import find_flags
from nla_lens.results.rows import OWN

from .scripted import scripted

ODD_TEXTS = [
    "",
    " ",
    "plain",
    "two\nlines\r\nand\rreturns",
    "separators \u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e",
    "controls \x00 \x01 \x07 \x08 \x1b[31m \x7f \x9f",
    'quotes " \' \\ \\n / {"a": 1}',
    "é e\u0301 中文 日本 🙂 👩\u200d👩\u200d👧 \u202e right \ufeff \ufffd",
    "beyond \U0010ffff \ud800 half of a pair",
    "<script>alert(1)</script> &amp; <b>",
    "x" * 100_000,
]


def one(text: str = "a text", **fields) -> Explanation:
    raw_text = f"<explanation>{text}</explanation>"
    given = {"raw_text": raw_text, "token_ids": [1, 2], "norm": 1.5, "complete": True}
    return Explanation(text=text, **(given | fields))


def full(text: str = "a text", **fields) -> Explanation:
    given = {
        "cos": 0.9,
        "mse_nrm": 0.2,
        "fve_nrm": 0.6,
        "token": " the",
        "token_id": 7,
        "position": 3,
        "hook_name": "blocks.3.hook_resid_post",
        "flags": ("low_fidelity",),
    }
    return one(text, **(given | fields))


def grid(*shape: int) -> Explanations:
    return Explanations([one(f"text {i}") for i in range(math.prod(shape))], shape)


# --- indexing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        0, -1, slice(None), slice(1, None), slice(None, None, -1), (0,), (0, 1), (-1, -1),
        (0, 1, 2), (slice(None), 0), (..., -1), (0, ..., 1), (slice(None), slice(0, 2), 1),
        [1, 0], (1, [0, 2]),
    ],
    ids=repr,
)  # fmt: skip
def test_indexing_is_that_of_an_array(index) -> None:
    explanations = grid(2, 3, 4)
    texts = np.array([e.text for e in explanations.flat], dtype=object).reshape(2, 3, 4)
    wanted, got = texts[index], explanations[index]
    if isinstance(wanted, str):
        assert isinstance(got, Explanation) and got.text == wanted
    else:
        assert isinstance(got, Explanations)
        assert got.shape == wanted.shape
        assert [e.text for e in got.flat] == wanted.ravel().tolist()


def test_it_is_a_sequence() -> None:
    explanations = grid(2, 3)
    assert len(explanations) == 2
    assert [row.shape for row in explanations] == [(3,), (3,)]
    assert [e.text for e in explanations[1]] == ["text 3", "text 4", "text 5"]
    flat = grid(4)
    assert flat[2] in flat and flat.index(flat[2]) == 2
    assert next(reversed(flat)).text == "text 3"
    assert flat == grid(4) and flat != grid(4)[::-1] and grid(2, 3) != grid(3, 2)
    assert flat != [e.text for e in flat]
    for index in (4, -5, (0, 0)):
        with pytest.raises(IndexError):
            flat[index]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_nothing_has_a_shape_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    empty = Explanations([], shape)
    assert empty.shape == shape and empty.flat == [] and len(empty) == shape[0]
    assert empty.to_dict() == {"shape": list(shape), "explanations": []}
    assert len(empty.to_pandas()) == 0
    assert Explanations.load(empty.save(tmp_path / "x")) == empty
    assert "<table>" in empty._repr_html_()
    assert str(shape) in repr(empty)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (-1, -4)])
def test_a_shape_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(NLAError, match=r"4 explanations do not fill the shape"):
        Explanations([one()] * 4, shape)


# --- showing --------------------------------------------------------------------------------------


def test_repr_and_str() -> None:
    assert str(full()) == "a text"
    assert repr(full()) == (
        "Explanation('a text', token=' the', position=3, cos=0.900, fve_nrm=0.600, "
        "flags=['low_fidelity'])"
    )
    assert repr(one()) == "Explanation('a text')"
    assert repr(grid(20)).count("\n") == 9 and "12 more" in repr(grid(20))


def test_to_dict_is_ready_for_json() -> None:
    sample = full("a sample")
    e = full(samples=(sample, full("another")))
    assert json.loads(json.dumps(e.to_dict())) == e.to_dict()
    assert e.to_dict()["samples"][0] == sample.to_dict()
    assert set(e.to_dict()) == {f.name for f in dataclasses.fields(Explanation)}
    assert Explanation.from_dict(e.to_dict()) == e
    assert Explanation.from_dict({**one().to_dict(), "of a later version": 1}) == one()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        *(({name: 10**400}, name) for name in ("cos", "fve_nrm", "norm", "position", "token_id")),
        ({"token_ids": [1, 2**63]}, "token_ids"),
        ({"claims": [7]}, "claim is 7"),
        ({"claims": [{"text": "a", "kind": "quote", "support": "0.5"}]}, "support"),
        ({"claims": [{"text": "a", "kind": "quote", "agreement": 10**400}]}, "agreement"),
        ({"claims": [{"text": "a", "kind": "quote", "in_context": "no"}]}, "in_context"),
    ],
)
def test_records_that_could_not_be_shown(wrong: dict, named: str) -> None:
    """A record of these was loaded, and every view of it raised what Python raises."""
    with pytest.raises(NLAError, match=named):
        Explanation.from_dict({**one().to_dict(), **wrong})
    assert grid(2, 3).to_dict()["shape"] == [2, 3]


def test_to_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = Explanations([full(f"text {i}", position=i) for i in range(6)], (2, 3)).to_pandas()
    assert frame.loc[(1, 2), "text"] == "text 5"
    assert frame["position"].tolist() == list(range(6))
    assert frame["flags"].tolist() == [("low_fidelity",)] * 6
    assert set(frame.columns) == {f.name for f in dataclasses.fields(Explanation)} - {"samples"}
    assert isinstance(grid(3).to_pandas().index, pandas.RangeIndex)


def test_to_pandas_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(NLAError, match="to_pandas needs pandas: pip install pandas"):
        grid(2).to_pandas()


def in_a_terminal(e: Explanation) -> str:
    from rich.console import Console

    from nla_lens.results.display import to_table

    console = Console(width=80, file=io.StringIO())
    console.print(to_table([e]))
    return console.file.getvalue()


class Tags(HTMLParser):
    """The tags of a page, the attributes' values and the text between."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data) -> None:
        self.text += data


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover='alert(3)' {{ 7*7 }}"


@pytest.mark.parametrize("name", ["text", "raw_text", "token", "hook_name", "flags"])
def test_every_field_is_escaped_in_html(tmp_path: Path, name: str) -> None:
    value = (EVIL,) if name == "flags" else EVIL
    e = dataclasses.replace(full(), **{name: value})
    e = dataclasses.replace(e, samples=(e, e))
    plain = Explanations([full(samples=(full(), full()))]).to_html(tmp_path / "plain.html")
    pages = [
        Explanations([e]).to_html(tmp_path / "page.html").read_text(encoding="utf-8"),
        Explanations([e])._repr_html_(),
        e._repr_html_(),
    ]
    for page in pages:
        parsed = Tags(page)
        if page is pages[0]:
            # The page's own script and data, and not a tag more than where texts are harmless.
            assert parsed.tags.count("script") == 2
            assert parsed.tags == Tags(plain.read_text(encoding="utf-8")).tags
            assert "<script>alert" not in page
        else:
            assert "script" not in parsed.tags
        assert "img" not in parsed.tags
        assert not [key for key, _ in parsed.attributes if key.startswith("on")]
        assert "49" not in parsed.text
        if name in ("text", "token", "flags"):
            assert EVIL in parsed.text
    assert pages[0].lstrip().lower().startswith("<!doctype html>")


def test_a_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = Tags(grid(3).to_html(str(tmp_path / "page.html")).read_text(encoding="utf-8"))
    links = [v for k, v in page.attributes if k in ("src", "href") and v]
    assert links == []
    (policy,) = (v for k, v in page.attributes if k == "content" and v and "default-src" in v)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


@pytest.mark.parametrize("text", ODD_TEXTS[:8], ids=lambda t: repr(t)[:20])
def test_odd_texts_are_shown(text: str, tmp_path: Path) -> None:
    shown = in_a_terminal(full(text, token=text))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    Explanations([full(text, token=text)]).to_html(tmp_path / "page.html")


def test_markup_in_a_text_is_no_markup() -> None:
    shown = in_a_terminal(full("[red]x[/red] [/] :smile:", token="[b]", flags=("[i]",)))
    assert "[red]x[/red] [/] :smile:" in shown and "[b]" in shown and "[i]" in shown


def test_plot(nla: NLA) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    vectors = torch.randn(2, 6, 64)
    found = nla.explain(vectors, max_new_tokens=6)
    placed = [dataclasses.replace(e, position=i % 6) for i, e in enumerate(found.flat)]
    found = Explanations(placed, found.shape)
    figure = found.plot(nla, vectors)
    by_position, by_norm, cos, flags = figure.axes
    drawn = by_norm.collections[0].get_offsets()
    np.testing.assert_allclose(drawn, [(e.norm, e.cos) for e in placed])
    assert [p for p, _ in by_position.collections[0].get_offsets()] == sorted([*range(6)] * 2)
    # The control: each vector with a text six further on.
    texts = [e.text for e in placed]
    control = nla.score(texts[6:] + texts[:6], vectors.reshape(12, 64)).cos
    values = torch.cat([control, torch.tensor([e.cos for e in placed])])
    assert cos.dataLim.x0 == pytest.approx(values.min().item(), abs=1e-5)
    assert cos.dataLim.x1 == pytest.approx(values.max().item(), abs=1e-5)
    assert [t.get_text() for t in cos.get_legend().get_texts()][::-1] == plots._LABELS
    counted = {
        name.get_text(): bar.get_width()
        for name, bar in zip(flags.get_yticklabels(), flags.patches, strict=True)
    }
    assert counted == collections.Counter(flag for e in placed for flag in e.flags)
    pyplot.close(figure)
    pyplot.close(found.plot())
    for wrong in ({"nla": nla}, {"vectors": vectors}, {"nla": nla, "vectors": vectors[0]}):
        with pytest.raises(NLAError, match="vectors"):
            found.plot(**wrong)
    with pytest.raises(NLAError, match="none of these explanations is scored"):
        Explanations([one()]).plot()


# --- storing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda t: repr(t)[:20])
def test_odd_texts_survive_storing(text: str, tmp_path: Path) -> None:
    kept = Explanations([full(text, token=text, raw_text=text, flags=(text,)), one(text)])
    assert Explanations.load(kept.save(tmp_path / "x.jsonl")) == kept


@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3), (1, 2, 3)])
def test_the_round_trip_keeps_everything(shape: tuple[int, ...], tmp_path: Path) -> None:
    items = [
        full(f"text {i}", cos=i / 7, samples=(full(), full(cos=None))) if i % 2 else one()
        for i in range(math.prod(shape))
    ]
    kept = Explanations(items, shape)
    loaded = Explanations.load(str(kept.save(str(tmp_path / "x.jsonl"))))
    assert loaded == kept and loaded.shape == shape
    assert [type(e.token_ids) for e in loaded.flat] == [list] * len(items)
    assert {type(e.flags) for e in loaded.flat} == {tuple}


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    numbers = [0.1 + 0.2, 1e-30, 3.4e38, -0.0, math.pi, float(torch.tensor(0.7))]
    kept = Explanations([one(cos=x, norm=abs(x)) for x in numbers])
    assert [e.cos for e in Explanations.load(kept.save(tmp_path / "x")).flat] == numbers
    odd = Explanations([one(cos=math.nan, mse_nrm=math.inf)])
    loaded = Explanations.load(odd.save(tmp_path / "y"))[0]
    assert math.isnan(loaded.cos) and loaded.mse_nrm == math.inf


def test_a_real_result_survives_storing(nla: NLA, tmp_path: Path) -> None:
    explained = nla.explain(torch.randn(2, 3, 64), max_new_tokens=12)
    assert Explanations.load(explained.save(tmp_path / "x")) == explained


def test_parquet_holds_the_rows_of_a_store(nla: NLA, tmp_path: Path) -> None:
    """By the suffix; what a store has no column for stands behind; read by content."""
    wished = {"max_new_tokens": 12, "temperature": 1.0, "num_samples": 2, "seed": 1}
    explained = nla.explain(torch.randn(2, 3, 64), **wished)
    path = explained.save(tmp_path / "x.parquet")
    assert pq.read_schema(path).names == list(OWN)
    assert Explanations.load(path) == explained
    path.rename(tmp_path / "x.jsonl")
    assert Explanations.load(tmp_path / "x.jsonl") == explained
    claims = (Claim("a fox", "sentence", support=0.5), Claim("“den”", "quote", in_context=False))
    # Scores and norms are float32, as they come.
    in_32 = {"cos": 0.5, "mse_nrm": 1.0, "fve_nrm": 0.25, "norm": 1.5}
    looked_at = [full("a", **in_32, claims=claims), full("b", **in_32, trust=0.1)]
    odd = full("", **{**in_32, "cos": None}, flags=("truncated", "ä"))
    kept = Explanations([*looked_at, odd], (3, 1))
    path = kept.save(tmp_path / "y.parquet")
    assert Explanations.load(path) == kept
    table = pq.read_table(path)
    assert table.column_names[len(OWN) :] == ["claims"]
    assert table["trust"].to_pylist() == [None, 0.1, None]
    assert table["row"].to_pylist() == [0, 1, 2]
    for shape in [(0,), (2, 0)]:
        empty = Explanations([], shape)
        assert Explanations.load(empty.save(tmp_path / "e.parquet")) == empty


def test_a_shard_is_loaded_without_what_failed(nla: NLA, tmp_path: Path) -> None:
    rows = [{"text": "It rains.", "trust": "mine"}, {"text": 3, "trust": "theirs"}]
    tiny = NLA.from_pretrained("tiny")
    store = explain_corpus(tiny, rows, tmp_path / "s", max_new_tokens=8)
    (shard,) = store.shards.values()
    loaded = Explanations.load(shard)
    assert store.n_failed == 1 and loaded == store.explanations()
    assert tiny.calibration is not None
    assert loaded[0].trust == tiny.calibration.trust(loaded[0])


def test_parquet_of_something_else_or_damaged(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(NLAError, match=r"a\.parquet has no column 'raw_text'"):
        Explanations.load(tmp_path / "a.parquet")
    whole = Explanations([full("é"), one()]).save(tmp_path / "x.parquet").read_bytes()
    for length in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(NLAError, match="cut"):
            Explanations.load(tmp_path / "cut")
    table = pq.read_table(tmp_path / "x.parquet")
    other = table.replace_schema_metadata({b"nla_lens": b'{"format": "nla_lens.features"}'})
    pq.write_table(other, tmp_path / "z.parquet")
    with pytest.raises(NLAError, match=r"nla_lens\.explanations"):
        Explanations.load(tmp_path / "z.parquet")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = grid(3).save(tmp_path / "x.jsonl")
    broken = Explanations([one(), one(norm=object())])
    with pytest.raises(TypeError):
        broken.save(path)
    assert Explanations.load(path) == grid(3)
    assert grid(2).save(path) == path and len(Explanations.load(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


HEADER = '{"format": "nla_lens.explanations", "version": 1, "shape": [1]}'
GOOD = json.dumps(one().to_dict())


def instead(good: str, bad: str) -> str:
    """A file of one explanation with something else in it."""
    assert good in GOOD
    return f"{HEADER}\n{GOOD.replace(good, bad)}"


DAMAGED = {
    "empty": ("", "line 1"),
    "not JSON": ("hello", "line 1"),
    "another format": ('{"format": "x", "version": 1, "shape": [0]}', "line 1: not written by"),
    "a later version": (HEADER.replace("1,", "2,"), "line 1: not written by"),
    "a list": ("[1, 2]", "line 1"),
    "a number": ("5", "line 1"),
    "no shape": (HEADER.replace("shape", "form") + f"\n{GOOD}", "'shape'"),
    "shape text": (HEADER.replace("[1]", '"1"') + f"\n{GOOD}", "damaged"),
    "shape of text": (HEADER.replace("[1]", '["1"]') + f"\n{GOOD}", "damaged"),
    "shape of numbers": (HEADER.replace("[1]", "[1.0]") + f"\n{GOOD}", "damaged"),
    "shape null": (HEADER.replace("[1]", "[null]") + f"\n{GOOD}", "damaged"),
    "one missing": (HEADER, "0 explanations do not fill the shape"),
    "one too many": (f"{HEADER}\n{GOOD}\n{GOOD}", "2 explanations do not fill the shape"),
    "cut off": (f"{HEADER}\n{GOOD[:40]}", "line 2"),
    "an empty line": (HEADER.replace("[1]", "[2]") + f"\n{GOOD}\n\n{GOOD}", "line 3"),
    "no text": (instead('"text"', '"txt"'), "line 2: text is missing"),
    "text null": (instead('"a text"', "null"), "line 2: text is None; expected"),
    "complete text": (instead("true", '"yes"'), "complete is 'yes'; expected bool"),
    "norm null": (instead("1.5", "null"), "norm is None; expected float or int"),
    "ids a number": (instead("[1, 2]", "12"), "token_ids is 12; expected list"),
    "a list for an object": (HEADER + '\n["text"]', "line 2"),
    "samples of numbers": (instead('"samples": []', '"samples": [1]'), "line 2"),
    "deep": (HEADER + "\n" + "[" * 100_000, "line 2"),
    "deep header": ('{"a":' * 100_000, "line 1"),
    "not UTF-8": (b"\xff\xfe\x00", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    content, names = DAMAGED[name]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NLAError, match=names) as caught:
        Explanations.load(path)
    assert str(path) in str(caught.value).splitlines()[0]


def test_every_way_of_cutting_a_file_short(tmp_path: Path) -> None:
    whole = Explanations([full("é"), one()]).save(tmp_path / "x").read_bytes()
    for length in range(len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(NLAError):
            Explanations.load(tmp_path / "cut")


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NLAError, match="cannot be read"):
            Explanations.load(path)


# --- flags ----------------------------------------------------------------------------------------

FLAGGED = {
    "truncated": ({"complete": False}, {"complete": True}),
    "early_position": ({"position": 9}, {"position": 10}),
    "early_position at 0": ({"position": 0}, {"position": 50}),
    "early_position unknown": (None, {"position": None}),
    "outlier_norm, large": ({"norm": 301.0}, {"norm": 299.0}),
    "outlier_norm, small": ({"norm": 2.9}, {"norm": 3.1}),
    "other_layer": (
        {"hook_name": "blocks.2.hook_resid_post"}, {"hook_name": "blocks.3.hook_resid_post"}
    ),
    "other_layer, input of the block": (
        {"hook_name": "blocks.3.hook_resid_pre"}, {"hook_name": "blocks.4.hook_resid_pre"}
    ),
    "other_layer, another hook": ({"hook_name": "blocks.3.hook_resid_mid"}, {"hook_name": None}),
    "injection_suspect, the marker": ({"text": "It is ㎡."}, {"text": "It is m²."}),
    "injection_suspect, about it": ({"text": "A Chinese character."}, {"text": "Chinese food."}),
    "injection_suspect, Chinese": ({"text": "这是一个字 ok"}, {"text": "One word, 字."}),
    "injection_suspect, Korean": ({"text": "한국어 문장"}, {"text": ""}),
    "injection_suspect, Japanese": ({"text": "カタカナひらがな"}, {"text": "123 456"}),
    "injection_suspect, not where the token is Chinese": (
        {"text": "这是一个字", "token": " the"}, {"text": "这是一个字", "token": "字"}
    ),
    "low_fidelity by fve": ({"fve_nrm": 0.49, "cos": 0.99}, {"fve_nrm": 0.5, "cos": 0.1}),
    "low_fidelity by cos": ({"fve_nrm": None, "cos": 0.49}, {"fve_nrm": None, "cos": 0.5}),
    "low_fidelity, NaN": ({"fve_nrm": math.nan}, {"fve_nrm": None, "cos": None}),
    "low_fidelity, cos NaN": ({"fve_nrm": None, "cos": math.nan}, {"fve_nrm": None, "cos": 1.0}),
    "padding": ({"position": -1}, {"position": 12}),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGGED)
def test_each_flag_on_and_off(nla: NLA, name: str) -> None:
    quiet = {"norm": 30.0, "position": 20, "hook_name": "blocks.3.hook_resid_post", "flags": ()}
    on, off = FLAGGED[name]
    flag = name.split(",")[0].split(" ")[0]
    assert nla.spec.injection_scale == 30.0 and nla.spec.layer == 3
    if on is not None:
        assert find_flags(full(**(quiet | on)), nla.spec) == (flag,)
    assert find_flags(full(**(quiet | off)), nla.spec) == ()


def test_flags_reach_the_result_and_its_samples(nla: NLA) -> None:
    mine = scripted(nla, ["<explanation>open", "<explanation>这是一个字</explanation>"])
    explained = mine.explain(torch.eye(64)[:2] * torch.tensor([[30.0], [1e4]]))
    assert [e.flags for e in explained] == [("truncated",), ("outlier_norm", "injection_suspect")]
    both = mine.explain(torch.eye(64)[0] * 30, num_samples=2, temperature=1.0)
    assert [s.flags for s in both.samples] == [("truncated",), ("injection_suspect",)]


def test_norm_matched_add_knows_no_usual_norm(load_pair) -> None:
    spec = load_pair("llama", "norm_matched_add").spec
    assert find_flags(one(norm=1e9), spec) == ()


def test_the_first_position_trained_on_is_the_sidecars(nla: NLA) -> None:
    spec = dataclasses.replace(nla.spec, min_position=0)
    assert find_flags(full(position=0, norm=30.0), spec) == ()


def test_an_unknown_layer_is_never_another(nla: NLA) -> None:
    spec = dataclasses.replace(nla.spec, layer=None)
    assert find_flags(full(position=20, norm=30.0, hook_name="blocks.7.hook_out"), spec) == ()
