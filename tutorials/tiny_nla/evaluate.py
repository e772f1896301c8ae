"""Measures an exported set of checkpoints on documents of a fresh seed and prints a table.

``python evaluate.py --dir nla_lens/tiny --seed 12345``
"""

from __future__ import annotations

import argparse
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import corpus
import gold
import measures
import tokenization
import torch
import unfamiliar
import yaml
from facts import WordTables
from generation import reconstruct, verbalize
from networks import Reconstructor
from pair_training import av_prompt_ids
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM
from vectors import Sample, collect

SENTENCES = (
    "def add(a, b): return a + b",
    "lol ok brb",
    "The two governments signed the treaty after long negotiations over the border.",
)


@dataclass(frozen=True)
class Checkpoints:
    """An exported set, loaded.

    Attributes:
        source, av, av_norm_matched: The language models.
        ar: The reconstructor.
        tokenizer: Their common tokenizer.
        tables: Token look-up.
        layer: K.
        scale: Injection scale of ``av``.
        var_nrm: As the reconstructor's sidecar says.
    """

    source: LlamaForCausalLM
    av: LlamaForCausalLM
    av_norm_matched: LlamaForCausalLM
    ar: Reconstructor
    tokenizer: Tokenizer
    tables: WordTables
    layer: int
    scale: float
    var_nrm: float


def load(folder: Path) -> Checkpoints:
    """Loads an exported set as any user of the files would, through transformers.

    Args:
        folder: The folder with ``source``, ``av``, ``ar`` and ``av_norm_matched``.
    """
    models = {
        name: LlamaForCausalLM.from_pretrained(folder / name).eval()
        for name in ("source", "av", "av_norm_matched", "ar")
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "av").backend_tokenizer
    sidecar = yaml.safe_load((folder / "ar" / "nla_meta.yaml").read_text(encoding="utf-8"))
    av_sidecar = yaml.safe_load((folder / "av" / "nla_meta.yaml").read_text(encoding="utf-8"))
    ar = Reconstructor.__new__(Reconstructor)
    nn.Module.__init__(ar)
    ar.model = models["ar"].model
    ar.model.norm = nn.Identity()
    head = load_file(folder / "ar" / "value_head.safetensors")["weight"].float()
    ar.value_head = nn.Linear(*head.shape, bias=False)
    ar.value_head.weight.data = head
    return Checkpoints(
        models["source"],
        models["av"],
        models["av_norm_matched"],
        ar.eval(),
        tokenizer,
        WordTables(tokenizer, tokenization.familiar_pieces(0)),
        sidecar["extraction_layer_index"],
        av_sidecar["extraction"]["injection_scale"],
        sidecar["extraction"]["var_nrm"],
    )


def table(loaded: Checkpoints, sample: Sample) -> list[tuple[str, dict[str, float]]]:
    """Measures every way of writing texts for the sampled vectors.

    Args:
        loaded: The checkpoints.
        sample: Vectors of fresh documents.

    Returns:
        Rows of a label and its figures.
    """
    vectors = sample.vectors_ND
    written = {
        "AV greedy": verbalize(loaded.av, loaded.tokenizer, vectors, loaded.scale),
        "AV sampled T=1": verbalize(loaded.av, loaded.tokenizer, vectors, loaded.scale, 1.0),
        "AV norm-matched greedy": verbalize(
            loaded.av_norm_matched, loaded.tokenizer, vectors, None
        ),
        "gold text": [gold.explanation(facts) for facts in sample.facts],
    }
    rows = []
    for label, texts in written.items():
        guess = reconstruct(loaded.ar, loaded.tokenizer, texts)
        figures = {
            "fve_nrm": measures.fve_nrm(guess, vectors, loaded.var_nrm),
            "permuted": measures.fve_nrm(measures.permuted(guess), vectors, loaded.var_nrm),
            "retrieval of 80": measures.retrieval(guess, vectors),
            "tokens": sum(len(loaded.tokenizer.encode(t).ids) for t in texts) / len(texts),
            **measures.field_accuracy(texts, sample.facts, sample.prefixes),
        }
        rows.append((label, figures))
    return rows


def lookup_baseline(loaded: Checkpoints, known: Sample, sample: Sample) -> float:
    """fve_nrm of guessing the mean vector seen with the same last two tokens.

    Args:
        loaded: The checkpoints.
        known: Vectors of other documents to look up.
        sample: Vectors to guess.
    """
    sums: dict[tuple[int, ...], torch.Tensor] = {}
    unit = nn.functional.normalize(known.vectors_ND, dim=-1)
    for prefix, vector in zip(known.prefixes, unit, strict=True):
        ids = loaded.tokenizer.encode(prefix).ids
        for key in (tuple(ids[-2:]), (ids[-1],), ()):
            sums[key] = sums.get(key, 0) + vector
    guesses = []
    for prefix in sample.prefixes:
        ids = loaded.tokenizer.encode(prefix).ids
        keys = (tuple(ids[-2:]), (ids[-1],), ())
        guesses.append(next(sums[key] for key in keys if key in sums))
    return measures.fve_nrm(torch.stack(guesses), sample.vectors_ND, loaded.var_nrm)


def fresh_sample(
    loaded: Checkpoints, seed: int, documents: int, per_document: int | None = None
) -> Sample:
    """Collects vectors of documents that training has not seen."""
    texts = [item.text for item in corpus.documents(seed, documents)]
    return collect(loaded.source, texts, loaded.tables, loaded.layer, per_document, seed)


def explain_text(loaded: Checkpoints, text: str) -> list[str]:
    """Explains every position of a text with the replace verbalizer."""
    sample = collect(loaded.source, [text], loaded.tables, loaded.layer, None, 0)
    return verbalize(loaded.av, loaded.tokenizer, sample.vectors_ND, loaded.scale)


def held_out_recognised(loaded: Checkpoints, seed: int, count: int) -> float:
    """Share of positions called unfamiliar in kinds of strange text that training never saw."""
    rng = random.Random(seed)
    texts = [unfamiliar.held_out_document(rng) for _ in range(count)]
    sample = collect(loaded.source, texts, loaded.tables, loaded.layer, 8, seed)
    written = verbalize(loaded.av, loaded.tokenizer, sample.vectors_ND, loaded.scale)
    hits = [
        measures.is_strange(text)
        for text, facts in zip(written, sample.facts, strict=True)
        if facts.kind == "unfamiliar"
    ]
    return sum(hits) / max(1, len(hits))


def main() -> None:
    """Prints the figures of the model card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder of the exported set")
    parser.add_argument("--seed", type=int, default=987654)
    parser.add_argument("--documents", type=int, default=120)
    parser.add_argument("--examples", type=int, default=20)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    loaded = load(args.dir)
    prompt = [
        {
            "role": "user",
            "content": tokenization.AV_PROMPT.replace("{injection_char}", tokenization.MARKER),
        }
    ]
    chat = AutoTokenizer.from_pretrained(args.dir / "av").apply_chat_template(
        prompt, tokenize=True, add_generation_prompt=True
    )
    ids = chat["input_ids"] if hasattr(chat, "keys") else chat
    print("chat prompt tokens as in training:", list(ids) == av_prompt_ids(loaded.tokenizer))
    sample = fresh_sample(loaded, args.seed, args.documents)
    print(f"{len(sample.facts)} positions of {args.documents} documents, seed {args.seed}")
    rows = table(loaded, sample)
    keys = list(rows[0][1])
    print("| |", " | ".join(label for label, _ in rows), "|")
    print("|---" * (len(rows) + 1) + "|")
    for key in keys:
        print(f"| {key} |", " | ".join(f"{figures[key]:.3f}" for _, figures in rows), "|")
    known = fresh_sample(loaded, args.seed + 1, args.documents * 12, 5)
    baseline = lookup_baseline(loaded, known, sample)
    print(f"| lookup of the last two tokens: fve_nrm | {baseline:.3f} |")
    held_out = held_out_recognised(loaded, args.seed, args.documents // 2)
    print(f"unseen kinds of unfamiliar text recognised: {held_out:.3f}")
    greedy = verbalize(loaded.av, loaded.tokenizer, sample.vectors_ND, loaded.scale)
    print("phrasings in use:", measures.phrasings(greedy))
    for text in SENTENCES:
        print(f"\n{text!r}\n  {explain_text(loaded, text)[-1]}")
    picks = torch.randperm(len(sample.facts), generator=torch.Generator().manual_seed(1))
    picks = picks[: args.examples]
    texts = verbalize(loaded.av, loaded.tokenizer, sample.vectors_ND[picks], loaded.scale)
    for pick, text in zip(picks.tolist(), texts, strict=True):
        print(f"\n{sample.prefixes[pick]!r}\n  {text}")


if __name__ == "__main__":
    main()
