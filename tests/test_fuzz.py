"""Files that strangers made: whatever is in them, the answer is a result or an NLAError.

A few hundred files in the default suite, the same ones every time. Many more, and new ones:

    NLA_LENS_FUZZ=20000 python -m pytest tests/test_fuzz.py -s
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save

from nla_lens import NLAError
from nla_lens.adapters.dictionaries.feature_table import FeatureExplanations
from nla_lens.checkpoints.chat import canonical_prompt
from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import build_spec
from nla_lens.foreign import harmless, to_json
from nla_lens.halves.reconstructor import check_prompt, load_head
from nla_lens.models.weights import load_backbone, load_configs, load_tokenizer
from nla_lens.results.display import to_html, to_table
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations

from .checkpoints import reference

# What is warned of, is accepted.
pytestmark = pytest.mark.filterwarnings("ignore::nla_lens.errors.NLAWarning")
MANY = int(os.environ.get("NLA_LENS_FUZZ", "0"))
D = 64


def examples(share: float) -> settings:
    """Settings for a test that takes its share of all examples."""
    return settings(
        max_examples=max(40, math.ceil(share * (MANY or 500))),
        deadline=None,
        derandomize=not MANY,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Small:
    """A checkpoint pair whose sidecars, configs and value head are overwritten again and again."""

    def __init__(self, root: Path, av: Path, ar: Path) -> None:
        no_weights = shutil.ignore_patterns("model*.safetensors")
        self.av = Path(shutil.copytree(av, root / "av", ignore=no_weights))
        self.ar = Path(shutil.copytree(ar, root / "ar"))
        self.metas = {half: reference.read_sidecar(getattr(self, half)) for half in ("av", "ar")}
        self.texts = {
            half: (getattr(self, half) / "nla_meta.yaml").read_bytes() for half in self.metas
        }
        self.config = json.loads((self.ar / "config.json").read_text())
        self.head = (self.ar / "value_head.safetensors").read_bytes()
        self.tokenizers = {half: load_tokenizer(getattr(self, half)) for half in self.metas}
        self.outcomes: Counter[str] = Counter()

    def write(self, half: str, content: bytes) -> None:
        (getattr(self, half) / "nla_meta.yaml").write_bytes(content)

    def read(self) -> None:
        """All of loading that comes before the weights."""
        av, ar = Checkpoint("av", self.av), Checkpoint("ar", self.ar)
        spec = build_spec(av, ar)
        canonical_prompt(spec, self.tokenizers["av"])
        check_prompt(spec, self.tokenizers["ar"])

    def restore(self) -> None:
        for half, text in self.texts.items():
            self.write(half, text)
        (self.ar / "value_head.safetensors").write_bytes(self.head)
        (self.ar / "config.json").write_text(json.dumps(self.config))

    def run(self, action: Callable[[], object]) -> None:
        """Anything but an NLAError fails the test; its message is one line that says something."""
        try:
            action()
        except NLAError as error:
            first_line = str(error).partition("\n")[0]
            assert len(first_line) > 20, error
            self.outcomes["refused"] += 1
        else:
            self.outcomes["accepted"] += 1


@pytest.fixture(scope="module")
def small(pair_dirs, tmp_path_factory):
    made = Small(tmp_path_factory.mktemp("fuzz"), *pair_dirs("qwen2", "replace"))
    made.read()
    yield made
    if MANY:
        print(f"\n{sum(made.outcomes.values())} inputs: {dict(made.outcomes)}")


@pytest.fixture(autouse=True)
def restored(small: Small):
    yield
    small.restore()


# --- strategies ---------------------------------------------------------------------------------

# What YAML and JSON can hold, and what programs tend to trip over.
ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        64,
        2**31,
        2**63,
        10**400,
        0.0,
        -0.0,
        1e39,
        1e-320,
        math.inf,
        -math.inf,
        math.nan,
        "",
        " ",
        "\n",
        "\0",
        "{",
        "{}",
        "{0}",
        "{injection_char}",
        "{explanation}",
        "{injection_char}" * 2,
        "{injection_char.__class__}",
        "sqrt_d_model",
        "raw",
        "none",
        "1e5",
        "nan",
        "inf",
        "-1",
        "1_000",
        "av",
        "ar",
        "actor",
        "critic",
        "nla_model",
        "nla_dataset",
        "replace",
        "norm_matched_add",
        "㈎",
        "㈎㈎",
        "<|im_end|>",
        "../../x",
        "/etc",
        "\u2028",
        "\ud7ff",
        "\U0010ffff",
        [],
        {},
        [[]],
        [None],
        [0] * 50,
        {"a": {"b": [{}]}},
        b"",
    ]
)
VALUES = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.integers() | st.booleans(), inner, max_size=4)
    ),
    max_leaves=8,
)


def paths(mapping: dict, prefix: tuple = ()) -> list[tuple]:
    """Every place in a nested mapping."""
    found = []
    for key, value in mapping.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


ELSEWHERE = [
    ("extraction", "d_model"), ("extraction", "layer_index"), ("extraction", "injection_rule"),
    ("extraction", "var_nrm"), ("extraction", "min_position"), ("extraction", "base_model"),
    ("critic",), ("critic", "num_hidden_layers"), ("ar", "extraction_layer_index"),
    ("prompt_templates", "actor"), ("prompt_templates", "critic"), ("schema_version",),
]  # fmt: skip


def changed(mapping: dict, changes: list[tuple[int, Any, bool]], extra: list[tuple]) -> dict:
    """A copy with values replaced (or keys removed) at places picked by number."""
    made = json.loads(json.dumps(mapping))
    for pick, value, remove in changes:
        places = paths(made) + extra
        *above, last = places[pick % len(places)]
        inner = made
        for key in above:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            continue
        if remove:
            inner.pop(last, None)
        else:
            inner[last] = value
    return made


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), VALUES, st.booleans()), min_size=1, max_size=4)
HALVES = st.sampled_from(["av", "ar"])
YAML_BITS = st.lists(
    st.sampled_from(
        [
            "kind: nla_model\n", "tokens:\n", "  ", "- ", ": ", "? ", "&a ", "*a ", "<<: ",
            "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ",
            "!!pairs ", "!!null ", "!!python/object:os.system ", "!!python/name:os.system ",
            "!x ", "%YAML 9.9\n", "%TAG ! x\n", "---\n", "...\n", "[", "]", "{", "}", ",", "|\n",
            ">-\n", "'", '"', "\\x", "#", "\t", "\r", "\u2028", "\x00", "\ufeff", "0x", "0o9",
            "1e", "1:60:60", ".inf", ".nan", "~", "2001-13-45", "2001-01-01T99:99:99Z", "a",
            "a: b\n", "é", "😀", "1" * 5000, "[" * 50,
        ]
    ),
    max_size=30,
).map("".join)  # fmt: skip


# --- sidecars -----------------------------------------------------------------------------------


@given(half=HALVES, changes=CHANGES)
@examples(0.4)
def test_sidecars_with_other_values(small: Small, half: str, changes) -> None:
    made = changed(small.metas[half], changes, ELSEWHERE)
    small.restore()
    small.write(half, yaml.safe_dump(made, allow_unicode=True).encode("utf-8", "surrogatepass"))
    small.run(small.read)


@given(half=HALVES, content=st.binary(max_size=300) | YAML_BITS.map(str.encode))
@examples(0.1)
def test_sidecars_of_anything(small: Small, half: str, content: bytes) -> None:
    small.restore()
    small.write(half, content)
    small.run(small.read)


@given(
    half=HALVES,
    at=st.integers(0, 5000),
    cut=st.integers(0, 200),
    content=st.binary(max_size=6) | YAML_BITS.map(lambda text: text[:40].encode()),
)
@examples(0.15)
def test_sidecars_with_a_piece_replaced(
    small: Small, half: str, at: int, cut: int, content: bytes
) -> None:
    whole = small.texts[half]
    at %= len(whole)
    small.restore()
    small.write(half, whole[:at] + content + whole[at + cut :])
    small.run(small.read)


@given(changes=CHANGES)
@examples(0.05)
def test_configs_with_other_values(small: Small, changes) -> None:
    small.restore()
    made = changed(small.config, changes, [("text_config",), ("rope_parameters",)])
    (small.ar / "config.json").write_text(json.dumps(made, default=repr))
    small.run(small.read)
    if MANY or len(paths(made)) % 3 == 0:
        small.run(lambda: load_backbone(small.ar, n_blocks=1))


# --- value heads --------------------------------------------------------------------------------

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64,
    torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
TENSORS = st.tuples(
    st.sampled_from(["weight", "bias", "value_head.weight", "", "weight ", "__metadata__", "é"]),
    st.sampled_from([(D, D), (D,), (), (0,), (D, 0), (1, D, D), (D, D + 1), (D - 1, D)]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, math.nan, math.inf, 1e30]),
)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> torch.Tensor:
    filled = torch.full(shape, value if dtype.is_floating_point else 1.0, dtype=torch.float64)
    return filled.to(dtype)


HEADERS = st.fixed_dictionaries(
    {
        "weight": st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(
                    ["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "X", 1]
                ),
                "shape": st.lists(st.sampled_from([0, 1, D, -1, 2**63, "64", None]), max_size=3),
                "data_offsets": st.lists(
                    st.sampled_from([0, 1, D * D * 4, 10**12, -1, 2**64, None]), max_size=3
                ),
            }
        )
        | VALUES
    },
    optional={"bias": VALUES, "__metadata__": VALUES},
)


def safetensors_file(header: bytes, stated: int | None, data: bytes) -> bytes:
    length = len(header) if stated is None else stated
    return struct.pack("<Q", length % 2**64) + header + data


def read_head(small: Small, content: bytes) -> None:
    (small.ar / "value_head.safetensors").write_bytes(content)

    def load() -> None:
        loaded = load_head(Checkpoint("ar", small.ar), D)
        assert loaded["weight"].shape == (D, D) and loaded["weight"].dtype == torch.float32
        assert all(t.isfinite().all() for t in loaded.values())

    small.run(load)


@given(content=st.binary(max_size=400))
@examples(0.05)
def test_value_heads_of_anything(small: Small, content: bytes) -> None:
    read_head(small, content)


@given(length=st.integers(0, 20_000), at=st.integers(0, 20_000), byte=st.integers(0, 255))
@examples(0.1)
def test_value_heads_cut_and_bent(small: Small, length: int, at: int, byte: int) -> None:
    content = bytearray(small.head[:length])
    if content:
        content[at % min(len(content), 200)] = byte
    read_head(small, bytes(content))


@given(
    header=HEADERS.map(lambda h: json.dumps(h, default=repr).encode()) | st.binary(max_size=80),
    stated=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 300),
    size=st.sampled_from([0, 1, D * 4, D * D * 4, D * D * 4 + D * 4]),
)
@examples(0.1)
def test_value_heads_with_other_headers(
    small: Small, header: bytes, stated: int | None, size: int
) -> None:
    read_head(small, safetensors_file(header, stated, b"\0" * size))


@given(tensors=st.lists(TENSORS, max_size=3))
@examples(0.05)
def test_value_heads_of_other_tensors(small: Small, tensors: list) -> None:
    named = {name: tensor(shape, dtype, value) for name, shape, dtype, value in tensors}
    read_head(small, save(named))


# --- what transformers reads ---


@given(
    name=st.sampled_from(["generation_config.json", "tokenizer_config.json", "tokenizer.json"]),
    changes=CHANGES,
)
@examples(0.1)
def test_small_files_with_other_values(small: Small, name: str, changes) -> None:
    path = small.ar / name
    before = path.read_bytes()
    made = changed(json.loads(before), changes, [("eos_token_id",), ("model_max_length",)])
    try:
        path.write_text(json.dumps(made, default=repr))
        small.run(lambda: load_configs(small.ar))
        small.run(lambda: load_tokenizer(small.ar))
    finally:
        path.write_bytes(before)


@given(
    name=st.sampled_from(["generation_config.json", "tokenizer_config.json", "config.json"]),
    at=st.integers(0, 5000),
    cut=st.integers(0, 200),
    content=st.binary(max_size=6)
    | st.sampled_from([b"NaN", b'"\\ud800"', b"[" * 200, b"{", b"1e999"]),
)
@examples(0.1)
def test_small_files_with_a_piece_replaced(
    small: Small, name: str, at: int, cut: int, content: bytes
) -> None:
    path = small.ar / name
    before = path.read_bytes()
    at %= len(before)
    try:
        path.write_bytes(before[:at] + content + before[at + cut :])
        small.run(lambda: load_configs(small.ar))
        small.run(lambda: load_tokenizer(small.ar))
    finally:
        path.write_bytes(before)


# --- results -------------------------------------------------------------------------------------


def view(found: Explanations) -> None:
    """All the ways in which explanations are looked at."""
    assert to_html(found.flat, whole_page=True).encode("utf-8")
    assert found.to_pandas().to_csv().encode("utf-8") and repr(found)
    console = Console(file=io.StringIO(), width=80)
    console.print(to_table(found.flat))
    printed = console.file.getvalue()
    assert harmless(printed) == printed
    assert to_json(found.to_dict()).encode("utf-8")


@given(
    values=st.dictionaries(
        st.sampled_from([*Explanation.TYPES, "index", "sign", "x"]),
        VALUES | st.characters(),
        max_size=5,
    ),
    cut=st.none() | st.integers(0, 400),
    content=st.binary(max_size=6),
)
@examples(0.3)
def test_results_of_anything(small: Small, values: dict, cut: int | None, content: bytes) -> None:
    good = Explanation("a\x1b\x9b\u202e", "b", [1], True, 1.0, token="\ud800", flags=("\x1b",))
    path = small.ar / "results.jsonl"
    form, about = Explanations.LINES, {"shape": [2], "about": {}}
    lines = [good.to_dict(), json.loads(json.dumps({**good.to_dict(), **values}, default=repr))]
    written = form.header(about) + "".join(to_json(line) + "\n" for line in lines)
    whole = written.encode("utf-8", "surrogatepass")
    at = len(whole) if cut is None else cut % len(whole)
    path.write_bytes(whole[:at] + content + whole[at:])
    small.run(lambda: view(Explanations.load(path)))
    path.write_bytes(path.read_bytes().replace(b"nla_lens.explanations", b"nla_lens.features"))
    small.run(lambda: view(FeatureExplanations.load(path)))


# --- that it can fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError("x"), TypeError(), RecursionError(), NLAError("short")])
def test_another_exception_would_be_seen(small: Small, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises((type(error), AssertionError)):
        small.run(fail)
