"""The process we run in: streams that are closed or not Unicode, terminals without a size, signals
in the middle of a job or of a pass."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.hooks import RemovableHandle

import nla_lens
from nla_lens import NLA
from nla_lens.cli.main import main
from nla_lens.cli.output import print_table
from nla_lens.halves.verbalizer import Verbalizer
from nla_lens.models.ambient import _ProcessWide
from nla_lens.models.onednn import ByOneDNN
from nla_lens.models.passes import OwnPass, current_pass
from nla_lens.models.turns import turns_of
from nla_lens.progress import is_terminal
from nla_lens.results.display import to_table
from nla_lens.results.explanation import Explanation

SHORT = ("--max-new-tokens", "2")
COMMANDS = {
    "info": ("info",),
    "info as json": ("info", "--json"),
    "explain": ("explain", "Nora", "--positions", "-1", *SHORT),
    "explain as json": ("explain", "Nora", "--positions", "-1", "--json", *SHORT),
    "explain-file": ("explain-file", "PATH/a.txt", "--out", "PATH/store", *SHORT),
    "help": ("--help",),
}


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ended]:
    """`run("info", stdout=None)`: a command with other streams than pytest's."""
    (tmp_path / "a.txt").write_text("Nora lives in Naples.")

    def call(*arguments: str, **streams: Any) -> Ended:
        given = [a.replace("PATH", str(tmp_path)) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["nla-lens", *given])
        encoding = streams.pop("encoding", "utf-8")
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
        for name, stream in {"stdout": out, "stderr": err, **streams}.items():
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as exit_:
            main()
        for stream in (out, err):
            stream.flush()
        # Where a stream says ascii, click writes JSON in UTF-8, as JSON is.
        said = [stream.buffer.getvalue().decode() for stream in (out, err)]
        return Ended(int(exit_.value.code or 0), *said)

    return call


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


# Streams


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_stream_stops_no_command(
    name: str, closed: str, run: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = run(*COMMANDS[name], **{closed: None})
    assert (ended.status, ended.err) == (0, "")
    assert (ended.out == "") == (closed == "stdout")
    if name == "explain-file":
        assert nla_lens.open_store(tmp_path / "store").complete


def test_a_closed_number_is_given_to_no_file(tmp_path: Path) -> None:
    """What torch writes to number 2 in C must not go into a file of the user's."""
    code = "from nla_lens.cli.surroundings import open_streams; import os, sys\nopen_streams()\n"
    code += "os.write(1, str(open(sys.argv[1], 'w').fileno()).encode())"
    said, there = os.pipe()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", code, str(tmp_path / "x")],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, there, 1), (os.POSIX_SPAWN_CLOSE, 2)],
    )
    os.close(there)
    with os.fdopen(said) as answer:
        assert int(answer.read()) > 2
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_an_encoding_without_the_characters_spells_them_out(
    name: str, run: Callable[..., Ended]
) -> None:
    ended = run(*COMMANDS[name], encoding="ascii")
    assert (ended.status, ended.err) == (0, "") and ended.out
    if name == "info":
        assert r"\u320e" in ended.out


@pytest.mark.parametrize("columns", ["0", "1", "19", "junk", "-5"])
def test_a_terminal_without_a_size_shows_the_table(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_table(to_table([Explanation("a walled city", "", [], True, 1.0)]))
    assert "a walled city" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stdin", "names"),
    [
        (io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"), "no UTF-8"),
        (io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", "surrogateescape"), "no UTF-8"),
        (io.StringIO(" \n"), "is empty"),
        (None, "is empty"),
    ],
)
def test_what_cannot_be_read_from_standard_input_is_named(
    stdin: Any, names: str, run: Callable[..., Ended]
) -> None:
    ended = run("explain", "-", *SHORT, stdin=stdin)
    assert (ended.status, ended.out, len(ended.err.splitlines())) == (2, "", 1)
    assert names in ended.err


def test_what_is_no_terminal() -> None:
    shut = io.StringIO()
    shut.close()
    assert not any(map(is_terminal, (None, shut, object(), io.StringIO())))


@pytest.mark.parametrize("where", ["none", "no stream", "shut", "full", "a broken pipe"])
def test_a_bar_that_cannot_be_drawn_costs_no_work(
    where: str, nla: NLA, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = torch.ones(3, nla.spec.d_model)
    wanted = nla.explain(vectors, max_new_tokens=2, progress=False)
    monkeypatch.setattr("nla_lens.progress._SHOWN_AFTER_SECONDS", 0)
    if where == "full":
        stream: Any = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    elif where == "a broken pipe":
        read, write = os.pipe()
        os.close(read)
        stream = os.fdopen(write, "w", buffering=1)
    else:
        stream = {"none": None, "no stream": object(), "shut": io.StringIO()}[where]
    if where == "shut":
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        explained = nla.explain(vectors, max_new_tokens=2, progress=True)
    finally:
        monkeypatch.undo()
        # What it could not write it still holds, and says so.
        with contextlib.suppress(OSError, AttributeError):
            stream.close()
    assert explained == wanted


# Signals


class Stop(BaseException):
    """As event loops and greenlets have their own."""


def stopping(
    monkeypatch: pytest.MonkeyPatch, stop: Callable[[], Any], after: int = 2
) -> Callable[[], None]:
    """Lets `stop` act in the middle of the next explanations, when some texts are over."""
    whole = Verbalizer.answers

    def answers(self: Verbalizer, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for n, answer in enumerate(whole(self, *args, **kwargs)):
            if n == after:
                stop()
            yield answer

    monkeypatch.setattr(Verbalizer, "answers", answers)
    return lambda: monkeypatch.setattr(Verbalizer, "answers", whole)


def throw(error: BaseException) -> Callable[[], Any]:
    def stop() -> None:
        raise error

    return stop


STOPS = (KeyboardInterrupt, SystemExit, Stop, TimeoutError, MemoryError)


@pytest.mark.parametrize("kind", STOPS)
def test_whatever_stops_a_run_keeps_what_was_finished(
    kind: type[BaseException], tiny: NLA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vectors = torch.randn(5, tiny.spec.d_model, generator=torch.Generator().manual_seed(1))
    wanted = tiny.explain(vectors, max_new_tokens=3)
    again = stopping(monkeypatch, throw(kind()))
    with pytest.raises(BaseException) as caught:
        tiny.explain(vectors, max_new_tokens=3)
    kept = caught.value.explanations  # type: ignore[attr-defined]
    assert [e.raw_text for e in kept] == [e.raw_text for e in wanted.flat[:2]]
    assert all(e.cos is not None for e in kept), "they waited to be scored, and were"
    with pytest.raises(BaseException) as caught:
        nla_lens.explain_corpus(tiny, vectors, tmp_path / "store", max_new_tokens=3, progress=False)
    assert isinstance(caught.value, kind) or isinstance(caught.value.__cause__, kind)
    texts = nla_lens.open_store(tmp_path / "store").to_pandas()["raw_text"]
    assert list(texts) == [e.raw_text for e in wanted.flat[:2]]
    again()
    store = nla_lens.explain_corpus(
        tiny, vectors, tmp_path / "store", max_new_tokens=3, progress=False
    )
    assert list(store.to_pandas()["raw_text"]) == [e.raw_text for e in wanted.flat]


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
    ],
)
def test_a_signal_ends_a_command_when_what_is_finished_is_written(
    number: signal.Signals,
    status: int,
    said: str,
    run: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    handler = signal.getsignal(number)
    stopping(monkeypatch, lambda: os.kill(os.getpid(), number))
    one = ("--batch-size", "1")
    job = run(*COMMANDS["explain-file"], *one)
    assert (job.status, job.out, job.err.strip()) == (status, "", f"nla-lens: {said}")
    store = nla_lens.open_store(tmp_path / "store")
    assert len(store) == 2 and not store.complete
    shown = run("explain", "Nora lives in Naples.", *SHORT, *one)
    assert shown.status == status and shown.out.count("truncated") == 2
    assert shown.err.splitlines()[0] == "2 explanations were finished"
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("nth", range(6))
@pytest.mark.parametrize("where", ["remove", "register_forward_hook", "register_forward_pre_hook"])
def test_a_ctrl_c_at_the_edges_of_a_pass_leaves_nothing_on_the_model(
    where: str, nth: int, nla: NLA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a hook is put down and its handle not there yet, and where handles give hooks back."""
    model = nla.verbalizer.engine.model
    vectors = torch.randn(2, nla.spec.d_model, generator=torch.Generator().manual_seed(1))
    wanted = nla.explain(vectors, max_new_tokens=3)
    place: Any = RemovableHandle if where == "remove" else torch.nn.Module
    whole, calls = getattr(place, where), iter(range(10**6))

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = where == "remove" and next(calls) == nth
        if before:
            raise KeyboardInterrupt
        done = whole(self, *args, **kwargs)
        if where != "remove" and next(calls) == nth:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(place, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        nla.explain(vectors, max_new_tokens=3)
    monkeypatch.setattr(place, where, whole)
    assert current_pass() is None
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called and "forward" not in vars(module)
    assert not turns_of(model.model)._holders
    assert nla.explain(vectors, max_new_tokens=3) == wanted


@pytest.mark.parametrize("at", ["coming in", "going out"])
def test_a_ctrl_c_leaves_the_callers_default_dtype(at: str, monkeypatch: Any) -> None:
    now = [torch.float64]
    stops = iter([at == "coming in", at == "going out"])

    def write(value: Any) -> None:
        now[0] = value
        if next(stops, False):
            raise KeyboardInterrupt

    settings = ((lambda: now[0], write, torch.float32),)
    monkeypatch.setattr(_ProcessWide, "_SETTINGS", settings)
    process_wide = _ProcessWide()
    with pytest.raises(KeyboardInterrupt), process_wide:
        assert now == [torch.float32]
    assert now == [torch.float64]
    with process_wide:
        assert now == [torch.float32]
    assert now == [torch.float64]


def test_a_ctrl_c_leaves_no_faster_product_behind(nla: NLA, monkeypatch: Any) -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(3)]
    by_onednn = ByOneDNN(torch.nn.Sequential(*layers))

    class Layers(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for n, pair in enumerate(list.__iter__(self)):
                if n == 1 and next(stops, False):
                    raise KeyboardInterrupt
                yield pair

    for answers in ([True], [False, True]):
        stops = iter(answers)
        by_onednn._layers = Layers((layer, layer.forward) for layer in layers)
        with pytest.raises(KeyboardInterrupt), by_onednn:
            assert all("forward" in vars(layer) for layer in layers)
        assert not by_onednn._n_entered
        assert not any("forward" in vars(layer) for layer in layers)


def test_a_pass_that_is_over_takes_back_only_its_own(nla: NLA) -> None:
    model = nla.verbalizer.engine.model
    with OwnPass(model) as outer:
        mine = len(outer._handles)
        with pytest.raises(KeyboardInterrupt), OwnPass(model):
            raise KeyboardInterrupt
        found = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        assert found == mine > 0 and current_pass() is outer
