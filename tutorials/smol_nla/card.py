"""What the model card shows: ten sentences, and the table of `nla_lens.evaluate` beside tiny's.

``python card.py --text DIR --page MODEL_CARD.md`` writes both between the marks of the page: on
documents of sources that were held out, and of a kind of text that was never trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import texts

import nla_lens
from nla_lens import NLA, evaluate

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_nla"))

import corpus
import report

SENTENCES = (
    "The treaty was signed after eleven days of long negotiations in the old castle.",
    "To install the package, open a terminal and type the following command as root.",
    "She poured the milk into a small blue bowl and called the cat.",
    "photosynthesis: the process by which green plants make sugar from light and water",
    "If the train is late again, I am going to walk home through the park.",
    "In 1969 two men landed on the moon while a third one waited in orbit.",
    "The defendant shall not be liable for any damage arising from the use of the goods.",
    "Whenever I hear someone talk about the good old days, I think of the dentist.",
    "def read(path): open the file, return its lines, and close it when you are done",
    "Mix the flour with two eggs, then add salt and let the dough rest for an hour.",
)
"""Written for the card before any of them was explained; none was exchanged."""
PLACES = (0.4, 0.7, 1.0)
"""Of each sentence, as a share of its tokens."""


def main() -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of texts, see texts.py")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=40)
    args = parser.parse_args()
    nla = NLA.from_pretrained("smol")
    documents = texts.read(args.text)
    reports = {}
    for part, name in (("held", "smol, held-out sources"), ("unseen", "smol, licences")):
        drawn = texts.draw(documents, part, args.documents, seed=1)
        own = [document.text for document in drawn]
        reports[name] = evaluate(nla, own, positions=["from:10", "spread:4"])
    own = [document.text for document in corpus.documents(report.SEED, args.documents)]
    reports["tiny"] = evaluate(NLA.from_pretrained("tiny"), own, positions=report.POSITIONS)
    page = args.page.read_text(encoding="utf-8")
    page = report.between(page, "table", report.measures_table(reports))
    args.page.write_text(report.between(page, "sentences", sentences(nla)), encoding="utf-8")


def sentences(nla: NLA) -> str:
    """Each sentence at three of its tokens: what was read, what is said, and the score."""
    lines = [["read up to", "explanation", "fve_nrm"], ["---"] * 3]
    model = nla.open_source()
    for sentence in SENTENCES:
        ids = model.tokenizer(sentence)["input_ids"]
        places = [max(nla.spec.min_position, round(share * (len(ids) - 1))) for share in PLACES]
        found = nla_lens.Explanations(nla.explain_text(sentence, sorted(set(places))))
        for place, explanation in zip(sorted(set(places)), found, strict=True):
            read = model.tokenizer.decode(ids[: place + 1])
            score = "" if explanation.fve_nrm is None else f"{explanation.fve_nrm:.2f}"
            lines.append([cell(read), cell(explanation.text), score])
    return report.markdown(lines)


def cell(text: str) -> str:
    """A text in a table of Markdown."""
    return f"`{text.replace('|', '/').replace('`', chr(39)).strip() or ' '}`"


if __name__ == "__main__":
    main()
