"""The embedded NLA on documents of a fresh seed, measured with arithmetic of its own."""

import importlib.util
import json
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
import torch

import nla_lens
from nla_lens import NLA

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tutorials" / "tiny_nla" / "corpus.py"
FRESH_SEED = 918273
N_VECTORS = 400
UNFAMILIAR_WORDS = re.compile(r"unfamiliar|not recognise|not look like anything|kind unknown", re.I)


class Reading:
    """Vectors of fresh documents and what the NLA says of them."""

    def __init__(self, name: str) -> None:
        self.nla = NLA.from_pretrained(name)
        texts = [document["text"] for document in fresh_documents(80)]
        residuals = nla_lens.extract(self.nla.spec.source_model, texts, self.nla.spec.layer)
        picks = torch.randperm(
            sum(len(r) for r in residuals), generator=torch.Generator().manual_seed(1)
        )[:N_VECTORS]
        rows = [(r, i) for r in residuals for i in range(len(r))]
        self.tokens = [[int(t) for t in rows[p][0].origin.where_LX3[:, 2]] for p in picks]
        self.positions = [rows[p][1] for p in picks]
        self.vectors = torch.stack([rows[p][0].as_ordinary()[rows[p][1]] for p in picks])
        self.explained = self.nla.explain(self.vectors, progress=False)

    @cached_property
    def texts(self) -> list[str]:
        return [e.text for e in self.explained]

    @cached_property
    def cos(self) -> torch.Tensor:
        """`[n, n]`: reconstruction of text i against vector j, float64."""
        made = self.nla.reconstruct(self.texts).double()
        given = self.vectors.double()
        return (made / made.norm(dim=1, keepdim=True)) @ (given / given.norm(dim=1, keepdim=True)).T

    def prefix(self, i: int) -> str:
        tokenizer = self.nla.verbalizer.tokenizer
        return tokenizer.decode(self.tokens[i][: self.positions[i] + 1])


def fresh_documents(n: int) -> list[dict]:
    made = subprocess.run(
        [sys.executable, CORPUS, "--seed", str(FRESH_SEED), "--documents", str(n)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in made.stdout.splitlines()]


@pytest.fixture(scope="module", params=["tiny", "tiny-norm-matched"])
def reading(request: pytest.FixtureRequest) -> Reading:
    return Reading(request.param)


@pytest.fixture(scope="module")
def tiny() -> NLA:
    return NLA.from_pretrained("tiny")


def fve(cos: torch.Tensor, var_nrm: float) -> float:
    return float(1 - (2 * (1 - cos)).mean() / var_nrm)


def test_texts_give_the_vectors_back(reading: Reading) -> None:
    least = {"tiny": 0.88, "tiny-norm-matched": 0.75}
    name = "tiny" if reading.nla.spec.injection == "replace" else "tiny-norm-matched"
    assert fve(reading.cos.diagonal(), reading.nla.spec.var_nrm) >= least[name]


def test_the_reported_scores_are_these(reading: Reading) -> None:
    cos = torch.tensor([e.cos for e in reading.explained], dtype=torch.float64)
    torch.testing.assert_close(cos, reading.cos.diagonal(), atol=1e-5, rtol=0)
    fve_nrm = torch.tensor([e.fve_nrm for e in reading.explained], dtype=torch.float64)
    expected = 1 - 2 * (1 - reading.cos.diagonal()) / reading.nla.spec.var_nrm
    torch.testing.assert_close(fve_nrm, expected, atol=1e-4, rtol=0)


def test_var_nrm_is_the_variance_of_such_vectors(reading: Reading) -> None:
    d = reading.vectors.shape[1]
    unit = reading.vectors.double() / reading.vectors.double().norm(dim=1, keepdim=True)
    scaled = unit * d**0.5
    here = float(((scaled - scaled.mean(0)) ** 2).mean())
    assert reading.nla.spec.var_nrm == pytest.approx(here, rel=0.1)


def test_another_vectors_text_is_worth_nothing(reading: Reading) -> None:
    permuted = reading.cos.roll(7, dims=1).diagonal()
    assert fve(permuted, reading.nla.spec.var_nrm) <= 0.0


def test_the_right_vector_is_found_from_its_text(reading: Reading) -> None:
    found = [
        reading.cos[s : s + 80, s : s + 80].argmax(1) == torch.arange(80)
        for s in range(0, N_VECTORS, 80)
    ]
    least = 0.6 if reading.nla.spec.injection == "replace" else 0.4
    assert torch.cat(found).float().mean() >= least


def test_names_are_not_invented(reading: Reading) -> None:
    invented = 0
    for i, text in enumerate(reading.texts):
        before = reading.prefix(i).lower()
        invented += any(
            re.search(rf"\b{name}\b", text) and name.lower() not in before for name in names()
        )
    assert invented <= 0.02 * N_VECTORS


def names() -> list[str]:
    spec = importlib.util.spec_from_file_location("lexicon", CORPUS.with_name("lexicon.py"))
    lexicon = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lexicon)
    return list(lexicon.NAMES)


def test_every_part_has_several_phrasings(reading: Reading) -> None:
    parts: dict[str, set[str]] = {"what": set(), "where": set(), "next": set()}
    for text in reading.texts:
        for sentence in re.split(r"(?<=[.”])\s+(?=[A-Z“])", re.sub(r"“.*?”", "“q”", text)):
            bare = re.sub(r"\b(" + "|".join(names()) + r")\b", "NAME", sentence)
            opening = " ".join(bare.split()[:3])
            if "“q”" in bare and re.search(
                r"said|words|ends|far|read|breaks|begins|opens|start", bare
            ):
                parts["where"].add(opening)
            elif re.search(r"next|follow|goes on|go on|likely|expect", bare):
                parts["next"].add(bare.split("“")[0][:12])
            else:
                parts["what"].add(opening)
    assert all(len(found) >= 3 for found in parts.values()), parts


@pytest.mark.parametrize(
    "text",
    [
        "def add(a, b): return a + b",
        "lol ok brb",
        "The two governments signed the treaty after long negotiations over the border.",
    ],
)
def test_it_says_so_when_a_text_is_unfamiliar(tiny: NLA, text: str) -> None:
    explained = tiny.explain_text(text)
    assert UNFAMILIAR_WORDS.search(explained[-1].text), explained[-1].text
    said = [bool(UNFAMILIAR_WORDS.search(e.text)) for e in explained[len(explained) // 2 :]]
    assert sum(said) > len(said) / 2, explained
    assert not any(re.search(rf"\b{name}\b", e.text) for e in explained for name in names())


def test_files_are_small_and_readable_by_all() -> None:
    files = [f for f in (ROOT / "nla_lens" / "tiny").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 8_000_000
    assert all(f.stat().st_mode & 0o444 == 0o444 for f in files)


def test_the_source_model_is_a_directory_of_the_package(tiny: NLA) -> None:
    from transformers import AutoModelForCausalLM

    source = Path(tiny.spec.source_model)
    assert (source / "config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(source)
    assert model.config.hidden_size == tiny.spec.d_model
    assert model.dtype == torch.float32
