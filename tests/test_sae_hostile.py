"""Dictionary files made to run code, to fill the memory, or to be misread; names that are none."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nla_lens import NLAError
from nla_lens.adapters.sae import load_dictionary

from . import dictionary_files as files

# --- pickles --------------------------------------------------------------------------------------


class Calls:
    """What unpickles by calling a function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


class Claimed:
    """A tensor of a storage that is called so long, whatever its record holds."""

    def __init__(self, key: str, n: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.key, self.n, self.size, self.stride = key, n, size, stride

    def __reduce__(self) -> tuple:
        rebuild: Any = torch._utils._rebuild_tensor_v2
        storage = _Storage(self.key, self.n)
        return rebuild, (storage, 0, self.size, self.stride, False, OrderedDict())


class _Storage:
    def __init__(self, key: str, n: int) -> None:
        self.id = ("storage", torch.FloatStorage, key, "cpu", n)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        return value.id if isinstance(value, _Storage) else None


def archive(
    path: Path, state: object, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """A file as `torch.save` makes it, with any pickle and any records."""
    held = io.BytesIO()
    _Pickler(held, protocol=2).dump(state)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", held.getvalue())
        file.writestr("archive/byteorder", "little")
        for name, content in records.items():
            file.writestr(f"archive/data/{name}", content)
        file.writestr("archive/version", "3\n")
    return path


def good_state() -> dict[str, Any]:
    sizes = {"encoder.weight": (8, 4), "decoder.weight": (4, 8)}
    state = {n: Claimed(n, 32, s, (s[1], 1)) for n, s in sizes.items()}
    vectors = {"encoder.bias": 8, "decoder.bias": 4}
    return state | {n: Claimed(n, length, (length,), (1,)) for n, length in vectors.items()}


def good_records() -> dict[str, bytes]:
    sizes = {"encoder.weight": 32, "decoder.weight": 32, "encoder.bias": 8, "decoder.bias": 4}
    return {name: torch.arange(n).float().numpy().tobytes() for name, n in sizes.items()}


def write(root: Path, state: object, records: dict[str, bytes], **options: Any) -> Path:
    return archive(root / "X-SAE-l9.pt", state, records, **options)


def test_the_archive_of_these_tests_is_read(tmp_path: Path) -> None:
    sae = load_dictionary(write(tmp_path, good_state(), good_records()))
    assert torch.equal(sae.W_enc, torch.arange(32).float().reshape(8, 4).T)
    assert sae.rows([3]).tolist() == [[3.0, 11.0, 19.0, 27.0]]


def bomb(root: Path) -> Path:
    zeros = bytes(4 << 30 >> 6)
    return write(root, good_state(), {"big": zeros}, compression=zipfile.ZIP_DEFLATED)


def pickle_bomb(root: Path) -> Path:
    long = good_state() | {"x": "a" * (64 << 20)}
    return write(root, long, good_records(), compression=zipfile.ZIP_DEFLATED)


def long_pickle(root: Path) -> Path:
    return write(root, good_state() | {"x": "a" * (20 << 20)}, good_records())


def many_bytes(root: Path) -> Path:
    return write(root, good_state() | {"x": Calls(bytearray, 100 << 30)}, good_records())


def many_bytes_of_old_torch(root: Path) -> Path:
    path = root / "X-SAE-l9.pt"
    state = {"x": Calls(bytearray, 100 << 30)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def code(root: Path) -> Path:
    return write(root, good_state() | {"x": Calls(os.mkdir, str(root / "trace"))}, good_records())


def no_stride(root: Path) -> Path:
    wide = {"encoder.weight": Claimed("encoder.weight", 32, (10**11, 4), (0, 1))}
    return write(root, good_state() | wide, good_records())


def expanded(root: Path) -> Path:
    path = root / "X-SAE-l9.pt"
    torch.save({"encoder.weight": torch.ones(1, 4).expand(10**9, 4)}, path)
    return path


def expanded_of_old_torch(root: Path) -> Path:
    path = root / "X-SAE-l9.pt"
    state = {"encoder.weight": torch.ones(1, 4).expand(10**9, 4)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def beyond_the_file(root: Path) -> Path:
    long = {"encoder.weight": Claimed("encoder.weight", 10**10, (10**9, 4), (4, 1))}
    return write(root, good_state() | long, good_records())


def into_the_neighbour(root: Path) -> Path:
    long = {"encoder.weight": Claimed("encoder.weight", 64, (16, 4), (4, 1))}
    return write(root, good_state() | long, good_records())


def twice(root: Path) -> Path:
    path = write(root, good_state(), good_records())
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    return path


def with_a_comment(root: Path) -> Path:
    """Two readers of archives may then take two directories for the archive's own."""
    path = write(root, good_state(), good_records())
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"x" * 100
    return path


def sparse(root: Path) -> Path:
    path = root / "X-SAE-l9.pt"
    torch.save({"encoder.weight": torch.eye(4).to_sparse()}, path)
    return path


def of_other_classes(root: Path) -> Path:
    path = root / "X-SAE-l9.pt"
    torch.save({"x": torch.nn.Linear(2, 2)}, path)
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "bomb": (bomb, "compressed"),
    "pickle-bomb": (pickle_bomb, "compressed"),
    "long-pickle": (long_pickle, "describes"),
    "bytes": (many_bytes, "bytearray"),
    "old-bytes": (many_bytes_of_old_torch, "bytearray"),
    "code": (code, "mkdir"),
    "stride-0": (no_stride, "bytes for"),
    "expanded": (expanded, "bytes for"),
    "old-expanded": (expanded_of_old_torch, "bytes for"),
    "beyond": (beyond_the_file, "bytes|cut short"),
    "neighbour": (into_the_neighbour, "of a record of|cut short"),
    "twice": (twice, "twice"),
    "comment": (with_a_comment, "cut short"),
    "sparse": (sparse, "refused|plain"),
    "classes": (of_other_classes, "refused"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    make, named = HOSTILE[name]
    path = make(tmp_path)
    with pytest.raises(NLAError, match=named) as caught:
        load_dictionary(path)
    assert path.name in str(caught.value)
    assert not (tmp_path / "trace").exists()


MEMORY = """
import re, sys
from nla_lens import NLAError
from nla_lens.adapters.sae import load_dictionary

def highest():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1])

base = highest()
for path in sys.argv[1:]:
    try:
        load_dictionary(path)
    except NLAError:
        continue
    raise SystemExit(f"{path} was read")
print(highest() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
def test_hostile_files_cost_no_memory(tmp_path: Path) -> None:
    paths = []
    for name, (make, _) in HOSTILE.items():
        (tmp_path / name).mkdir()
        paths.append(str(make(tmp_path / name)))
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    # In KiB.
    assert int(run.stdout) < 200 * 1024


# --- safetensors ----------------------------------------------------------------------------------


def header(content: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return (len(content) if length is None else length).to_bytes(8, "little") + content + data


def entry(start: int, end: int, **more: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end], **more}


def as_header(**entries: object) -> bytes:
    return header(json.dumps(entries).encode(), data=bytes(64))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        header(b"{}", 1 << 62),
        header(b"{}", 90 << 20),
        header(b"{}", 1000),
        header(b"[" * 200_000),
        header(b"[1, 2]"),
        header(b"null"),
        header(b'{"b_dec": 1}'),
        header(b'{"b_dec": {"dtype": "F32"}}'),
        header(b'{"b_dec": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "b_dec": {}}'),
        as_header(a=entry(0, 32), b=entry(16, 48)),
        as_header(a=entry(0, 64, shape=[10**9, 10**9])),
        as_header(a=entry(0, 64, shape=[2**63, 2])),
        as_header(a=entry(0, 64, shape=[-16])),
        as_header(a=entry(0, 64, dtype="F31")),
        as_header(a=entry(0, 10**12)),
        as_header(a=entry(0, 64, data_offsets=["0", "64"])),
        as_header(a=entry(0, 64, data_offsets=[64, 0])),
        as_header(a=entry(0, 64, data_offsets=[])),
        as_header(a=entry(8, 64)),
    ],
)
def test_headers_that_lie(content: bytes, tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    (case.source / "sae_weights.safetensors").write_bytes(content)
    with pytest.raises(NLAError, match="sae_weights"):
        load_dictionary(case.source)


def test_no_regular_file_is_waited_for(tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    for name in ("sae_weights.safetensors", "cfg.json"):
        content = (case.source / name).read_bytes()
        (case.source / name).unlink()
        os.mkfifo(case.source / name)
        with pytest.raises(NLAError, match=name):
            load_dictionary(case.source)
        (case.source / name).unlink()
        (case.source / name).write_bytes(content)
    (case.source / "sae_weights.safetensors").unlink()
    (case.source / "sae_weights.safetensors").symlink_to("/dev/zero")
    with pytest.raises(NLAError, match="regular"):
        load_dictionary(case.source)


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"a": ' * 2000,
        b'{"d_in": 12, "d_in": 13}',
        b'{"d_in": NaN}',
        b'{"k": 1e400}',
        b" " * (20 << 20) + b"{}",
    ],
)
def test_configs_that_are_none(config: bytes, tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    (case.source / "cfg.json").write_bytes(config)
    if config.startswith(b'{"k"'):
        load_dictionary(case.source)  # k is not looked at there
        return
    with pytest.raises(NLAError, match=r"cfg\.json"):
        load_dictionary(case.source)


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2.5,
    1e308,
    "",
    "x",
    [],
    [[]],
    {},
    {"a": {}},
    10**40,
    "\x1b[31m",
]


@pytest.mark.parametrize(
    "make",
    [
        files.saelens,
        files.saelens_before_6,
        files.gemma_scope,
        files.llama_scope,
        files.qwen_scope,
        files.sparsify,
        lambda root: files.dictionary_learning(root, "AutoEncoderTopK"),
    ],
)
def test_a_config_of_odd_values_is_read_or_refused(make: Callable, tmp_path: Path) -> None:
    """Each value of each config replaced by each of these: no other exception, no raw escapes."""
    case = make(tmp_path)
    folder = case.source if case.source.is_dir() else case.source.parent
    path = next(p for p in folder.iterdir() if p.suffix == ".json")
    whole = json.loads(path.read_text())
    inner = [(whole, key) for key in whole]
    inner += [(v, k) for v in whole.values() if isinstance(v, dict) for k in v]
    refused = 0
    for holder, key in inner:
        kept = holder[key]
        for odd in ODD:
            holder[key] = odd
            path.write_text(json.dumps(whole))
            try:
                sae = load_dictionary(case.source)
                assert sae.encode(torch.ones(1, files.D)).shape == (1, files.F)
            except NLAError as error:
                refused += 1
                assert "\x1b" not in str(error)
        holder[key] = kept
    assert refused > 20


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "",
        " ",
        "~nosuchuser/x",
        "~nosuchuser",
        "a\0b",
        "a/b\0c",
        "x" * 300,
        "x/" + "y" * 300,
        "x/" * 3000,
        "/nowhere/at/all",
        "./nowhere",
        "../nowhere/x",
        "owner/../etc",
        "owner//name",
        "//",
        "https://huggingface.co/a/b",
        "owner",
        "\ud800/x",
        "a\n/b\x1b[31m",
        Path("nowhere"),
    ],
)
def test_odd_names_are_refused(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NLAError) as caught:
        load_dictionary(source)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("inside", ["../x", "/etc", "~", "a/../../b", "a\0b", "", 7, "x" * 5000])
@pytest.mark.parametrize("key", ["subfolder", "filename"])
def test_nothing_outside_of_the_source(key: str, inside: Any, tmp_path: Path) -> None:
    files.saelens(tmp_path)
    options: Any = {key: inside}
    with pytest.raises(NLAError):
        load_dictionary(tmp_path, **options)


def test_a_large_tree_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    scan = os.scandir

    def counted(folder: Any) -> Any:
        nonlocal seen
        seen += 1
        return scan(folder)

    deep = tmp_path
    for _ in range(30):
        deep = deep / "x"
        deep.mkdir()
    (deep / "sae.safetensors").write_bytes(b"")
    monkeypatch.setattr("os.scandir", counted)
    with pytest.raises(NLAError, match="no dictionary"):
        load_dictionary(tmp_path)
    assert seen <= 4
    monkeypatch.setattr("nla_lens.adapters.dictionaries.loading._MOST_LOOKED_AT", 10)
    for i in range(100):
        (tmp_path / f"folder{i}").mkdir()
    seen = 0
    with pytest.raises(NLAError, match="no dictionary"):
        load_dictionary(tmp_path)
    assert seen <= 4


def test_the_good_file_is_still_good(tmp_path: Path) -> None:
    """What is refused above is refused for what was changed in it."""
    case = files.saelens(tmp_path)
    assert set(load_file(case.source / "sae_weights.safetensors")) >= {"W_enc", "W_dec"}
    assert torch.equal(load_dictionary(case.source).W_dec, case.weights.W_dec)
