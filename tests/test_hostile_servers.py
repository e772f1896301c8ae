"""Servers that lie: nothing of theirs runs here, fills the memory, or makes a key show."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import subprocess
import sys
import time
import traceback
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from torch import Tensor

from nla_lens import NLA, NLAError, NLARemoteError
from nla_lens.foreign import harmless, scrub, to_json

from .hostile_ndif import LyingNDIF

SECRET = "".join(["open", "sesame"])
KEY = "sesame/öffne+dich=1".replace("ö", "o")


# --- text of strangers ---


@pytest.mark.parametrize(
    "written",
    [
        KEY,
        KEY.upper(),
        quote(KEY, safe=""),
        base64.b64encode(KEY.encode()).decode(),
        base64.b64encode(b"Bearer " + KEY.encode()).decode(),
        base64.urlsafe_b64encode(b"user:" + KEY.encode() + b":x").decode(),
        KEY.encode().hex(),
        json.dumps({"k": KEY}),
        f"http://user:{KEY}@host/x",
        f"https://host/x?key={KEY}",
        "x" * 395 + KEY,
    ],
)
def test_a_key_is_hidden_however_it_is_written(written: str) -> None:
    shown = scrub(f"a {written} b", KEY)
    assert "<key>" in shown or "?" not in shown
    for piece in (KEY, KEY.upper(), KEY[:12], quote(KEY, safe=""), KEY.encode().hex()):
        assert piece not in shown
    for start in range(3):
        assert base64.b64encode(b"\0" * start + KEY.encode()).decode()[8:20] not in shown


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in text)


@pytest.mark.parametrize(
    "write",
    [
        escaped,
        quote,
        lambda key: quote(quote(key)),
        lambda key: key.replace("/", "%2f").replace("=", "%3D"),
        lambda key: key.replace("/", "\\/"),
        lambda key: json.dumps(json.dumps({escaped(key): 1})),
        lambda key: "".join(f"\\x{ord(c):02x}" for c in key),
        lambda key: key.replace("/", "&#47;").replace("+", "&#x2b;"),
    ],
)
def test_a_key_is_hidden_whichever_of_its_characters_are_escaped(write: Any) -> None:
    for before in ("", "x", "\\" * 9):
        shown = scrub(before + write(KEY), KEY)
        assert "<key>" in shown
        assert not any(piece in shown for piece in ("sesame", "dich", "u0073", "x73"))
    assert scrub("&<>\\/%2f \\u0073", KEY) == "&<>\\/%2f \\u0073"


def test_a_key_in_an_address_is_hidden_without_being_known() -> None:
    shown = scrub("http://me:secret@host:1/x?token=secret and ws://secret@host/?k=secret", None)
    assert shown == "http://<key>@host:1/x and ws://<key>@host/"


def test_what_steers_a_terminal_is_spelled_out() -> None:
    text = "\x1b[2J\x9b1m\u202e\u2066\u200f\ud800\r\x00 é\n"
    spelled = "\\x1b[2J\\x9b1m\\u202e\\u2066\\u200f\\ud800\\r\\x00 é\n"
    assert harmless(text) == spelled == harmless(spelled)
    assert json.loads(to_json({text: [text]})) == {text: [text]}
    assert harmless(to_json(text)) == to_json(text)
    assert str(NLAError(text)) == spelled


# --- NDIF: results ---

nnsight = pytest.importorskip("nnsight")
pytest.importorskip("tenacity")
zstandard = pytest.importorskip("zstandard")

from nla_lens.engines.ndif.results import check_vectors, read_result  # noqa: E402
from nla_lens.engines.ndif.wire import read_response  # noqa: E402
from nla_lens.engines.served.server import Server, listed  # noqa: E402
from nla_lens.engines.served.settings import of_sglang  # noqa: E402
from nla_lens.models.weights import load_tokenizer  # noqa: E402


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def packed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def deflated(content: bytes) -> bytes:
    """The same archive, its entries compressed."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as before,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as after,
    ):
        for entry in before.infolist():
            after.writestr(entry.filename, before.read(entry))
    return file.getvalue()


def traps(path: Path) -> dict[str, bytes]:
    return {
        "in an archive": saved({"x": Trap(path)}),
        "in the old format": saved({"x": Trap(path)}, _use_new_zipfile_serialization=False),
        "a bare pickle": pickle.dumps(Trap(path)),
        "in a list of tensors": saved({"x": [torch.ones(1), Trap(path)]}),
        "as a key": saved({Trap(path): 1}),
    }


@pytest.mark.parametrize("where", traps(Path()))
@pytest.mark.parametrize("compressed", [True, False])
def test_a_pickle_in_a_result_does_not_run(where: str, compressed: bool, tmp_path: Path) -> None:
    content = traps(tmp_path / "ran")[where]
    with pytest.raises(NLARemoteError, match="the server's result is refused: "):
        read_result(packed(content) if compressed else content, compressed=compressed)
    assert not (tmp_path / "ran").exists()
    # The trap is one.
    if where == "in an archive":
        torch.load(io.BytesIO(content), weights_only=False)
        assert (tmp_path / "ran").exists()


def within_one_another(parts: list[Any], depth: int) -> list[Any]:
    """A thousand times the same in each of a thousand lists, and so on: a few kilobytes."""
    return within_one_another([parts] * 1000, depth - 1) if depth else parts


def archived(pickled: bytes) -> bytes:
    """An archive of this structure without tensors."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3")
    return file.getvalue()


MOST = 1 << 20
OTHERS: dict[str, bytes] = {
    "nothing": b"",
    "no archive": b"PK\x03\x04",
    "a bomb": saved({"x": torch.zeros(MOST)}),
    "a compressed archive": deflated(saved({"x": torch.zeros(MOST // 8)})),
    "rows that are one": saved({"x": torch.zeros(1, 64).expand(10**9, 64)}),
    "no values": saved({"x": torch.empty(5, device="meta")}),
    "sparse": saved({"x": torch.eye(3).to_sparse()}),
    "deep": saved({"x": [[[[[[[[[[1]]]]]]]]]]}),
    "a class": saved({"x": torch.nn.Linear(1, 1)}),
    "a list that is in many lists": saved({"x": within_one_another([1], 6)}),
    "a list a byte": archived(b"\x80\x02" + b"]" * (3 << 20) + b"."),
}


@pytest.mark.parametrize("what", OTHERS)
def test_results_that_are_refused(what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(NLARemoteError, match="the server's result is refused: ") as caught:
            read_result(packed(OTHERS[what]), compressed=True, most_bytes=MOST)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.cause == "store" and caught.value.__context__ is None


def test_a_bomb_is_not_unpacked() -> None:
    bomb = packed(b"\0" * (64 << 20))
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(NLARemoteError, match="more than 1048576 bytes"):
            read_result(bomb, compressed=True, most_bytes=MOST)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_results_that_are_taken() -> None:
    values = {
        "x": torch.arange(6.0).reshape(2, 3),
        "n": [1, 2.5, None, ("a", True)],
        "d": {"k": b"x"},
    }
    found = read_result(packed(saved(values)), compressed=True)
    assert found.pop("x").equal(values.pop("x")) and found == values


@pytest.mark.parametrize("message", ["", "[]", "{}", '{"id": 1}', "[" * 100_000, '{"id": "1"}'])
def test_words_that_are_no_state(message: str) -> None:
    from nnsight.intervention.backends.remote import RemoteError

    with pytest.raises(RemoteError, match="no state of a job"):
        read_response(message)


# --- NDIF: from end to end ---


@pytest.fixture
def lying() -> Iterator[LyingNDIF]:
    with LyingNDIF() as server:
        yield server


@pytest.fixture
def remote(
    pair_dirs: Callable[..., tuple[Path, Path]],
    lying: LyingNDIF,
    monkeypatch: pytest.MonkeyPatch,
) -> NLA:
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", KEY)
    av, _ = pair_dirs("llama", "replace")
    return NLA.from_pretrained(av=av, engine=f"ndif:{lying.url}")


def shown(error: BaseException) -> str:
    """All that a tool which prints tracebacks with their locals would show of an error."""
    told: list[str] = []
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        queue += [one.__cause__, one.__context__]
        told += [repr(one), str(one), *map(str, getattr(one, "__notes__", []))]
        told += traceback.format_exception(one)
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if "tests" not in Path(frame.f_code.co_filename).parts:
                told += [f"{name}={value!r}" for name, value in frame.f_locals.items()]
    return "\n".join(told)


def refused(remote: NLA, blocking: bool = False, seconds: float = 2.0) -> NLARemoteError:
    server = remote.verbalizer.engine.server
    server.blocking = blocking
    server.patience.connect = server.patience.answer = seconds
    server.patience.queued = server.patience.running = seconds
    with pytest.raises(NLARemoteError) as caught:
        remote.explain(torch.ones(64), max_new_tokens=2)
    assert KEY not in shown(caught.value)
    return caught.value


@pytest.mark.parametrize("blocking", [False, True])
def test_a_servers_code_does_not_run(
    remote: NLA, lying: LyingNDIF, tmp_path: Path, blocking: bool
) -> None:
    lying.completed(packed(traps(tmp_path / "ran")["in an archive"]))
    assert "the server's result is refused" in str(refused(remote, blocking))
    assert not (tmp_path / "ran").exists()
    assert any(headers.get("ndif-api-key") == KEY for _, headers in lying.heard)
    # The presigned place is given no key.
    assert all("ndif-api-key" not in h for path, h in lying.heard if path == "/result")


def test_nor_does_code_on_the_websocket(remote: NLA, lying: LyingNDIF, tmp_path: Path) -> None:
    lying.messages = [saved({"id": "1", "status": Trap(tmp_path / "ran")}, pickle_protocol=4)]
    assert "the server's result is refused" in str(refused(remote, blocking=True))
    lying.posted.clear()
    inside = saved({"x": Trap(tmp_path / "ran")})
    told = {"id": "1", "status": "COMPLETED", "data": packed(inside)}
    lying.messages = [saved(told, pickle_protocol=4)]
    assert "the server's result is refused" in str(refused(remote, blocking=True))
    assert not (tmp_path / "ran").exists()


def test_nor_does_it_beside_a_probe(
    pair_dirs: Callable[..., tuple[Path, Path]],
    load_pair: Callable[..., NLA],
    source_dir: Callable[..., Path],
    lying: LyingNDIF,
    tmp_path: Path,
) -> None:
    from nnsight.intervention.backends.remote import RemoteBackend

    import nla_lens

    directory = source_dir("llama")
    model = nnsight.TransformersModel(
        str(directory), task="text-generation", tokenizer=load_tokenizer(directory)
    )
    lying.completed(packed(traps(tmp_path / "ran")["in an archive"]))
    with nla_lens.attach(model, load_pair("llama", "replace")):
        backend = RemoteBackend("key", host=lying.url)
        with (
            pytest.raises(NLARemoteError, match=r"refused: .* has a probe"),
            model.trace("a b c", backend=backend),
        ):
            model.model.layers[0].output.save()
    assert not (tmp_path / "ran").exists()


def test_a_key_goes_to_no_other_host(remote: NLA, lying: LyingNDIF) -> None:
    with LyingNDIF() as other:
        for path in ("/subscribe", "/request", "/response"):
            lying.statuses = {path: 307}
            there = f"{other.url}/x"
            lying.headers = {
                path: {"Location": there.replace("http", "ws") if path == "/subscribe" else there}
            }
            refused(remote, blocking=path == "/subscribe", seconds=0.5)
        assert other.heard == []


TRICKLE = (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n")
ENDLESS: dict[str, tuple[str, tuple[bytes, bytes]]] = {
    "headers of a handshake": ("/subscribe", (b"HTTP/1.1 101 On\r\n", b"a: b\r\n")),
    "a line of a handshake": ("/subscribe", (b"", b"x" * 1000)),
    "pings": ("ws", (b"", b"\x89\0")),
    "a message": ("ws", (b"\x81\x7f" + (10**6).to_bytes(8, "big"), b" ")),
    "pieces of a message": ("ws", (b"\x01\x01a", b"\0\x01a")),
    "a result": ("/result", TRICKLE),
    "headers of a result": ("/result", (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n")),
    "a state": ("/response", TRICKLE),
    "go-aheads": ("/response", (b"", b"HTTP/1.1 100 Continue\r\n\r\n")),
    "an answer to a job": ("/request", TRICKLE),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_has_no_end(what: str, remote: NLA, lying: LyingNDIF) -> None:
    path, endless = ENDLESS[what]
    lying.completed(b"")
    lying.endless = {path: endless}
    if path == "ws":
        lying.messages = []
    start = time.monotonic()
    error = refused(remote, blocking=path in ("ws", "/subscribe"), seconds=0.5)
    assert error.cause in ("silent", "store", "unreachable")
    assert time.monotonic() - start < 10


ANSWERS: dict[str, Tensor] = {
    "floats": torch.ones(1, 2),
    "truth values": torch.ones(1, 2, dtype=torch.bool),
    "complex": torch.ones(1, 2, dtype=torch.complex64),
    "below": torch.tensor([[5, -1]]),
    "beyond": torch.tensor([[5, 10**9]]),
    "none": torch.zeros(1, 0, dtype=torch.int64),
    "too long": torch.full((1, 3), 5),
    "other rows": torch.full((2, 2), 5),
    "other axes": torch.full((2,), 5),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_answers_that_are_no_token_ids(what: str, remote: NLA, lying: LyingNDIF) -> None:
    lying.completed(packed(saved({"tokens": [ANSWERS[what]]})))
    assert "1 answers of up to 2 token ids" in str(refused(remote))
    lying.completed(packed(saved({"tokens": [torch.full((1, 2), 5)]})))
    assert remote.explain(torch.ones(64), max_new_tokens=2).token_ids == [5, 5]


@pytest.mark.parametrize(
    "resid_ND",
    [
        *(torch.ones(2, 5), torch.ones(4), torch.ones(2, 4).int()),
        *(torch.ones(2, 4) * 1j, torch.tensor([[1.0, 2, 3, torch.nan]])),
    ],
)
def test_vectors_that_are_none(resid_ND: Tensor) -> None:
    with pytest.raises(NLARemoteError, match=r"vectors of d_model=4 were asked for, and torch\."):
        check_vectors(resid_ND, 4)


@pytest.mark.parametrize("blocking", [False, True])
def test_the_state_of_another_job(remote: NLA, lying: LyingNDIF, blocking: bool) -> None:
    lying.completed(packed(saved({"tokens": [torch.full((1, 2), 5)]})))
    other = {**lying.answers["/response"], "id": "2"}
    lying.answers["/response"], lying.messages = other, [json.dumps(other)]
    assert "another job" in str(refused(remote, blocking))


LIES: dict[str, Callable[[LyingNDIF], object]] = {
    "no JSON": lambda s: s.answers.update({"/request": b"<html>"}),
    "the key in a refusal": lambda s: (
        s.statuses.update({"/request": 401}),
        s.answers.update({"/request": {"detail": f"API key {KEY} {quote(KEY, safe='')} unknown"}}),
    ),
    "the key at the end of what is quoted": lambda s: (
        s.statuses.update({"/request": 400}),
        s.answers.update({"/request": {"detail": "x" * 390 + KEY}}),
    ),
    "the key in an error": lambda s: s.answers.update(
        {"/response": {"id": "1", "status": "ERROR", "description": f"\x1b[2J {KEY} \u202e"}}
    ),
    "the key as a state": lambda s: s.answers.update({"/response": {"id": KEY, "status": KEY}}),
    "the key in a result's address": lambda s: s.answers.update(
        {"/response": {"id": "1", "status": "COMPLETED", "data": f"{s.url}/{KEY}?{KEY}"}}
    ),
    "the key behind a status": lambda s: (
        s.statuses.update({"/request": 500}),
        s.reasons.update({"/request": f"\x1b[2J {KEY}"}),
    ),
    "half an address": lambda s: s.answers.update(
        {"/response": {"id": "1", "status": "COMPLETED", "data": "http://[::1"}}
    ),
    "no result": lambda s: s.answers.update({"/response": {"id": "1", "status": "COMPLETED"}}),
    "no address": lambda s: s.answers.update(
        {"/response": {"id": "1", "status": "COMPLETED", "data": "file:///etc/passwd"}}
    ),
    "compressed HTTP": lambda s: (
        s.completed(b"x"),
        s.headers.update({"/result": {"Content-Encoding": "gzip"}}),
    ),
    "a deep answer": lambda s: s.answers.update({"/response": b'{"a":' * 100_000}),
    "another job's result": lambda s: s.completed(packed(saved({"y": 1}))),
    "a list for a result": lambda s: s.completed(packed(saved([1]))),
    "the key for a result": lambda s: s.completed(packed(saved({KEY: KEY}))),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_of_ndif(lie: str, remote: NLA, lying: LyingNDIF, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    LIES[lie](lying)
    told = str(refused(remote))
    assert harmless(told) == told
    assert KEY[:12] not in caplog.text and "\x1b" not in caplog.text


@pytest.mark.parametrize(
    ("variable", "value"), [("HTTPS_PROXY", "gar\x01bage://x"), ("SSL_CERT_FILE", "/no/such/file")]
)
def test_an_environment_that_cannot_be_used(
    variable: str, value: str, remote: NLA, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.verbalizer.engine.server.host = "https://ndif.invalid"
    monkeypatch.setenv(variable, value)
    error = refused(remote)
    assert error.cause == "settings" and variable in str(error)


# --- vLLM and SGLang ---


@pytest.fixture
def av(pair_dirs: Callable[..., tuple[Path, Path]]) -> Path:
    return pair_dirs("llama", "replace")[0]


def answered(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "token_ids": [5], "finish_reason": "length", **choice}]}


def vllm_refuses(av: Path, lying: LyingNDIF) -> str:
    """What is said when an AV is loaded on a server that lies; the key is nowhere in it."""
    server = Server(lying.url, api_key=KEY, patience=0.5, timeout=5.0)
    with pytest.raises(NLARemoteError) as caught:
        nla = NLA.from_pretrained(av=av, engine="vllm", url=server)
        nla.explain(torch.ones(64), max_new_tokens=3)
    everything = shown(caught.value)
    for written in (KEY, quote(KEY, safe=""), base64.b64encode(KEY.encode()).decode()):
        assert written not in everything
    assert any(headers.get("Authorization") == f"Bearer {KEY}" for _, headers in lying.heard)
    told = str(caught.value)
    assert harmless(told) == told
    return told


POST = "/v1/completions"
VLLM_LIES: dict[str, Callable[[LyingNDIF], object]] = {
    "as a finish reason": lambda s: s.answers.update(
        {POST: answered(token_ids=[], finish_reason=KEY)}
    ),
    "as a finish reason, far out": lambda s: s.answers.update(
        {POST: answered(token_ids=[], finish_reason="x" * 70 + KEY)}
    ),
    "as a model": lambda s: s.answers.update({"/v1/models": {"data": [{"id": KEY}]}}),
    "as a token": lambda s: s.answers.update({POST: answered(token_ids=[KEY])}),
    "as an index": lambda s: s.answers.update({POST: answered(index=KEY)}),
    "in a refusal": lambda s: (
        s.statuses.update({POST: 400}),
        s.answers.update({POST: {"error": {"message": "x" * 395 + KEY}}}),
    ),
    "far out in a refusal": lambda s: (
        s.statuses.update({POST: 401}),
        s.answers.update({POST: " " * 6395 + KEY}),
    ),
    "as a finish reason, escaped": lambda s: s.answers.update(
        {POST: json.dumps(answered(token_ids=[], finish_reason="KEY")).replace("KEY", escaped(KEY))}
    ),
    "as a model, escaped": lambda s: s.answers.update(
        {"/v1/models": json.dumps({"data": [{"id": "?"}]}).replace("?", escaped("x" * 110 + KEY))}
    ),
    "behind a status": lambda s: (
        s.statuses.update({POST: 500}),
        s.reasons.update({POST: f"\x1b[2J {KEY}"}),
    ),
    "in a header": lambda s: (
        s.statuses.update({POST: 500}),
        s.headers.update({POST: {"X-Key": KEY}}),
    ),
    "in a deep finish reason": lambda s: s.answers.update(
        {POST: json.dumps(answered(finish_reason=0)).replace("0}", f"{'[' * 900}{']' * 900}}}")}
    ),
    "encoded": lambda s: (
        s.statuses.update({POST: 500}),
        s.answers.update({POST: base64.b64encode(f"Bearer {KEY}".encode()) + KEY.encode()}),
    ),
    "steering the terminal": lambda s: (
        s.statuses.update({POST: 500}),
        s.answers.update({POST: "\x1b[2J\x9b\u202e\ud800"}),
    ),
    "deep": lambda s: s.answers.update({POST: b"[" * 100_000}),
    "compressed": lambda s: s.headers.update({POST: {"Content-Encoding": "gzip"}}),
    "elsewhere": lambda s: (
        s.statuses.update({POST: 307}),
        s.headers.update({POST: {"Location": f"http://127.0.0.2/{KEY}"}}),
    ),
}


@pytest.mark.parametrize("lie", VLLM_LIES)
def test_lies_of_vllm(lie: str, av: Path, lying: LyingNDIF, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    lying.answers.update({"/v1/models": {"data": [{"id": str(av)}]}, POST: answered()})
    VLLM_LIES[lie](lying)
    vllm_refuses(av, lying)
    assert KEY[:12] not in caplog.text and "\x1b" not in caplog.text


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HTTPS_PROXY", "garbage://x"), ("ALL_PROXY", "\x01"), ("SSL_CERT_FILE", "/no/such/file")],
)
def test_an_environment_that_vllm_cannot_be_asked_with(
    variable: str, value: str, av: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(NLARemoteError, match=f"look at .*{variable}") as caught:
        NLA.from_pretrained(av=av, engine="vllm", url=Server("https://x.invalid", api_key=KEY))
    assert KEY not in shown(caught.value) and caught.value.cause == "settings"


@pytest.mark.parametrize(
    "url", ["http://h/?k={}", "http://{}@h", "http://u:{}@h:1", "http://h/#{}", "{}@h", "h?{}"]
)
def test_an_address_with_a_key_in_it_is_not_quoted(url: str) -> None:
    with pytest.raises(NLAError, match="a key goes into api_key=") as caught:
        Server(url.format(SECRET), api_key=KEY)
    assert SECRET not in shown(caught.value) and KEY not in shown(caught.value)
    assert KEY not in repr(Server("http://h", api_key=KEY))
    with pytest.raises(NLAError) as caught:
        Server("http://h", api_key=KEY + "\n")
    assert KEY not in shown(caught.value)
    if "//" in url and "h?" not in url:
        with pytest.raises(NLAError) as caught:
            NLA.from_pretrained("tiny", engine="ndif:" + url.format(SECRET))
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_results_of_every_protocol_are_read(protocol: int) -> None:
    """A real server's pickler writes protocol 4, which torch's safe reader does not know."""
    tensor = torch.randn(3, 4)
    sent = {
        "a": tensor, "b": [tensor[1], "a", "text", 3, 2.5, None, True], "c": (tensor, (1, "a")),
        "nested": {"a": {"a": tensor.half()}},
    }  # fmt: skip
    content = io.BytesIO()
    torch.save(sent, content, pickle_protocol=protocol)
    found = read_result(content.getvalue(), compressed=False)
    assert torch.equal(found["a"], tensor) and torch.equal(found["c"][0], tensor)
    assert torch.equal(found["b"][0], tensor[1]) and found["b"][1:] == sent["b"][1:]
    assert found["c"][1] == (1, "a") and torch.equal(found["nested"]["a"]["a"], tensor.half())


def test_our_own_words_are_left_as_they_are() -> None:
    """What holds a key shows it as `<key>`; that is no way of writing it."""
    error = Server("http://127.0.0.1:1", api_key="another").error("does not accept the API key")
    assert "does not accept the API key" in str(error) and "another" not in str(error)


@pytest.mark.parametrize("chunk", [10**4000, 1e999])
def test_settings_that_are_odd_numbers(chunk: Any) -> None:
    told = of_sglang({"chunked_prefill_size": chunk}, Server("http://h"), "float32", frozenset())
    assert len(told.wrong) == 1 and len(told.wrong[0]) < 400


def test_a_length_that_is_no_number() -> None:
    for length in (True, -1, 1.5, "9", None):
        cards = {"data": [{"id": "m", "max_model_len": length}]}
        assert listed(cards, "http://h")[0].max_len is None


def test_nnsight_was_imported_first() -> None:
    """It gives every object a `save`, with which anyio cannot be imported."""
    code = """
import nnsight, sys
from nla_lens.engines.http import import_anyio
assert "anyio._backends._asyncio" not in sys.modules
had = hasattr(object, "save")
import_anyio()
import anyio.abc
assert hasattr(object, "save") == had
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
