"""The stages of a run; each reads what the earlier ones left in the work folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import corpus
import export
import gold
import tokenization
import torch
from facts import WordTables
from generation import verbalize
from networks import Reconstructor, causal_lm, warm_start
from pair_training import train_reconstructor, train_verbalizer
from settings import Settings
from source_training import train_source
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from vectors import Sample, collect, variance_nrm

FREE_PHRASING_SHARE = 0.3
REFINE_RATE = 6e-4
TRAINED_ON = ["tutorials/tiny_nla/corpus.py"]
# Offsets that keep the documents of the stages apart; far from any small seed a user may try.
SOURCE_DOCUMENTS, PAIR_DOCUMENTS, REFINE_DOCUMENTS = 10**9, 2 * 10**9, 3 * 10**9


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        settings: Sizes.
        seed: Seed of everything.
        work: Folder of intermediate files.
        out: Folder of the exported set.
    """

    settings: Settings
    seed: int
    work: Path
    out: Path

    def tokenizer(self) -> Tokenizer:
        """Reads the tokenizer the source stage made."""
        return Tokenizer.from_file(str(self.work / "tokenizer.json"))

    def tables(self) -> WordTables:
        """Builds the token look-up."""
        return WordTables(self.tokenizer(), tokenization.familiar_pieces(0))

    def save(self, name: str, value: object) -> None:
        """Stores an intermediate result."""
        torch.save(value, self.work / f"{name}.pt")

    def read(self, name: str) -> dict:
        """Reads an intermediate result."""
        return torch.load(self.work / f"{name}.pt", weights_only=True)

    def source(self, tables: WordTables) -> LlamaForCausalLM:
        """Loads the trained source model."""
        size = tables.tokenizer.get_vocab_size()
        model = causal_lm(self.settings, size, self.settings.source_blocks)
        model.load_state_dict(self.read("source"))
        return model.eval()


def source(run: Run) -> None:
    """Builds the tokenizer and trains the source model."""
    tokenizer = tokenization.build(0, run.settings.fragments)
    tokenizer.save(str(run.work / "tokenizer.json"))
    seed = SOURCE_DOCUMENTS + run.seed
    texts = [item.text for item in corpus.documents(seed, run.settings.source_documents)]
    model = train_source(run.settings, texts, run.tables(), run.seed)
    run.save("source", model.state_dict())
    tables = run.tables()
    sample = _sample(run, tables, 6000, PAIR_DOCUMENTS)
    norms = sample.vectors_ND.norm(dim=-1)
    figures = {"scale": round(norms.median().item(), 2), "var": variance_nrm(sample.vectors_ND)}
    run.save("figures", figures)


def av(run: Run) -> None:
    """Trains the verbalizer with the replace rule."""
    scale = run.read("figures")["scale"]
    _train_av(run, "av", run.settings.av_blocks, run.settings.pair_vectors, scale)


def av_norm_matched(run: Run) -> None:
    """Trains the verbalizer with norm-matched add."""
    settings = run.settings
    _train_av(run, "av_norm_matched", settings.matched_blocks, settings.matched_vectors, None)


def ar(run: Run) -> None:
    """Trains the reconstructor on gold explanations, some of them freely phrased."""
    tables = run.tables()
    sample = _sample(run, tables, run.settings.ar_vectors, PAIR_DOCUMENTS)
    rng = random.Random(run.seed)
    texts = [
        gold.explanation(f, rng if rng.random() < FREE_PHRASING_SHARE else None)
        for f in sample.facts
    ]
    model = Reconstructor(run.settings, tables.tokenizer.get_vocab_size())
    warm_start(model, run.source(tables))
    train_reconstructor(
        run.settings,
        model,
        tables.tokenizer,
        sample.vectors_ND,
        texts,
        run.settings.pair_rate,
        run.seed,
        "ar",
    )
    run.save("ar", model.state_dict())


def refine(run: Run) -> None:
    """Trains the reconstructor a little more on what the verbalizers really write."""
    tables = run.tables()
    tokenizer = tables.tokenizer
    sample = _sample(run, tables, run.settings.refine_vectors, REFINE_DOCUMENTS)
    vectors, count = sample.vectors_ND, len(sample.facts)
    half = count // 2
    scale = run.read("figures")["scale"]
    texts = verbalize(_av(run, tables, "av"), tokenizer, vectors, scale)
    texts += verbalize(_av(run, tables, "av"), tokenizer, vectors[:half], scale, 1.0, run.seed)
    matched = _av(run, tables, "av_norm_matched")
    texts += verbalize(matched, tokenizer, vectors[half:], None)
    rng = random.Random(run.seed)
    texts += [gold.explanation(facts, rng) for facts in sample.facts[:half]]
    targets = torch.cat([vectors, vectors[:half], vectors[half:], vectors[:half]])
    model = _ar(run, tables)
    train_reconstructor(
        run.settings, model, tokenizer, targets, texts, REFINE_RATE, run.seed, "refine"
    )
    run.save("ar_refined", model.state_dict())


def export_all(run: Run) -> None:
    """Writes the four checkpoints."""
    tables, settings, figures = run.tables(), run.settings, run.read("figures")
    tokenizer = tables.tokenizer
    model = run.source(tables)
    export.export_causal_lm(run.out / "source", model, tokenizer, settings, settings.source_blocks)
    for name, blocks, scale, rule in (
        ("av", settings.av_blocks, figures["scale"], "replace"),
        ("av_norm_matched", settings.matched_blocks, None, "norm_matched_add"),
    ):
        folder = run.out / name
        export.export_causal_lm(folder, _av(run, tables, name), tokenizer, settings, blocks)
        export.export_sidecar(
            folder,
            "av",
            tokenizer,
            settings,
            injection_scale=scale,
            rule=rule,
            trained_on=TRAINED_ON,
        )
    reconstructor = _ar(run, tables, "ar_refined")
    export.export_reconstructor(run.out / "ar", reconstructor, tokenizer, settings)
    export.export_sidecar(
        run.out / "ar",
        "ar",
        tokenizer,
        settings,
        var_nrm=round(figures["var"], 5),
        trained_on=TRAINED_ON,
    )


def _sample(run: Run, tables: WordTables, count: int, seed: int) -> Sample:
    per = run.settings.per_document
    texts = [item.text for item in corpus.documents(seed + run.seed, -(-count // per))]
    model = run.source(tables)
    layer, cut = run.settings.layer, run.settings.max_tokens
    return collect(model, texts, tables, layer, per, run.seed, cut)


def _train_av(run: Run, name: str, blocks: int, count: int, scale: float | None) -> None:
    tables = run.tables()
    sample = _sample(run, tables, count, PAIR_DOCUMENTS)
    model = causal_lm(run.settings, tables.tokenizer.get_vocab_size(), blocks)
    warm_start(model, run.source(tables))
    texts = [gold.explanation(facts) for facts in sample.facts]
    train_verbalizer(
        run.settings, model, tables.tokenizer, sample.vectors_ND, texts, scale, run.seed, name
    )
    run.save(name, model.state_dict())


def _av(run: Run, tables: WordTables, name: str) -> LlamaForCausalLM:
    settings = run.settings
    blocks = settings.av_blocks if name == "av" else settings.matched_blocks
    model = causal_lm(settings, tables.tokenizer.get_vocab_size(), blocks)
    model.load_state_dict(run.read(name))
    return model.eval()


def _ar(run: Run, tables: WordTables, name: str = "ar") -> Reconstructor:
    model = Reconstructor(run.settings, tables.tokenizer.get_vocab_size())
    model.load_state_dict(run.read(name))
    return model.eval()


STAGES: dict[str, Callable[[Run], None]] = {
    "source": source,
    "av": av,
    "ar": ar,
    "av_norm_matched": av_norm_matched,
    "refine": refine,
    "export": export_all,
}
