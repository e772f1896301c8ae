"""Paths as people hand them over: of any type that stands for one, `~`, and what is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_lens import NLA, Calibration, NLAError, explain_corpus, extract, open_store
from nla_lens.adapters.sae import FeatureExplanations, explain_features, load_dictionary
from nla_lens.checkpoints.releases import TINY_DIR
from nla_lens.checks import to_path
from nla_lens.results.explanations import Explanations

from . import dictionary_files
from .killed_writer import latent

CALIBRATION = TINY_DIR / "av" / "nla_calibration.json"
LATENTS = FeatureExplanations([latent(0), latent(1)])


class Named:
    """Stands for a path, and is no `pathlib.Path`."""

    def __init__(self, path: Any) -> None:
        self._path = path

    def __fspath__(self) -> Any:
        return self._path


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


class Own:
    """A dictionary of 3 latents."""

    W_dec = torch.eye(3, 128)
    encode = decode = staticmethod(lambda x: x)


# What is handed a path -> what it does with it.
USES: dict[str, Callable[[NLA, Any], Any]] = {
    "save": lambda nla, path: LATENTS.save(path),
    "to_html": lambda nla, path: LATENTS.to_html(path),
    "to_neuronpedia": lambda nla, path: LATENTS.to_neuronpedia(path, model_id="a", source_id="b"),
    "store": lambda nla, path: explain_features(nla, Own(), [1], store=path, max_new_tokens=2),
    "load": lambda nla, path: FeatureExplanations.load(path),
    "Explanations.load": lambda nla, path: Explanations.load(path),
    "Calibration.save": lambda nla, path: Calibration.load(CALIBRATION).save(path),
    "Calibration.load": lambda nla, path: Calibration.load(path),
    "Calibration.to_html": lambda nla, path: Calibration.load(CALIBRATION).to_html(path),
    "calibration": lambda nla, path: setattr(nla, "calibration", path),
    "open_store": lambda nla, path: open_store(path),
    "from_pretrained": lambda nla, path: NLA.from_pretrained(path),
    "av=": lambda nla, path: NLA.from_pretrained(av=path),
    "base=": lambda nla, path: NLA.from_pretrained(TINY_DIR / "av", base=path),
    "save_pretrained": lambda nla, path: nla.save_pretrained(path),
    "out": lambda nla, path: explain_corpus(nla, ["a text"], out=path, max_new_tokens=2),
    "load_dictionary": lambda nla, path: load_dictionary(path),
    "extract": lambda nla, path: extract(path, ["a text"], 1),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("bad", [3, b"name", ["name"], Named(b"name"), Named(3)])
def test_what_is_no_path_is_named(
    use: str, bad: Any, tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if use == "base=" and bad == 3:
        bad = [3]
    with pytest.raises(NLAError):
        USES[use](tiny, bad)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("as_type", [str, Path, Named])
def test_any_type_and_the_users_folder(
    as_type: Callable[[str], Any], tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`~` was made as a folder of that name by some, and what was saved there found by none."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(elsewhere)
    for suffix in (".jsonl", ".parquet"):
        path = as_type(f"~/latents{suffix}")
        LATENTS.save(path)
        assert FeatureExplanations.load(path) == LATENTS
    assert USES["store"](tiny, as_type("~/sub/store")) is not None
    assert len(FeatureExplanations.load(as_type("~/sub/store"))) == 1
    Calibration.load(CALIBRATION).save(as_type("~/calibration"))
    assert Calibration.load(as_type("~/calibration")) == Calibration.load(CALIBRATION)
    USES["out"](tiny, as_type("~/corpus"))
    assert open_store(as_type("~/corpus")).n_rows > 0
    os.symlink(TINY_DIR, tmp_path / "pair")
    assert NLA.from_pretrained(as_type("~/pair")).spec.d_model == 128
    assert extract(as_type("~/pair/source"), ["a text"], 1)[0].shape[1] == 128
    dictionary_files.saelens(tmp_path)
    assert load_dictionary(as_type("~/saelens-standard")).cfg.d_sae == dictionary_files.F
    assert not os.listdir(elsewhere)


def test_a_user_who_is_not_there() -> None:
    assert to_path("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")


@pytest.mark.parametrize("name", ["", ".", "a\0b", "folder", "file/x", "x" * 300])
def test_a_store_where_none_can_be(
    name: str, tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock and the header of one that grows were looked at outside of what names the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for use in (
        ("store", "out", "save_pretrained") if name not in ("folder", "", ".") else ("store",)
    ):
        with pytest.raises(NLAError):
            USES[use](tiny, name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "use",
    [
        "load",
        "Explanations.load",
        "Calibration.load",
        "open_store",
        "store",
        "out",
        "load_dictionary",
        "from_pretrained",
        "extract",
        "save_pretrained",
    ],
)
@pytest.mark.parametrize("suffix", ["", ".json", ".parquet", ".safetensors"])
def test_a_pipe_is_not_waited_for(use: str, suffix: str, tiny: NLA, tmp_path: Path) -> None:
    """Whether a file of results is parquet was looked up by opening it, pipe or not."""
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(NLAError):
        USES[use](tiny, tmp_path / f"pipe{suffix}")


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name_is_not_the_working_directory(
    name: str, tiny: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diary.txt").write_text("Mine.")
    with pytest.raises(NLAError, match="names no file"):
        explain_corpus(tiny, name, out=tmp_path / "out", max_new_tokens=2)
    assert os.listdir(tmp_path) == ["diary.txt"]
