"""The JSON schema of sidecars against the reader, over the tables of `test_sidecar.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from nla_lens import NLA
from nla_lens.checkpoints.schema import SCHEMA_PATH, complaints, findings, schema
from nla_lens.checkpoints.sidecar import parse_sidecar
from nla_lens.checkpoints.writing import sidecar_of

from .checkpoints import write_sidecar
from .checkpoints.layouts import LAYOUTS
from .checkpoints.sidecars import override
from .test_cli import run as run  # the fixture
from .test_other_trainers import HARMLESS
from .test_sidecar import ACCEPTED, REFUSED, made

# Refused for what several values say together, or for what JSON has no word for; not by shape.
BEYOND_SHAPE = {
    "two widths", "two layers", "layer and ar.num_hidden_layers",
    "layer and critic.num_hidden_layers", "sqrt_d_model of nothing", "templates that differ",
    "d_model a float", "left id a float", "scale NaN", "scale vanishing",
}  # fmt: skip


def test_it_is_a_schema_of_its_draft() -> None:
    Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_reader_accepts_it_accepts(name: str) -> None:
    content, overrides, _ = ACCEPTED[name]
    assert complaints(override(content, overrides)) == []


@pytest.mark.parametrize("name", HARMLESS)
def test_keys_it_does_not_know_pass(name: str) -> None:
    assert complaints(override(made(), HARMLESS[name])) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_reader_refuses_it_refuses(name: str, tmp_path: Path) -> None:
    """All that has a wrong shape; the command finds the rest, too."""
    overrides, _ = REFUSED[name]
    raw = override(made(), overrides)
    assert bool(complaints(raw)) == (name not in BEYOND_SHAPE)
    path = write_sidecar(tmp_path, raw)
    assert findings(path)


def test_a_complaint_names_the_place() -> None:
    (complaint,) = complaints(override(made(), {"tokens": {"injection_token_id": "12"}}))
    assert complaint.startswith("tokens.injection_token_id: '12' is not of type")


def test_what_is_written_is_valid(nla: NLA) -> None:
    for role in ("av", "ar", None):
        raw = yaml.safe_load(yaml.safe_dump(sidecar_of(nla.spec, role)))
        assert complaints(raw) == []
        assert parse_sidecar(raw, Path("x")).role == role


def test_every_key_that_is_written_or_read_is_described() -> None:
    """The words of the reader's source are the schema's."""
    import re

    from nla_lens.checkpoints import section, sidecar

    source = Path(sidecar.__file__).read_text("utf-8") + Path(section.__file__).read_text("utf-8")
    described = set(re.findall(r'"(\w+)": \{', SCHEMA_PATH.read_text("utf-8")))
    read = set()
    for call in re.findall(r"\.(?:text|integer|integers|scale|section|mapping)\(([^)]*)\)", source):
        read |= set(re.findall(r'"(\w+)"', call))
    assert len(read) > 20 and read <= described


def test_the_page_describes_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs" / "nla_meta.md").read_text("utf-8")
    missing = []

    def walk(properties: dict) -> None:
        for key, value in properties.items():
            if f"`{key}`" not in page:
                missing.append(key)
            walk(value.get("properties", {}))

    walk(schema()["properties"])
    assert not missing


def test_the_embedded_ones_are_valid() -> None:
    from nla_lens.checkpoints.releases import TINY_DIR

    paths = sorted(TINY_DIR.rglob("nla_meta.yaml"))
    assert len(paths) >= 3 and all(findings(path) == [] for path in paths)


# --- the command ----------------------------------------------------------------------------------


def test_without_a_checkpoint_it_is_printed(run) -> None:
    got = run("check", "--schema")
    assert (got.status, got.err) == (0, "")
    assert json.loads(got.out) == schema()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints(run, tmp_path: Path, layout: str) -> None:
    root = LAYOUTS[layout](tmp_path / layout)
    got = run("check", "--schema", root)
    n = len(list(root.rglob("nla_meta.yaml")))
    assert (got.status, got.err) == (0, "") and got.out.count("ok ") == n
    path = next(root.rglob("nla_meta.yaml"))
    path.write_text(path.read_text("utf-8").replace("d_model: 64", "d_model: sixty-four"), "utf-8")
    for name in (root, path):
        got = run("check", "--schema", name)
        assert got.status == 1 and "d_model: 'sixty-four' is not of type 'integer'" in got.out


def test_contradictions_are_found_as_well(run, tmp_path: Path) -> None:
    path = write_sidecar(tmp_path, override(made(), {"extraction": {"layer_index": 9}}))
    got = run("check", "--schema", path)
    assert got.status == 1 and "contradicts itself about the extraction layer" in got.out
    assert run("check", "--schema", "tiny").out.count("ok ") == 2


def test_names_that_are_none(run, tmp_path: Path) -> None:
    got = run("check", "--schema", tmp_path / "none")
    assert got.status == 2 and "no checkpoint" in got.err
    (tmp_path / "broken.yaml").write_text("kind: [")
    got = run("check", "--schema", tmp_path / "broken.yaml")
    assert got.status == 2 and "cannot be read as YAML" in got.err
