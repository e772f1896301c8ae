"""One sidecar file: every spelling that was seen, and everything a stranger could put there."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import yaml

from nla_lens import NLAError
from nla_lens.checkpoints.sidecar import Sidecar, read_sidecar

from .checkpoints import ABSENT, AV_TEMPLATE, sidecar, write_sidecar
from .checkpoints.sidecars import override

D, K = 64, 3


def made(role: str = "av", **options) -> dict:
    defaults = {"d_model": D, "layer": K, "base": "test/source", "injection_scale": 30.0}
    return sidecar(role, "llama", **(defaults | options))


def read(directory: Path, content) -> Sidecar:
    write_sidecar(directory, content)
    return read_sidecar(directory)


@pytest.mark.parametrize("written", ["020", "1:30", "0_2", "00", "-012", "1:30.5"])
@pytest.mark.parametrize("key", ["d_model", "extraction_layer_index", "injection_scale"])
def test_numbers_that_readers_of_yaml_differ_on(written: str, key: str, tmp_path: Path) -> None:
    """020 is 16 in YAML 1.1 and 20 in 1.2, 1:30 is 90 and a text: another layer, silently."""
    text = yaml.safe_dump(made())
    line = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
    at = line.index(key)
    (tmp_path / "nla_meta.yaml").write_text(text.replace(line, f"{line[:at]}{key}: {written}"))
    with pytest.raises(NLAError, match=f"{key} is '{written}'"):
        read_sidecar(tmp_path)
    # Where it is nobody's number it is no reason not to read the rest.
    (tmp_path / "nla_meta.yaml").write_text(f"{text}\nstarted: {written}\n")
    assert read_sidecar(tmp_path).layer == K


# --- accepted -------------------------------------------------------------------------------------

# name -> (sidecar, overrides, what is read)
ACCEPTED = {
    "schema 2, av": (made(), {}, {"role": "av", "layer": K, "d_model": D, "injection_scale": 30.0}),
    "schema 1, av": (made(schema=1), {}, {"role": "av", "layer": K}),
    "schema 1, actor": (made(schema=1, spelling="actor"), {}, {"role": "av", "layer": K}),
    "schema 2, actor": (made(spelling="actor"), {}, {"role": "av", "av_template": AV_TEMPLATE}),
    "schema 2, ar": (made("ar"), {}, {"role": "ar", "ar_blocks_below": K, "layer": K}),
    "schema 1, critic": (
        made("ar", schema=1, spelling="actor"),
        {},
        {"role": "ar", "layer": K, "ar_blocks_below": K},
    ),
    "no schema_version": (made(), {"schema_version": ABSENT}, {"layer": K}),
    "data set": (
        made(kind="nla_dataset", schema=1, spelling="actor"),
        {},
        {
            "kind": "nla_dataset",
            "role": None,
            "layer": K,
            "d_model": D,
            "injection_scale": None,
            "source_model": "test/source",
            "mse_scale_given": False,
            "av_template": AV_TEMPLATE,
        },
    ),
    "no layer": (made(), {"extraction_layer_index": ABSENT}, {"layer": None}),
    "layer in the ar section alone": (made("ar"), {"extraction_layer_index": ABSENT}, {"layer": K}),
    "layer as ar.num_hidden_layers alone": (
        made("ar", schema=1),
        {"extraction_layer_index": ABSENT},
        {"layer": K},
    ),
    "layer in extraction": (
        made(),
        {"extraction_layer_index": ABSENT, "extraction": {"layer_index": 5}},
        {"layer": 5},
    ),
    "width in extraction": (
        made(),
        {"d_model": ABSENT, "extraction": {"d_model": D}},
        {"d_model": D},
    ),
    "layer 0": (made(layer=0), {}, {"layer": 0}),
    "no role": (made(), {"role": ABSENT}, {"role": None}),
    "scale null": (made(injection_scale=None), {}, {"injection_scale": None}),
    "scale absent": (made(injection_scale=ABSENT), {}, {"injection_scale": None}),
    "scale sqrt_d_model": (made(injection_scale="sqrt_d_model"), {}, {"injection_scale": 8.0}),
    "scale an integer": (made(injection_scale=150), {}, {"injection_scale": 150.0}),
    "scale a numeric string": (made(injection_scale="150.0"), {}, {"injection_scale": 150.0}),
    "scale 1e5 as YAML reads it": (made(injection_scale="1e5"), {}, {"injection_scale": 1e5}),
    "scale with blanks": (made(injection_scale=" 8e4 "), {}, {"injection_scale": 80000.0}),
    "mse_scale a number": (
        made("ar", mse_scale=59.8665),
        {},
        {"mse_scale": 59.8665, "mse_scale_given": True},
    ),
    "mse_scale null": (
        made("ar", mse_scale=None),
        {},
        {"mse_scale": None, "mse_scale_given": True},
    ),
    "mse_scale absent": (made("ar"), {}, {"mse_scale": None, "mse_scale_given": False}),
    "mse_scale sqrt_d_model": (
        made("ar", mse_scale="sqrt_d_model"),
        {},
        {"mse_scale": math.sqrt(D)},
    ),
    "mse_scale raw": (
        made("ar", mse_scale="raw"),
        {},
        {"mse_scale": None, "mse_scale_given": True},
    ),
    "no extraction": (made(), {"extraction": ABSENT}, {"injection_scale": None}),
    "extraction null": (made(), {"extraction": None}, {"injection_scale": None}),
    "no tokens": (made(), {"tokens": ABSENT}, {"injection_char": None, "left_id": None}),
    "no suffix": (made("ar"), {"tokens": {"critic_suffix_ids": None}}, {"critic_suffix_ids": None}),
    "a suffix": (
        made("ar"),
        {"tokens": {"critic_suffix_ids": [3, 1]}},
        {"critic_suffix_ids": (3, 1)},
    ),
    "our own keys": (
        made("ar"),
        {"extraction": {"var_nrm": 0.5, "min_position": 0, "injection_rule": "norm_matched_add"}},
        {"var_nrm": 0.5, "min_position": 0, "injection_rule": "norm_matched_add"},
    ),
    "both spellings alike": (
        made(),
        {"prompt_templates": {"actor": AV_TEMPLATE}},
        {"av_template": AV_TEMPLATE},
    ),
    "keys nobody knows": (
        made(),
        {"future": {"deep": [1, 2]}, "extraction": {"x": 1}},
        {"layer": K},
    ),
    "a template with braces": (
        made(),
        {"prompt_templates": {"av": "{a!r} {0.__class__}{injection_char}"}},
        {"av_template": "{a!r} {0.__class__}{injection_char}"},
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(tmp_path: Path, name: str) -> None:
    content, overrides, wanted = ACCEPTED[name]
    got = read(tmp_path, override(content, overrides))
    assert {key: getattr(got, key) for key in wanted} == wanted
    assert got.path == tmp_path / "nla_meta.yaml"


# --- refused --------------------------------------------------------------------------------------

# name -> (overrides of an AV's sidecar, what the message names)
REFUSED = {
    "kind unknown": ({"kind": "nla_modell"}, "kind is 'nla_modell'; expected nla_model or"),
    "kind absent": ({"kind": ABSENT}, "kind is None"),
    "kind a list": ({"kind": ["nla_model"]}, r"kind is \['nla_model'\]; expected text"),
    "schema 3": ({"schema_version": 3}, "schema_version is 3; this nla_lens reads"),
    "schema text": ({"schema_version": "two"}, "schema_version is 'two'; expected an integer"),
    "role unknown": ({"role": "judge"}, "role is 'judge'; expected av or ar"),
    "role a number": ({"role": 1}, "role is 1; expected text"),
    "d_model text": ({"d_model": "64"}, "d_model is '64'; expected an integer of at least 1"),
    "d_model true": ({"d_model": True}, "d_model is True; expected an integer"),
    "d_model a float": ({"d_model": 64.0}, "d_model is 64.0; expected an integer"),
    "d_model zero": ({"d_model": 0}, "d_model is 0; expected an integer of at least 1"),
    "d_model negative": ({"d_model": -64}, "d_model is -64"),
    "d_model huge": ({"d_model": 2**40}, "d_model is 1099511627776"),
    "d_model a list": ({"d_model": [64]}, r"d_model is \[64\]"),
    "two widths": (
        {"extraction": {"d_model": 32}},
        "about the width.*'d_model': 64.*'extraction.d_model': 32",
    ),
    "layer text": ({"extraction_layer_index": "3"}, "extraction_layer_index is '3'"),
    "layer negative": (
        {"extraction_layer_index": -1},
        "extraction_layer_index is -1; expected an integer of at least 0",
    ),
    "layer false": ({"extraction_layer_index": False}, "extraction_layer_index is False"),
    "two layers": (
        {"extraction": {"layer_index": 4}},
        "extraction layer.*'extraction_layer_index': 3.*'extraction.layer_index': 4",
    ),
    "layer and ar.num_hidden_layers": (
        {"ar": {"num_hidden_layers": 4}},
        "'ar.num_hidden_layers': 4",
    ),
    "layer and critic.num_hidden_layers": (
        {"critic": {"num_hidden_layers": 4}},
        "'critic.num_hidden_layers': 4",
    ),
    "scale text": (
        {"extraction": {"injection_scale": "large"}},
        "extraction.injection_scale is 'large'; expected a positive number, "
        '"sqrt_d_model" or null',
    ),
    "scale zero": ({"extraction": {"injection_scale": 0}}, "extraction.injection_scale is 0;"),
    "scale negative": ({"extraction": {"injection_scale": -3.0}}, "injection_scale is -3.0"),
    "scale NaN": ({"extraction": {"injection_scale": float("nan")}}, "injection_scale is nan"),
    "scale infinite": ({"extraction": {"injection_scale": "inf"}}, "injection_scale is 'inf'"),
    "scale true": ({"extraction": {"injection_scale": True}}, "injection_scale is True"),
    "scale a list": ({"extraction": {"injection_scale": [30.0]}}, r"injection_scale is \[30.0\]"),
    "scale past float32": ({"extraction": {"injection_scale": 1e39}}, "injection_scale is 1e\\+39"),
    "scale vanishing": ({"extraction": {"injection_scale": "1e-40"}}, "injection_scale is '1e-40'"),
    "mse_scale a mapping": (
        {"extraction": {"mse_scale": {"a": 1}}},
        "extraction.mse_scale is {'a': 1}",
    ),
    "sqrt_d_model of nothing": (
        {"d_model": ABSENT, "extraction": {"injection_scale": "sqrt_d_model"}},
        "injection_scale is 'sqrt_d_model'; expected a number, since the sidecar has no d_model",
    ),
    "rule unknown": (
        {"extraction": {"injection_rule": "add"}},
        r"injection_rule is 'add'; known are \['replace', 'norm_matched_add'\]",
    ),
    "rule a list": (
        {"extraction": {"injection_rule": ["replace"]}},
        "injection_rule is .*expected text",
    ),
    "min_position": ({"extraction": {"min_position": 1.5}}, "extraction.min_position is 1.5"),
    "extraction a list": ({"extraction": [1]}, r"extraction is \[1\]; expected a mapping"),
    "extraction false": ({"extraction": False}, "extraction is False; expected a mapping"),
    "extraction zero": ({"extraction": 0}, "extraction is 0; expected a mapping"),
    "extraction empty text": ({"extraction": ""}, "extraction is ''; expected a mapping"),
    "tokens text": ({"tokens": "㎡"}, "tokens is '㎡'; expected a mapping"),
    "prompt_templates a list": ({"prompt_templates": ["a"]}, "prompt_templates is"),
    "ar a number": ({"ar": 3}, "ar is 3; expected a mapping"),
    "template a list": (
        {"prompt_templates": {"av": ["a"]}},
        r"prompt_templates.av is \['a'\]; expected text",
    ),
    "templates that differ": (
        {"prompt_templates": {"actor": "other"}},
        "prompt_templates.av and prompt_templates.actor are two spellings of one key, and differ",
    ),
    "char a number": (
        {"tokens": {"injection_char": 7}},
        "tokens.injection_char is 7; expected text",
    ),
    "marker id text": (
        {"tokens": {"injection_token_id": "12"}},
        "tokens.injection_token_id is '12'",
    ),
    "marker id true": (
        {"tokens": {"injection_token_id": True}},
        "tokens.injection_token_id is True",
    ),
    "left id a float": (
        {"tokens": {"injection_left_neighbor_id": 1.0}},
        "tokens.injection_left_neighbor_id is 1.0",
    ),
    "right id negative": (
        {"tokens": {"injection_right_neighbor_id": -1}},
        "tokens.injection_right_neighbor_id is -1",
    ),
    "suffix a number": (
        {"tokens": {"critic_suffix_ids": 5}},
        "tokens.critic_suffix_ids is 5; expected a list of token ids",
    ),
    "suffix of text": ({"tokens": {"critic_suffix_ids": ["a"]}}, "critic_suffix_ids is"),
    "suffix of booleans": ({"tokens": {"critic_suffix_ids": [True]}}, "critic_suffix_ids is"),
    "base a list": ({"base_checkpoint": ["a", "b"]}, "base_checkpoint is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    overrides, names = REFUSED[name]
    with pytest.raises(NLAError, match=names) as caught:
        read(tmp_path, override(made(), overrides))
    first_line = str(caught.value).splitlines()[0]
    assert str(tmp_path / "nla_meta.yaml") in first_line
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


# --- files that are no sidecars -------------------------------------------------------------------

PLAIN = yaml.safe_dump(made(), allow_unicode=True)
FILES = {
    "empty": ("", "must hold a mapping, found NoneType"),
    "a list": ("- a\n- b\n", "must hold a mapping, found list"),
    "text": ("just text", "must hold a mapping, found str"),
    "a number": ("12", "must hold a mapping, found int"),
    "invalid UTF-8": (b"kind: \xff\xfe\n", "cannot be read as YAML"),
    "UTF-16": ("kind: nla_model".encode("utf-16"), "cannot be read as YAML"),
    "broken YAML": ("kind: [nla_model", "cannot be read as YAML"),
    "a tab": ("kind:\n\t- a", "cannot be read as YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "cannot be read as YAML"),
    "control characters": ("kind: \x00\x07", "cannot be read as YAML"),
    "an alias": ("a: &x [1]\nb: *x\n", "aliases are not accepted"),
    "a billion laughs": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 12)),
        "aliases are not accepted",
    ),
    "a merge key": ("a: &x {kind: nla_model}\n<<: *x\n", "aliases are not accepted"),
    "an endless alias": ("a: &x [*x]\n", "aliases are not accepted"),
    "deep lists": ("a: " + "[" * 30 + "]" * 30, "nested deeper than 20 levels"),
    "deep lists, never closed": ("a: " + "[" * 200_000, "nested deeper than 20 levels"),
    "deep mappings": ("".join(f"{' ' * i}a:\n" for i in range(40)), "nested deeper than 20"),
    "python objects": ("kind: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    "python names": ("kind: !!python/name:os.system", "cannot be read as YAML"),
    "a bad timestamp": ("kind: !!timestamp nonsense", "cannot be read as YAML"),
    "an impossible date": ("kind: 2001-99-99", "cannot be read as YAML"),
    "a bad float": ("kind: !!float x", "cannot be read as YAML"),
    "an empty integer": ("kind: !!int ''", "cannot be read as YAML"),
    "an integer of 5000 digits": ("kind: " + "1" * 5000, "cannot be read as YAML"),
    "a bad boolean": ("kind: !!bool perhaps", "cannot be read as YAML"),
    "a list as key": ("? [a]\n: 1\n", "cannot be read as YAML"),
    "bad base64": ("kind: !!binary '='", "kind is|cannot be read as YAML"),
    "a set": ("kind: !!set {a, b}", "kind is .*expected text"),
    "too large": ("# " + "x" * 250_000, "has 250002 bytes; a sidecar has at most 250000"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_sidecars(tmp_path: Path, name: str) -> None:
    content, names = FILES[name]
    path = tmp_path / "nla_meta.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    with pytest.raises(NLAError, match=names) as caught:
        read_sidecar(tmp_path)
    assert time.process_time() - started < 5
    assert str(path) in str(caught.value).splitlines()[0]
    assert len(str(caught.value)) < 700


def test_a_missing_sidecar(tmp_path: Path) -> None:
    with pytest.raises(NLAError, match=r"no nla_meta.yaml in .*not an NLA checkpoint.*ask whoever"):
        read_sidecar(tmp_path)
    (tmp_path / "nla_meta.yaml").mkdir()
    with pytest.raises(NLAError, match=r"no nla_meta\.yaml"):
        read_sidecar(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_an_unreadable_sidecar(tmp_path: Path) -> None:
    write_sidecar(tmp_path, PLAIN).chmod(0)
    with pytest.raises(NLAError, match="cannot be read"):
        read_sidecar(tmp_path)


def test_nothing_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "made-by-the-sidecar"
    with pytest.raises(NLAError):
        read(tmp_path, f"kind: !!python/object/apply:pathlib.Path.touch ['{target}']")
    assert not target.exists()


def test_the_largest_sidecar_is_read_in_seconds(tmp_path: Path) -> None:
    """Just below the limit, and as slow to parse as it gets: many short entries."""
    many = "trained_on:\n" + "- a\n" * 62_000
    started = time.process_time()
    assert read(tmp_path, PLAIN.replace("trained_on:\n- test/activations\n", many)).layer == K
    assert time.process_time() - started < 10
