"""Values that a config.json must not have, each named as config.json's; and a hub that is away."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nla_lens import NLA, NLAError, extract
from nla_lens.models.weights import load_causal_lm

from .checkpoints import build_av
from .hub_server import HubServer, use


@pytest.fixture
def av(pair_dirs: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair_dirs("llama", "replace")[0], tmp_path / "av"))


def configure(av: Path, **values: Any) -> None:
    path = av / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_attention_heads": 0}, "config.json: num_attention_heads is 0"),
        ({"num_attention_heads": -4}, "config.json: num_attention_heads is -4"),
        ({"num_attention_heads": "4"}, "config.json: num_attention_heads is '4'"),
        ({"num_hidden_layers": "6"}, "config.json: num_hidden_layers is '6'"),
        ({"vocab_size": "640"}, "config.json: vocab_size is '640'"),
        ({"max_position_embeddings": "2048"}, "config.json: max_position_embeddings is '2048'"),
        # Was read when the first text was decoded: TypeError of torch.
        ({"sliding_window": "4"}, "config.json: sliding_window is '4'"),
        ({"text_config": {"sliding_window": "4"}}, "config.json: sliding_window is '4'"),
        ({"model_type": "llamma"}, "config.json .*llamma"),
        ({"model_type": None}, "config.json"),
    ],
)
def test_a_bad_value_is_config_jsons(av: Path, values: dict[str, Any], said: str) -> None:
    configure(av, **values)
    with pytest.raises(NLAError, match=said) as caught:
        NLA.from_pretrained(av=av)
    assert "tokenizer" not in str(caught.value).split("(")[0]


def test_a_tokenizer_that_is_damaged_is_still_the_tokenizer(av: Path) -> None:
    (av / "tokenizer.json").write_text('{"model": 5}', encoding="utf-8")
    with pytest.raises(NLAError, match="tokenizer"):
        NLA.from_pretrained(av=av)


def test_a_model_is_not_cut_by_its_config(av: Path) -> None:
    """Five blocks of six write fluent text, too."""
    blocks = json.loads((av / "config.json").read_text())["num_hidden_layers"]
    configure(av, num_hidden_layers=blocks - 1)
    with pytest.raises(NLAError, match=rf"no place for \['model.layers.{blocks - 1}\."):
        NLA.from_pretrained(av=av)


def test_json_with_tabs_is_a_sidecar(av: Path) -> None:
    path = av / "nla_meta.yaml"
    plain = NLA.from_pretrained(av=av).spec
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw, indent="\t"), encoding="utf-8")
    assert NLA.from_pretrained(av=av).spec == plain
    twice = path.read_text(encoding="utf-8").replace('"kind"', '"kind": "x",\n\t"kind"', 1)
    path.write_text(twice, encoding="utf-8")
    with pytest.raises(NLAError, match="cannot be read as YAML"):
        NLA.from_pretrained(av=av)


@pytest.mark.parametrize("half", ["av", "ar"])
def test_an_empty_name_is_not_the_working_directory(
    half: str, av: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell's variable that is not set."""
    monkeypatch.chdir(av)
    with pytest.raises(NLAError, match="'' names no checkpoint"):
        NLA.from_pretrained(**{"av": av, half: ""})


def test_a_text_longer_than_the_reconstructor_was_made_for(nla: NLA) -> None:
    longest = nla.reconstructor and nla.reconstructor.context_length
    assert longest is not None
    with pytest.raises(NLAError, match=rf"texts\[1\] is \d+ tokens .* more than the {longest}"):
        nla.reconstruct(["short", "word " * longest])


def test_without_a_network_one_hears_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers asks six times for each file: 95 seconds for a source model."""
    with HubServer() as hub:
        pass
    # Its port is closed now.
    use(hub, monkeypatch, tmp_path / "cache")
    began = time.monotonic()
    with pytest.raises(NLAError, match=r"cannot be reached.*hf download owner/model"):
        extract("owner/model", ["a"], layer=1)
    assert time.monotonic() - began < 10


def test_without_a_network_what_was_fetched_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = build_av(tmp_path / "whole", "llama")
    with HubServer() as hub:
        hub.add("owner/whole", whole)
        use(hub, monkeypatch, tmp_path / "cache")
        there = load_causal_lm("owner/whole").state_dict()
    monkeypatch.setattr("nla_lens.models.reaching._there", set())
    began = time.monotonic()
    again = load_causal_lm("owner/whole").state_dict()
    assert time.monotonic() - began < 10
    assert there.keys() == again.keys()
    assert all(there[name].equal(again[name]) for name in there)
