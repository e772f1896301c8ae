"""An NLA of a real language model: it loads by its name, and says what was just read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nla_lens
from nla_lens import NLA
from nla_lens.checkpoints.releases import SMOL_SOURCE_DIR, SMOL_SOURCE_NAME
from tests.snippets import ROOT, check_transcript

SENTENCES = [
    "The committee agreed to meet again in the first week of October, if the weather permits.",
    "He opened the letter slowly, read it twice, and put it back into the drawer of his desk.",
    "sandstone: a rock made of small grains of sand that were pressed together over time",
    "Before you start the server, make sure that the configuration file is in the right place.",
    "Nobody has ever been able to explain why the old bridge fell on such a quiet morning.",
    "We bought bread, cheese and two bottles of wine, and walked down to the river.",
]
"""Written for these tests; in none of the texts it was trained on."""


def test_its_source_is_the_model_beside_it(smol: NLA) -> None:
    assert smol.spec.source_model == str(SMOL_SOURCE_DIR)
    assert SMOL_SOURCE_DIR.is_dir()


def test_it_says_what_was_just_read(smol: NLA) -> None:
    """At every position from the tenth on: the last token most of all, and more than a constant."""
    tokenizer = smol.open_source().tokenizer
    said, scores = [], []
    for sentence in SENTENCES:
        ids = tokenizer(sentence)["input_ids"]
        places = list(range(smol.spec.min_position, len(ids)))
        for place, found in zip(places, smol.explain_text(sentence, places), strict=True):
            token = tokenizer.decode(ids[place]).strip()
            said.append(found.text.startswith(f'"{token}"'))
            scores.append(found.fve_nrm)
    assert len(said) > 40 and sum(said) / len(said) > 0.85
    assert sum(scores) / len(scores) > 0.4


@pytest.mark.parametrize("engine", ["transformer_lens", "nnsight"])
def test_the_same_tokens_by_every_framework(smol: NLA, engine: str) -> None:
    vectors_ND = torch.stack(
        [r[-1] for r in nla_lens.extract(smol.spec.source_model, SENTENCES, smol.spec.layer)]
    )
    wanted = smol.explain(vectors_ND)
    other = NLA.from_pretrained("smol", engine=engine)
    found = other.explain(vectors_ND)
    assert [list(e.token_ids) for e in found] == [list(e.token_ids) for e in wanted]
    assert [e.cos for e in found] == pytest.approx([e.cos for e in wanted], abs=1e-4)


def test_the_command_checks_it() -> None:
    command = [Path(sys.executable).parent / "nla-lens", "check", "smol"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, "FAIL" in found.stdout) == (0, False), found.stdout + found.stderr


def test_saved_it_is_the_same(smol: NLA, tmp_path: Path) -> None:
    """What is written elsewhere names the hub's model, not a path of this machine."""
    smol.save_pretrained(tmp_path / "copy")
    written = [path.read_text() for path in (tmp_path / "copy").rglob("nla_meta.yaml")]
    assert written and all(SMOL_SOURCE_NAME in text for text in written)
    assert not any(str(SMOL_SOURCE_DIR.parent) in text for text in written)
    again = NLA.from_pretrained(tmp_path / "copy")
    vector_D = nla_lens.extract(SMOL_SOURCE_DIR, SENTENCES[:1], smol.spec.layer)[0][-1]
    assert again.explain(vector_D).text == smol.explain(vector_D).text


def test_the_transcript_is_what_the_demo_prints(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check_transcript(ROOT / "README.md", monkeypatch, capfd, may_differ=4)
