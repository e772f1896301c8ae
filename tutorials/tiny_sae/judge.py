"""Do the AV's texts for latents name what the latents fire on? Writes RESULTS.md.

``python tutorials/tiny_sae/judge.py``

Method. On documents nobody was trained on, each latent's 20 strongest positions are found. A theme
of the latent is a fact that at least 60 % of these positions share and that is there three times
as often as at all positions: the token itself, the token before it, the document's kind, topic,
name or place (name and place once they have been mentioned). The AV's text for the decoder row
names what the latent fires on if it says one of the themes: a token inside quotation marks, the
rest outside them. 50 latents are drawn among those that are active at 20 positions or more. The
control judges each text by the themes of another latent.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import nla_lens
from nla_lens.adapters.sae import FeatureExplanations, decompose, explain_features, load_dictionary

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tiny_nla"))
import corpus  # noqa: E402

SEED, DOCUMENTS, LATENTS, TOP = 9_200_001, 1500, 50, 20
SHARE, LIFT = 0.6, 3.0
TRUSTED = 0.5
STRANGE = re.compile(r"nfamiliar|do not recognise|not look like anything|Strange text")
ADJECTIVES = {"medicine": "medical", "animals": "animal"}
Theme = tuple[str, str]


@dataclass(frozen=True)
class Positions:
    """Residuals of fresh documents and what is true at each of them.

    Attributes:
        resid_ND: The residuals.
        themes: Facts of each position.
        snippets: Its last few tokens.
    """

    resid_ND: torch.Tensor
    themes: list[frozenset[Theme]]
    snippets: list[str]


def read(nla: nla_lens.NLA) -> Positions:
    """Reads the documents; the beginning-of-text token is left out."""
    documents = list(corpus.documents(SEED, DOCUMENTS))
    texts = [document.text for document in documents]
    resids = nla_lens.extract(nla.spec.source_model, texts, nla.spec.layer, batch_size=64)
    themes, snippets = [], []
    for document, resid in zip(documents, resids, strict=True):
        ids = resid.origin.where_LX3[:, 2].tolist()
        words = [resid.origin.to_token(i) for i in ids]
        for n in range(1, len(words)):
            themes.append(_facts(document, words[: n + 1]))
            snippets.append("".join(words[max(n - 3, 1) : n + 1]))
    vectors = torch.cat([resid.as_ordinary()[1:] for resid in resids])
    return Positions(vectors, themes, snippets)


def _facts(document: corpus.Document, words: Sequence[str]) -> frozenset[Theme]:
    said = "".join(words[1:])
    found = [("token", words[-1].strip()), ("before", words[-2].strip())]
    found += [("kind", document.kind), ("topic", document.topic or "")]
    found += [("name", n) for n in (document.name,) if n and n.lower() in said.lower()]
    found += [("place", p) for p in (document.place,) if p and p.lower() in said.lower()]
    return frozenset((kind, value) for kind, value in found if value and value != "<s>")


def find_themes(facts: Sequence[frozenset[Theme]], base: Counter[Theme], n: int) -> list[Theme]:
    """Facts that most of a latent's strongest positions share, and few others."""
    counts = Counter(theme for at in facts for theme in at)
    return [
        theme
        for theme, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count / len(facts) >= SHARE and (count / len(facts)) / (base[theme] / n) >= LIFT
    ]


def says(text: str, theme: Theme) -> bool:
    """Whether a text says a fact."""
    kind, value = theme
    quoted = " ".join(re.findall("“(.*?)”", text))
    plain = re.sub("“.*?”", "", text)
    if kind in ("token", "before"):
        pattern = re.escape(value)
        edges = (r"\b" if value[0].isalnum() else "", r"\b" if value[-1].isalnum() else "")
        return re.search(edges[0] + pattern + edges[1], quoted) is not None
    if kind == "kind" and value == "unfamiliar":
        return STRANGE.search(plain) is not None
    words = {value, ADJECTIVES.get(value, value)}
    return any(re.search(rf"\b{word}\b", plain, re.IGNORECASE) for word in words)


def share_named(texts: Sequence[str], themes: Sequence[Sequence[Theme]]) -> float:
    """Share of texts that say one of their latent's themes."""
    named = [any(says(t, theme) for theme in own) for t, own in zip(texts, themes, strict=True)]
    return sum(named) / len(named)


def by_chance(texts: Sequence[str], themes: Sequence[Sequence[Theme]]) -> float:
    """The same with each text beside the themes of another latent, over all rotations."""
    turns = range(1, len(texts))
    return sum(share_named([*texts[n:], *texts[:n]], themes) for n in turns) / len(turns)


def compare(nla: nla_lens.NLA, sae: object, resid_ND: torch.Tensor) -> list[str]:
    """Lines of the table of the two reconstructions."""
    found = decompose(nla, sae, resid_ND, explain_latents=False, explain_errors=False)
    rows = [("SAE", [d.sae for d in found], f"L0 {_mean([d.l0 for d in found]):.1f}")]
    words = f"{_mean([d.n_words for d in found]):.1f} words"
    rows.append(("NLA", [d.nla for d in found if d.nla], words))
    return [
        f"| {name} | {_mean([f.cos for f in fits]):.3f} | {_mean([f.fve_nrm for f in fits]):.3f} "
        f"| {size} |"
        for name, fits, size in rows
    ]


def _mean(values: Sequence[float | None]) -> float:
    return sum(v or 0.0 for v in values) / len(values)


def main() -> None:
    """Judges 50 latents and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dictionary", type=Path, default=HERE / "dictionary")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    nla = nla_lens.NLA.from_pretrained("tiny")
    sae = load_dictionary(args.dictionary)
    at = read(nla)
    acts_NF = sae.encode(at.resid_ND)
    alive = (acts_NF > 0).sum(0).ge(TOP).nonzero()[:, 0].tolist()
    latents = sorted(random.Random(SEED).sample(alive, LATENTS))
    base = Counter(theme for facts in at.themes for theme in facts)
    strongest = {i: acts_NF[:, i].topk(TOP).indices.tolist() for i in latents}
    themes = [
        find_themes([at.themes[n] for n in strongest[i]], base, len(at.themes)) for i in latents
    ]
    mean_D = at.resid_ND.mean(0)
    found = explain_features(nla, sae, latents, mean=mean_D)
    args.out.write_text(
        _report(nla, sae, at, found, themes, strongest, len(alive)), encoding="utf-8"
    )


def _report(
    nla: nla_lens.NLA,
    sae: object,
    at: Positions,
    found: FeatureExplanations,
    themes: Sequence[Sequence[Theme]],
    strongest: dict[int, list[int]],
    n_alive: int,
) -> str:
    readings = {
        "the decoder row": [e.text for e in found],
        "the row added to the mean residual": [e.shifted_text or "" for e in found],
        # The AV reads real residuals well: this is what the method can find at best.
        "the residual where the latent is strongest": nla.encode(
            at.resid_ND[[strongest[e.index][0] for e in found]]
        ),
    }
    with_theme = sum(bool(own) for own in themes)
    lines = [
        "# The small dictionary, judged",
        "",
        "Written by `judge.py`; the method is in its docstring. " + _condition(sae, at, n_alive),
        "",
        f"{with_theme} of {len(found)} latents have a theme at all.",
        "",
        "| the AV reads | texts that name what the latent fires on | by chance |",
        "|---|---|---|",
    ]
    for name, texts in readings.items():
        lines.append(
            f"| {name} | {share_named(texts, themes):.0%} | {by_chance(texts, themes):.0%} |"
        )
    lines += ["", _by_cos(found, themes)]
    lines += ["", "| 200 residuals | cos | fve_nrm | size |", "|---|---|---|---|"]
    picked = torch.randperm(len(at.resid_ND), generator=torch.Generator().manual_seed(0))[:200]
    lines += compare(nla, sae, at.resid_ND[picked])
    lines += ["", "| latent | fires on | strongest at | the AV says of the row | cos | named |"]
    lines += ["|---|---|---|---|---|---|"]
    for e, own in zip(found, themes, strict=True):
        fires = ", ".join(f"{kind} {value!r}" for kind, value in own[:4]) or "–"
        named = "yes" if any(says(e.text, theme) for theme in own) else "no"
        snippet = at.snippets[strongest[e.index][0]]
        cells = [str(e.index), fires, snippet, e.text, f"{e.cos:.2f}", named]
        lines.append("| " + " | ".join(" ".join(c.replace("|", "¦").split()) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _by_cos(found: FeatureExplanations, themes: Sequence[Sequence[Theme]]) -> str:
    """Whether the AR's own score tells which texts to trust."""
    halves = []
    for trusted in (True, False):
        at = [n for n, e in enumerate(found) if ((e.cos or 0.0) >= TRUSTED) is trusted]
        share = share_named([found[n].text for n in at], [themes[n] for n in at]) if at else 0.0
        halves.append(f"{share:.0%} of {len(at)}")
    return (
        f"Of the texts for rows whose reconstruction has cos {TRUSTED} or more, {halves[0]} name "
        f"what the latent fires on; of the others {halves[1]}."
    )


def _condition(sae: object, at: Positions, n_alive: int) -> str:
    return (
        f"`{sae!r}`; {len(at.themes)} positions of {DOCUMENTS} fresh documents; {n_alive} latents "
        f"are active at {TOP} positions or more, {LATENTS} of them drawn."
    )


if __name__ == "__main__":
    main()
