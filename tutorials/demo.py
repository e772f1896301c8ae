"""Reads a few sentences' residual streams, position by position. Runs offline: `make demo`.

The model is an included NLA's own source model, loaded in TransformerLens; put your own sentence
on the command line to read that instead. `--nla smol` reads a real language model, which
`make smol` brings.
"""

import argparse
import sys

from rich.console import Console
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

import nla_lens
from nla_lens.results.display import to_table

SENTENCES = {
    "tiny": [
        "Nora lives in Naples. The fox chased the dog out of the kennel.",
        "The two governments signed a treaty.",
    ],
    "smol": [
        "After eleven days of negotiations the two governments signed the treaty in a small town.",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", nargs="*", help="your own; default: those of the NLA")
    parser.add_argument("--nla", choices=SENTENCES, default="tiny")
    args = parser.parse_args()
    logging.disable_progress_bar()
    nla = nla_lens.NLA.from_pretrained(args.nla)
    model = TransformerBridge.boot_transformers(nla.spec.source_model)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(f"Reading {nla.spec.hook_name} (d_model {nla.spec.d_model}) in TransformerLens:")
    with nla_lens.attach(model, nla):
        for sentence in args.sentences or SENTENCES[args.nla]:
            _, cache = model.run_with_cache(sentence)
            explanations = cache["resid_post", nla.spec.layer][0].explain()
            console.print()
            console.print(to_table(explanations.flat, title=sentence))
    console.print(
        "\nfve_nrm: the share of the vector's variance that the explanation alone gives back. "
        "1 is perfect, 0 is no better than the average vector: do not trust such a line.",
        style="dim",
    )


if __name__ == "__main__":
    main()
