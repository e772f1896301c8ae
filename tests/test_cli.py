"""The command line: what it prints, and that bad input is one line on stderr and status 2."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch

import nla_lens
from nla_lens import NLA
from nla_lens.cli.command import Command
from nla_lens.cli.main import cli, main
from nla_lens.cli.options import parse_positions
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations

from .checkpoints import build_pair, build_source


class Run(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`run("explain", "a text")`: what the command gives, in this process."""

    def call(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["nla-lens", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code
        return Run(0 if code is None else int(code), *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The stem of a pair whose source model is at hand."""
    root = tmp_path_factory.mktemp("cli")
    source = build_source(root / "source", "llama")
    build_pair(root, "llama", base=source)
    return root / "llama"


def in_a_process(*commands: Sequence[str]) -> list[Run]:
    """What commands give in one process, one after the other."""
    code = """
import json, sys
from nla_lens.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try: main()
    except SystemExit as ended: status = ended.code
    for stream in (sys.stdout, sys.stderr):
        print(f"\\0{status or 0}\\0", end="", file=stream, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    out, err = (stream.split("\0") for stream in (done.stdout, done.stderr))
    assert len(out) == len(err) == 2 * len(commands) + 1, done.stderr
    assert out[-1] == err[-1] == "", "nothing is said on leaving"
    return [
        Run(int(status), *said)
        for status, *said in zip(out[1::2], out[:-1:2], err[:-1:2], strict=True)
    ]


# --- explain --------------------------------------------------------------------------------------


def test_explain_prints_a_table(run, pair: Path) -> None:
    got = run("explain", "A letter.", "--nla", pair, "--max-new-tokens", 4, "--positions", "0,-1")
    assert (got.status, got.err) == (0, "")
    for word in ("pos", "token", "explanation", "cos", "flags", "truncated"):
        assert word in got.out
    assert "early_position" in got.out


def test_explain_as_json_is_explain_text(run, pair: Path) -> None:
    options = ("--nla", pair, "--max-new-tokens", 6, "--positions", "1:4", "--json")
    got = run("explain", "A letter from a teacher.", *options)
    assert (got.status, got.err) == (0, "")
    wanted = NLA.from_pretrained(pair).explain_text(
        "A letter from a teacher.", slice(1, 4), max_new_tokens=6
    )
    assert json.loads(got.out) == wanted.to_dict()
    assert len(got.out.strip().splitlines()) == 1


def test_every_option_reaches_explain(run, pair: Path, tmp_path: Path) -> None:
    got = run(
        "explain", "A letter.", "--av", f"{pair}-av", "--ar", f"{pair}-ar", "--model",
        pair.parent / "source", "--positions", "-1", "--generate", 2, "--max-new-tokens", 3,
        "--temperature", 1.0, "--num-samples", 2, "--seed", 4, "--batch-size", 2, "--dtype",
        "bfloat16", "--device", "cpu", "--injection", "replace", "--engine", "transformers",
        "--json", "--html", tmp_path / "page.html",
    )  # fmt: skip
    assert (got.status, got.err) == (0, "")
    found = json.loads(got.out)
    assert found["shape"] == [3]
    for e in found["explanations"]:
        assert len(e["samples"]) == 2 and len(e["token_ids"]) <= 3
    assert "<table>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_explain_reads_standard_input(run, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("A letter."))
    piped = run("explain", "-", "--nla", pair, "--max-new-tokens", 2, "--json")
    assert (
        piped.out == run("explain", "A letter.", "--nla", pair, "--max-new-tokens", 2, "--json").out
    )


def test_scores_that_are_no_numbers_are_null(run, pair: Path, monkeypatch) -> None:
    nan = float("nan")
    e = Explanation("a", "a", [1], True, 1.0, cos=nan, mse_nrm=float("inf"), samples=(
        Explanation("a", "a", [1], True, 1.0, cos=nan),
    ))  # fmt: skip
    monkeypatch.setattr(NLA, "explain_text", lambda *_, **__: Explanations([e]))
    got = run("explain", "A letter.", "--nla", pair, "--json")
    (shown,) = json.loads(got.out, parse_constant=lambda name: pytest.fail(name))["explanations"]
    assert shown["cos"] is shown["mse_nrm"] is shown["samples"][0]["cos"] is None


def test_an_interrupt_shows_what_was_finished(run, pair: Path, monkeypatch) -> None:
    def interrupted(*_, **__):
        error = KeyboardInterrupt()
        error.explanations = Explanations([Explanation("half", "half", [1], True, 1.0)])
        raise error

    monkeypatch.setattr(NLA, "explain_text", interrupted)
    got = run("explain", "A letter.", "--nla", pair)
    assert "half" in got.out and "1 explanations were finished" in got.err
    monkeypatch.setattr(
        NLA, "explain_text", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    got = run("explain", "A letter.", "--nla", pair)
    assert (got.status, got.out) == (130, "") and got.err.strip() == "nla-lens: interrupted"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("3", [3]), ("-1", [-1]), ("0,5,-2", [0, 5, -2]), (" 1 , 2 ", [1, 2]),
        ("2:8", slice(2, 8)), (":", slice(None)), ("-3:", slice(-3, None)),
        ("::2", slice(None, None, 2)), (None, None),
    ],
)  # fmt: skip
def test_positions(given: str | None, wanted: object) -> None:
    assert parse_positions(given) == wanted


# --- info and check -------------------------------------------------------------------------------


def test_info(run, pair: Path) -> None:
    got = run("info", pair)
    assert (got.status, got.err) == (0, "")
    for word in ("injection_scale", "30.0", "blocks.3.hook_resid_post", "sidecar", "layer"):
        assert word in got.out


def test_info_as_json(run, pair: Path) -> None:
    got = run("info", pair, "--json")
    described = json.loads(got.out)
    assert described["injection_scale"] == {"value": 30.0, "from": "sidecar"}
    assert described["layer"]["value"] == 3
    assert described["hook_name"]["value"] == "blocks.3.hook_resid_post"


def test_info_reads_no_weights(run, pair: Path, tmp_path: Path) -> None:
    import shutil

    bare = shutil.copytree(
        f"{pair}-av", tmp_path / "av", ignore=shutil.ignore_patterns("*.safetensors")
    )
    got = run("info", bare)
    assert (got.status, got.err) == (0, "")


def test_info_of_the_embedded_pairs(run) -> None:
    for name, rule in (("tiny", "replace"), ("tiny-norm-matched", "norm_matched_add")):
        described = json.loads(run("info", name, "--json").out)
        assert described["injection"]["value"] == rule


def test_check_of_the_embedded_pair(run) -> None:
    got = run("check", "tiny")
    assert (got.status, got.err) == (0, "")
    assert "FAIL" not in got.out and got.out.count("ok") >= 5


@pytest.mark.parametrize("rule", ["replace", "norm_matched_add"])
def test_check_of_a_good_injection(run, tmp_path: Path, rule: str) -> None:
    av, ar = build_pair(tmp_path, "qwen2", injection=rule)
    got = run("check", av, "--ar", ar, "--injection", rule, "--vectors", 4)
    assert "FAIL" not in got.out
    assert (got.status, got.err) == (0, "")


def broken_replace(embed_BTD, scaled_BD, position):
    return embed_BTD


def broken_add(resid_BTD, vec_BD, position):
    return resid_BTD


@pytest.mark.parametrize("rule", ["replace", "norm_matched_add"])
def test_check_catches_an_injection_that_does_nothing(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setattr("nla_lens.engines.local.transformers.replace", broken_replace)
    monkeypatch.setattr("nla_lens.engines.local.transformers.norm_matched_add", broken_add)
    av, ar = build_pair(tmp_path, "qwen2", injection=rule)
    got = run("check", av, "--ar", ar, "--injection", rule, "--vectors", 4)
    assert got.status == 1
    failed = [line for line in got.out.splitlines() if line.startswith("FAIL")]
    assert any("depend on the vector" in line for line in failed)
    assert any("marker" in line for line in failed)


def test_check_reports_texts_that_are_all_chinese(run, pair: Path, monkeypatch) -> None:
    from nla_lens.halves.verbalizer import Answer, Verbalizer

    texts = iter([f"这是{i}个字" for i in "一二三四五六七八九十" * 5])

    def chinese(self, ids):
        text = next(texts)
        return Answer([1], text, text, complete=True)

    monkeypatch.setattr(Verbalizer, "read", chinese)
    got = run("check", pair, "--vectors", 4)
    assert got.status == 1
    assert re.search(r"^FAIL .*Chinese", got.out, re.MULTILINE)


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "an unknown command": (["explian", "x"], "did you mean explain?"),
    "a text without a command": (["A letter."], 'nla-lens explain "A letter."'),
    "no command like it": (["zzz"], "there are explain, explain-file, "),
    "an unknown option": (["explain", "x", "--nla", "PAIR", "--positons", "1"], "--positons"),
    "no text": (["explain"], "TEXT"),
    "two texts": (["explain", "x", "y"], "unexpected extra argument"),
    "a text without quotes": (["explain", "A", "letter."], "a text goes in quotes"),
    "an empty text": (["explain", " "], "TEXT is empty"),
    "a file in place of a text": (["explain", "PAIR-av/config.json"], "nla-lens explain - < "),
    "a text in place of a store": (["view", "PAIR-av/tokenizer.json"], "nla-lens explain-file "),
    "a missing option": (["explain-file", "x.txt"], "; see nla-lens explain-file --help"),
    "an unknown pair": (["explain", "x", "--nla", "no/such-pair"], "no/such-pair"),
    "an unknown name": (["explain", "x", "--nla", "tinny"], "no checkpoint 'tinny"),
    "a path that is not there": (["info", "./not/there"], "not/there"),
    "a folder that is no checkpoint": (["info", "ROOT"], "has neither nla_meta.yaml nor"),
    "an empty name": (["info", ""], "nla-lens: "),
    "a user that does not exist": (["info", "~nobody-here/x"], "~nobody-here/x"),
    "an AR": (["info", "PAIR-ar"], "pass it as ar="),
    "a source model": (["check", "ROOT/source"], "nla_meta.yaml"),
    "bad positions": (
        ["explain", "x", "--nla", "PAIR", "--positions", "1;2"],
        "--positions '1;2' is not of",
    ),
    "empty positions": (["explain", "x", "--nla", "PAIR", "--positions", ""], "--positions ''"),
    "four-part positions": (
        ["explain", "x", "--nla", "PAIR", "--positions", "1:2:3:4"],
        "--positions",
    ),
    "a step of zero": (["explain", "x", "--nla", "PAIR", "--positions", "1:5:0"], "slice step"),
    "positions past the end": (
        ["explain", "x", "--nla", "PAIR", "--positions", "99"],
        "position 99 is not in a text of",
    ),
    "no tokens to write": (
        ["explain", "x", "--nla", "PAIR", "--max-new-tokens", "0"],
        "max_new_tokens=0",
    ),
    "tokens that are no number": (
        ["explain", "x", "--max-new-tokens", "many"],
        "'many' is not a valid integer",
    ),
    "a cold temperature": (
        ["explain", "x", "--nla", "PAIR", "--temperature", "-1"],
        "temperature=-1.0",
    ),
    "samples without temperature": (
        ["explain", "x", "--nla", "PAIR", "--num-samples", "2"],
        "temperature=1.0",
    ),
    "a negative seed": (["explain", "x", "--nla", "PAIR", "--seed", "-4"], "seed=-4"),
    "a batch of nothing": (["explain", "x", "--nla", "PAIR", "--batch-size", "0"], "batch_size=0"),
    "a negative number to generate": (
        ["explain", "x", "--nla", "PAIR", "--generate", "-1"],
        "--generate",
    ),
    "an unknown rule": (["explain", "x", "--injection", "add"], "'add' is not one of"),
    "an unknown dtype": (["explain", "x", "--nla", "PAIR", "--dtype", "float99"], "float99"),
    "an integer dtype": (["explain", "x", "--nla", "PAIR", "--dtype", "int8"], "int8"),
    "an unknown device": (
        ["explain", "x", "--nla", "PAIR", "--device", "abacus"],
        "device='abacus' cannot be used",
    ),
    "an unknown engine": (["explain", "x", "--nla", "PAIR", "--engine", "steam"], "steam"),
    "an unknown source": (
        ["explain", "x", "--nla", "PAIR", "--model", "no/such-model"],
        "no/such-model",
    ),
    "a page in no folder": (
        ["explain", "x", "--nla", "PAIR", "--html", "ROOT/no/such/page.html"],
        "no such folder",
    ),
    "broken bytes": (["explain", "\udcff", "--nla", "PAIR"], "surrogate"),
    "two verbalizers": (
        ["info", "PAIR-av", "--ar", "PAIR-av"],
        "is a verbalizer (AV), not a reconstructor",
    ),
    "one vector": (["check", "PAIR", "--vectors", "1"], "--vectors"),
    "too many arguments": (["info", "a", "b"], "unexpected extra argument"),
    "an unknown flag of info": (["info", "--weights"], "--weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(run, pair: Path, name: str) -> None:
    given, names = BAD[name]
    given = [a.replace("PAIR", str(pair)).replace("ROOT", str(pair.parent)) for a in given]
    got = run(*given)
    assert (got.status, got.out) == (2, "")
    assert len(got.err.splitlines()) == 1
    assert got.err.startswith("nla-lens: ") and got.err.endswith("\n")
    assert names in got.err


def test_a_damaged_sidecar_is_one_line(run, tmp_path: Path) -> None:
    (tmp_path / "nla_meta.yaml").write_text("kind: [\n\n\n  &x\n")
    got = run("info", tmp_path)
    assert got.status == 2 and len(got.err.splitlines()) == 1 and "nla_meta.yaml" in got.err


def test_no_command_shows_what_there_is(run) -> None:
    got = run()
    assert (got.status, got.out) == (2, "")
    assert "Commands:" in got.err and "explain" in got.err


COMMANDS = sorted(cli.list_commands(click.Context(cli)))


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(run, command: list[str], flag: str) -> None:
    got = run(*command, flag)
    assert (got.status, got.err) == (0, "")
    assert "Usage: nla-lens" in got.out
    for option in ("--json", "--nla" if command == ["explain"] else "--help"):
        assert option in got.out or command not in (["explain"], ["info"])


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_are_taken(run, name: str) -> None:
    """Each is on a line of its own, and its command understands it."""
    context = click.Context(cli, info_name="nla-lens")
    command = cli.get_command(context, name)
    assert isinstance(command, Command) and command.examples
    shown = run(name, "--help").out.splitlines()
    for example in command.examples:
        assert f"  {example}" in shown
        _, named, *arguments = shlex.split(example.partition(" < ")[0])
        assert named == name
        assert command.make_context(name, arguments, context).params


def test_what_commands_are_for_is_read_whole(run) -> None:
    """In a terminal of 80 columns no line of the list is cut."""
    listed = run("--help").out.partition("Commands:")[2].partition("Examples:")[0]
    lines = listed.strip().splitlines()
    assert len(lines) == len(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)
    assert lines[0].split()[0] == "explain"


def test_shared_options_stand_apart(run) -> None:
    own, _, shared = run("explain", "--help").out.partition("Which NLA:")
    assert "--positions" in own and "--nla" not in own
    assert all(option in shared for option in ("--nla", "--engine", "--injection"))


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "x", "--nla", "PAIR", "--engine", "nnsight"],
        ["explain", "x", "--nla", "PAIR", "--engine", "ndif"],
        ["doctor", "PAIR"],
    ],
)
def test_a_package_that_is_missing_is_named(run, pair: Path, monkeypatch, command) -> None:
    """nnsight's own requirements are imported by our modules, too: none of them comes first."""
    for name in ("nnsight", "greenlet"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [
        name for name in sys.modules if re.match(r"nla_lens\.engines\..*(nns|ndif)", name)
    ]:
        monkeypatch.delitem(sys.modules, name)
    got = run(*(a.replace("PAIR", str(pair)) for a in command))
    assert (got.status, len(got.err.splitlines())) == (2, 1)
    assert "pip install 'nla-lens[nnsight]'" in got.err


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_is_there_twice(name: str) -> None:
    """click warns of it, and hands the command one of the two."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    flags = [flag for param in command.params for flag in (*param.opts, *param.secondary_opts)]
    assert sorted(flags) == sorted(set(flags))
    names = [param.name for param in command.params]
    assert sorted(names) == sorted(set(names))


def test_version(run) -> None:
    got = run("--version")
    assert got.status == 0 and re.search(r"\d+\.\d+", got.out)


# --- in processes of their own --------------------------------------------------------------------


def test_the_command_as_it_is_installed(pair: Path) -> None:
    """Nothing but the answer on either stream, warnings of libraries included."""
    command = ("explain", "A letter.", "--nla", str(pair))
    good, bad = in_a_process(
        [*command, "--max-new-tokens", "2", "--json"], [*command, "--positions", "99"]
    )
    assert (good.status, good.err) == (0, "")
    assert json.loads(good.out)["shape"][0] > 2
    assert (bad.status, bad.out) == (2, "")
    assert len(bad.err.splitlines()) == 1 and "position 99" in bad.err


def test_info_help_and_wrong_options_load_no_torch(pair: Path) -> None:
    code = f"""if True:
    import contextlib, io, sys
    from nla_lens.cli import main
    pair = sys.argv[1]
    silent = io.StringIO()
    def run(*arguments):
        sys.argv = ["nla-lens", *arguments]
        try: main()
        except SystemExit as ended: return ended.code
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        assert not run("--help")
        for name in {COMMANDS}:
            assert not run(name, "--help") and run(name, "--no-such-option") == 2, name
    run("info", pair, "--json")
    print([m for m in ("torch", "transformers") if m in sys.modules], file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(pair)], capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout)["layer"]["value"] == 3
    assert done.stderr == "[]\n"


def test_the_embedded_pair_from_the_command_line(run) -> None:
    got = run("explain", "The garlic sizzles in the pan.", "--positions", "-1", "--json")
    (e,) = json.loads(got.out)["explanations"]
    assert e["complete"] and e["text"] and torch.isfinite(torch.tensor(e["cos"]))


def test_examine_a_text_marks_quotations(run: Callable[..., Run], tmp_path: Path) -> None:
    page = tmp_path / "e.html"
    text = "The chef fried the garlic in the pan."
    found = run("examine", text, "--position", 7, "--json", "--html", page)
    assert found.status == 0, found.err
    claims = json.loads(found.out)["claims"]
    quoted = [c for c in claims if c["kind"] == "quote"]
    assert quoted and all(c["in_context"] is True for c in quoted)
    assert all(c["support"] is not None for c in claims)
    assert quoted[0]["text"] in page.read_text()
    table = run("examine", text, "--position", 7, "--context", "Nothing of the kind.").out
    assert "not there" in table and "yes" not in table


def test_examine_and_compare_rows_of_stores(run: Callable[..., Run], tmp_path: Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text("Nora lives in Naples. The fox chased the dog out of the kennel.")
    texts[1].write_text("Nora lives in Oslo. The chef fried the garlic in the pan.")
    store = tmp_path / "store"
    done = run("explain-file", *texts, "--out", store, "--positions", "every:4", "--vectors")
    assert done.status == 0, done.err
    rows = nla_lens.open_store(store).rows()
    last = [i for i, row in enumerate(rows) if row["document"] == 0][-1]
    found = run("examine", store, "--row", last, "--json")
    assert found.status == 0, found.err
    said = json.loads(found.out)
    assert said["text"] == rows[last]["text"] and said["position"] == rows[last]["position"]
    quoted = [c for c in said["claims"] if c["kind"] == "quote"]
    assert quoted and all(c["in_context"] is not None for c in said["claims"] if c in quoted)
    assert all(c["support"] is not None for c in said["claims"])
    both = run("compare", store, store, "--row-a", last, "--row-b", last + 2, "--json")
    assert both.status == 0, both.err
    compared = json.loads(both.out)
    assert compared["a"]["text"] == rows[last]["text"]
    assert compared["cross"][0][0] > compared["cross"][0][1]
    listed = tmp_path / "listed.jsonl"
    nla_lens.open_store(store).explanations().save(listed)
    assert json.loads(run("examine", listed, "--row", last, "--json").out)["text"] == said["text"]
    for arguments, named in [
        (("examine", store, "--row", 999), "no row 999"),
        (("examine", listed, "--row", 999), "no row 999"),
        (("compare", listed, store), "holds no vectors"),
        (("examine", texts[0]), "a.txt"),
    ]:
        failed = run(*arguments)
        assert failed.status == 2 and named in failed.err and failed.err.count("\n") == 1


def test_compare_two_texts(run: Callable[..., Run], tmp_path: Path) -> None:
    page = tmp_path / "c.html"
    found = run("compare", "Nora lives in Naples.", "Nora lives in Oslo.", "--html", page)
    assert found.status == 0, found.err
    assert "Naples" in found.out and "sentence of b" in found.out and "<html" in page.read_text()
    again = run("compare", "Nora lives in Naples.", "Nora lives in Oslo.", "--json",
                "--positions", "4:")  # fmt: skip
    assert len(json.loads(again.out)["a"]["explanations"]) == 2
    same = run("compare", "Nora lives", "Nora lives")
    assert same.status == 2 and "same vector" in same.err
