"""Texts while they are written: partial ones from every local engine, and what is shown of them."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_lens import NLA, Explanation, NLAError
from nla_lens.engines import Unfinished
from nla_lens.results import live

from .checkpoints import vectors
from .model_server import ModelServer
from .scripted import ids_of, scripted

SHORT: dict[str, Any] = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def on_engine(pair_dirs: Callable[..., tuple[Path, Path]], nla: NLA) -> Callable[[str], NLA]:
    """`on_engine(name)` -> the llama pair there."""
    made = {"transformers": nla}

    def load(engine: str) -> NLA:
        if engine not in made:
            pytest.importorskip(engine)
            av, ar = pair_dirs("llama", "replace")
            try:
                made[engine] = NLA.from_pretrained(av=av, ar=ar, engine=engine)
            except NLAError as error:
                if "TransformerBridge" in str(error):
                    pytest.skip(str(error))
                raise
        return made[engine]

    return load


def is_partial(e: Explanation) -> bool:
    return "partial" in e.flags


ENGINES = ("transformers", "transformer_lens", "nnsight")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {},
        {"batch_size": 4, "temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "num_samples": 2, "seed": 5},
        {"max_new_tokens": 48, "score": False},
    ],
    ids=str,
)
def test_what_comes_last_is_what_explain_gives(
    engine: str, options: dict, on_engine: Callable[[str], NLA]
) -> None:
    mine, wished = on_engine(engine), {**SHORT, **options}
    wanted = mine.explain(vectors(), **wished).flat
    rows: list[list[Explanation]] = [[]]
    for e in mine.explain_iter(vectors(), stream=True, **wished):
        rows[-1].append(e)
        if not is_partial(e):
            rows.append([])
    assert rows.pop() == []
    for (*partial, last), e in zip(rows, wanted, strict=True):
        assert last.token_ids == e.token_ids and last.flags == e.flags
        assert last.cos == (None if e.cos is None else pytest.approx(e.cos, abs=1e-6))
        assert [s.token_ids for s in last.samples] == [s.token_ids for s in e.samples]
        for before in partial:
            assert not before.complete and before.cos is None and before.norm == e.norm
            written = [e, *e.samples]
            assert any(before.token_ids == w.token_ids[: len(before.token_ids)] for w in written)
        if "num_samples" not in options:
            lengths = [len(p.token_ids) for p in partial]
            assert lengths == sorted(set(lengths)), "not one token after the other"
        if options == {"batch_size": 1}:
            assert lengths == list(range(1, len(e.token_ids)))
    assert sum(map(len, rows)) > len(wanted), "nothing was partial"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_that_is_left(engine: str, on_engine: Callable[[str], NLA]) -> None:
    mine, threads = on_engine(engine), threading.active_count()
    found = mine.explain_iter(vectors(), stream=True, **SHORT)
    assert is_partial(next(found))
    found.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads
    whole = mine.explain(vectors(), **SHORT)
    assert [e.token_ids for e in whole] == [
        e.token_ids for e in mine.explain_iter(vectors(), stream=True, **SHORT) if not is_partial(e)
    ]


def test_an_error_on_the_way(on_engine: Callable[[str], NLA], monkeypatch: Any) -> None:
    """Of the thread that nnsight's run is in, too; the first batch is there."""
    mine, calls = on_engine("nnsight"), []
    generate = type(mine.verbalizer.engine)._generate

    def failing(self: Any, job: Any, rows: range, **more: Any) -> Any:
        calls.append(rows)
        if len(calls) == 2:
            raise RuntimeError("the model fell over")
        return generate(self, job, rows, **more)

    monkeypatch.setattr(type(mine.verbalizer.engine), "_generate", failing)
    found = []
    with pytest.raises(NLAError, match=r"after 2 of 6.*the model fell over"):
        found.extend(mine.explain_iter(vectors(), stream=True, batch_size=2, **SHORT))
    assert len([e for e in found if not is_partial(e)]) == 2


def test_inside_a_pass_of_ours_nnsight_gives_whole_answers(on_engine: Callable) -> None:
    """Its thread would wait for the turn that this one has."""
    from nla_lens.models.passes import OwnPass

    mine = on_engine("nnsight")
    with OwnPass(mine.verbalizer.engine.model._module):
        found = list(mine.explain_iter(vectors()[:2], stream=True, score=False, **SHORT))
    assert found == mine.explain(vectors()[:2], score=False, **SHORT).flat


def test_engines_that_give_whole_answers_say_so_before_anything_runs(
    nla: NLA, pair_dirs: Callable
) -> None:
    pytest.importorskip("httpx")
    verbalizer: Any = nla.verbalizer
    av = str(pair_dirs("llama", "replace")[0])
    with ModelServer("vllm", verbalizer.engine.model, verbalizer.tokenizer, av) as server:
        there = NLA.from_pretrained(av=av, engine="vllm", url=server.url)
        server.bodies.clear()
        with pytest.raises(NLAError, match=r"stream=True.*whole answers"):
            there.explain_iter(vectors(), stream=True)
        assert server.bodies == []
    with pytest.raises(NLAError, match=r"stream=True: ScriptedVerbalizer"):
        scripted(nla, ["x"]).explain_iter(vectors(), stream=True)


def test_no_half_of_a_tag_or_character_is_shown(nla: NLA) -> None:
    whole = "<explanation> A fox’s <b> den, « 狐 »</explanation>"
    read, ids = nla.verbalizer.read, ids_of(nla, whole)
    assert read(ids).text == "A fox’s <b> den, « 狐 »"
    for n in range(1, len(ids)):
        text = read(Unfinished(ids[:n])).text
        assert "A fox’s <b> den, « 狐 »".startswith(text) or text.endswith("<"), text
        assert "�" not in text and "<explana" not in text and "</" not in text


def test_nothing_partial_is_made_where_nobody_asked(nla: NLA, monkeypatch: Any) -> None:
    read: list[Any] = []
    original = type(nla.verbalizer).read
    monkeypatch.setattr(
        type(nla.verbalizer), "read", lambda self, ids: read.append(ids) or original(self, ids)
    )
    nla.explain(vectors(), **SHORT)
    assert len(read) == len(vectors()) and not any(isinstance(ids, Unfinished) for ids in read)


# --- what is shown --------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """stdout is a real terminal meanwhile; what was written to it."""
    master, slave = pty.openpty()
    shown = bytearray()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(master, 1 << 16):
                shown.extend(piece)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    out = os.fdopen(slave, "w")
    monkeypatch.setattr(sys, "stdout", out)
    try:
        yield lambda: shown.decode(errors="replace")
    finally:
        monkeypatch.undo()
        out.close()
        reader.join(5.0)
        os.close(master)


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


def test_generated_tokens_are_shown_while_they_are_written(tiny: NLA, monkeypatch: Any) -> None:
    monkeypatch.setattr(live, "_PAUSE_SECONDS", 0.0)
    with terminal(monkeypatch) as shown:
        found = tiny.explain_text("It rains in Oslo.", -1, generate=2, max_new_tokens=40)
        sys.stdout.flush()
    screen = shown()
    quiet = tiny.explain_text("It rains in Oslo.", -1, generate=2, max_new_tokens=40)
    assert [e.token_ids for e in found] == [e.token_ids for e in quiet] and len(found) == 3
    assert [e.cos for e in found] == pytest.approx([e.cos for e in quiet], abs=1e-6)
    words = quiet[0].text.split()
    halfway = screen.index(" ".join(words[:2]))
    assert halfway < screen.index(" ".join(words[:4])), "not while it was written"
    assert "partial" in screen and screen.index("explanation") >= 0


def test_nothing_is_shown_where_nobody_looks_or_wants_it(
    tiny: NLA, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wished = {"generate": 1, "max_new_tokens": 8}
    tiny.explain_text("It rains.", -1, **wished)
    assert capsys.readouterr().out == ""
    with terminal(monkeypatch) as shown:
        tiny.explain_text("It rains.", -1, progress=False, **wished)
        tiny.explain_text("It rains.", -1, max_new_tokens=8)
        sys.stdout.flush()
    assert shown() == ""


class Handle:
    """What IPython's `display` gives; remembers the pages it was handed."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def update(self, page: Any) -> None:
        self.pages.append(page.data)


def test_in_a_notebook_a_table_fills(tiny: NLA, monkeypatch: Any) -> None:
    display = pytest.importorskip("IPython.display")
    handle = Handle()

    def show(page: Any, display_id: bool) -> Handle:
        handle.update(page)
        return handle

    monkeypatch.setattr(display, "display", show)
    for module in (live, sys.modules["nla_lens.progress"]):
        monkeypatch.setattr(module, "in_notebook", lambda: True)
    monkeypatch.setattr(live, "_NOTEBOOK_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(live, "_PAUSE_SECONDS", 0.0)
    torch.manual_seed(0)
    given = torch.randn(12, 128)
    found = tiny.explain(given, max_new_tokens=6)
    *filling, last = handle.pages
    assert last == "" and len(filling) == 12
    assert [page.count("<tr>") for page in filling] == [*range(2, 9), *[9] * 5]
    assert found[11].text in filling[-1]
    handle.pages.clear()
    tiny.explain_text("It rains in Oslo.", -1, generate=1, max_new_tokens=6)
    assert len(handle.pages) > 6 and "partial" in handle.pages[0] and handle.pages[-1] == ""
    handle.pages.clear()
    tiny.explain(given, max_new_tokens=6, progress=False)
    list(tiny.explain_iter(given, max_new_tokens=6))
    assert handle.pages == []
