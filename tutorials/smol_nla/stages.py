"""The stages of a run; each reads what the earlier ones left in the work folder.

A stage that is done is not done again, and a training that was ended goes on where it last saved.
`export` and `score` may be run at any time, on what the halves have learned so far.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import describe
import score as scoring
import texts
import torch
from export import write_half
from halves import (
    Prompt,
    Reconstructor,
    Verbalizer,
    answer_ids,
    ar_prompt_ids,
    halve_frozen,
    load_folder,
    load_trained,
)
from loops import Loop, Phase, train
from residuals import Sample, collect, with_topics
from sizes import Settings
from tiny import variance_nrm
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from nla_lens import NLA

LOG = logging.getLogger("smol_nla")
KEPT_FOR_REFINING = 10
"""Every so many documents are kept from the verbalizer: there it writes as it does on new ones."""
SHOWN = 12


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        settings: Sizes.
        seed: Seed of everything.
        source: Folder of the source model.
        text: Folder of texts.
        work: Folder of what is made.
        device: Where models run.
        bf16: Whether products are taken in bfloat16 in training.
        start: Folder with adapters to begin with, or None.
    """

    settings: Settings
    seed: int
    source: Path
    text: Path
    work: Path
    device: torch.device
    bf16: bool
    start: Path | None

    def tokenizer(self) -> Tokenizer:
        """Reads the source model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.source)

    def model(self) -> PreTrainedModel:
        """Reads the source model."""
        # On processors, PyTorch's fused attention is slower for texts as short as these.
        kind = "eager" if self.device.type == "cpu" else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(
            self.source, dtype=torch.float32, attn_implementation=kind
        )
        # What is drawn next are the LoRA matrices of a half.
        torch.manual_seed(self.seed)
        return model.to(self.device).eval().requires_grad_(False)

    def samples(self) -> dict[str, Sample]:
        """Reads the vectors, by part."""
        state = torch.load(self.work / "vectors.pt", weights_only=True)
        return {part: Sample.of(own) for part, own in state.items()}

    def pair(self) -> NLA:
        """Loads what `export` wrote, as any user would."""
        return NLA.from_pretrained(
            av=self.work / "av",
            ar=self.work / "ar",
            base=str(self.source),
            device=str(self.device),
        )


def vectors(run: Run) -> None:
    """Collects vectors with what is said of them."""
    path = run.work / "vectors.pt"
    if path.exists():
        return
    tokenizer, model = run.tokenizer(), run.model()
    documents = texts.read(run.text)
    samples = []
    for part in texts.PARTS:
        count = run.settings.documents if part == "train" else run.settings.held_documents
        drawn = texts.draw(documents, part, count, run.seed)
        samples.append(collect(model, tokenizer, drawn, run.settings, run.seed, part))
    samples = with_topics(samples[0], samples[1:], run.settings.topic_words)
    made = {part: own.state() for part, own in zip(texts.PARTS, samples, strict=True)}
    unfinished = path.with_suffix(".unfinished")
    torch.save(made, unfinished)
    unfinished.replace(path)


def ar(run: Run, stop: Callable[[int], bool] = lambda done: False) -> None:
    """Trains the reconstructor on descriptions that are true."""
    sample, tokenizer = run.samples()["train"], run.tokenizer()
    rows = [ar_prompt_ids(tokenizer, describe.description(fact)) for fact in sample.facts]
    network = Reconstructor(run.model(), run.settings)
    _begin(run, network, "ar")
    settings = run.settings
    loop = Loop("ar", settings.batch, settings.ar_rate, settings.flat, run.seed, run.bf16)
    vectors_ND = sample.vectors_ND.to(run.device)
    train(network, vectors_ND, [Phase(rows, settings.ar_samples)], loop, run.work / "ar.pt", stop)


def av(run: Run, stop: Callable[[int], bool] = lambda done: False) -> None:
    """Trains the verbalizer: first on the last words alone, then on whole descriptions."""
    sample, _ = _kept_apart(run.samples()["train"])
    tokenizer, settings = run.tokenizer(), run.settings
    short = [answer_ids(tokenizer, describe.ending(fact), closing="") for fact in sample.facts]
    whole = [answer_ids(tokenizer, describe.description(fact)) for fact in sample.facts]
    first = int(settings.av_samples * settings.short_share)
    phases = [Phase(short, first), Phase(whole, settings.av_samples - first)]
    network = _verbalizer(run)
    _begin(run, network, "av")
    loop = Loop("av", settings.batch, settings.av_rate, settings.flat, run.seed, run.bf16)
    train(network, sample.vectors_ND.to(run.device), phases, loop, run.work / "av.pt", stop)


def refine(run: Run, stop: Callable[[int], bool] = lambda done: False) -> None:
    """Trains the reconstructor on what the verbalizer really writes, beside true descriptions."""
    _, kept = _kept_apart(run.samples()["train"])
    kept = scoring.spread(kept, run.settings.refine_samples)
    path = run.work / "written.json"
    if not path.exists():
        export(run)
        path.write_text(json.dumps(scoring.written(run.pair(), kept)), encoding="utf-8")
    tokenizer, settings = run.tokenizer(), run.settings
    true = [describe.description(fact) for fact in kept.facts]
    said = json.loads(path.read_text(encoding="utf-8"))
    rows = [ar_prompt_ids(tokenizer, text) for text in [*said, *true]]
    network = Reconstructor(run.model(), settings)
    load_trained(network, torch.load(run.work / "ar.pt", weights_only=True)["trained"])
    if run.bf16:
        halve_frozen(network)
    loop = Loop("refine", settings.batch, settings.refine_rate, 0.0, run.seed, run.bf16)
    vectors_ND = kept.vectors_ND.repeat(2, 1).to(run.device)
    phases = [Phase(rows, settings.refine_samples)]
    train(network, vectors_ND, phases, loop, run.work / "refine.pt", stop)


def export(run: Run) -> None:
    """Writes both halves as far as they are: the refined reconstructor where there is one."""
    figures, prompt = _figures(run), Prompt(run.tokenizer())
    model = run.model()
    verbalizer = Verbalizer(model, prompt, figures["scale"], run.settings)
    reconstructor = Reconstructor(model, run.settings)
    for network, names in ((verbalizer, ("av",)), (reconstructor, ("refine", "ar"))):
        path = next((p for name in names if (p := run.work / f"{name}.pt").exists()), None)
        if path is not None:
            load_trained(network, torch.load(path, weights_only=True)["trained"])
        elif run.start is not None:
            load_folder(network, run.start / names[-1])
        write_half(run.work / names[-1], network, prompt, run.settings, figures)


def score(run: Run) -> None:
    """Writes both halves, measures them on sources that were held out, and shows some texts."""
    export(run)
    nla, samples = run.pair(), run.samples()
    mean_D = F.normalize(samples["train"].vectors_ND, dim=-1).mean(0)
    done = {
        name: len(torch.load(run.work / f"{name}.pt", weights_only=True)["losses"])
        for name in ("av", "ar", "refine")
        if (run.work / f"{name}.pt").exists()
    }
    for part in ("held", "unseen"):
        sample = scoring.spread(samples[part], run.settings.scored)
        found = scoring.baselines(nla, sample, mean_D)
        said = scoring.written(nla, sample)
        found.update(scoring.scores(nla, sample, said))
        line = {"part": part, "steps": done, "vectors": len(sample)}
        line.update({name: round(value, 3) for name, value in found.items()})
        LOG.info("%s", json.dumps(line))
        with (run.work / "scores.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = range(0, len(sample), max(1, len(sample) // SHOWN))
        for i in shown:
            LOG.info("…%s\n    %s", sample.prefixes[i][-60:], said[i])


def _kept_apart(sample: Sample) -> tuple[Sample, Sample]:
    """What the verbalizer is trained on, and what it is not."""
    parts: tuple[list[int], list[int]] = ([], [])
    for i, number in enumerate(sample.documents):
        parts[number % KEPT_FOR_REFINING == 0].append(i)
    return sample.pick(parts[0]), sample.pick(parts[1])


def _figures(run: Run) -> dict[str, float]:
    vectors_ND = run.samples()["train"].vectors_ND
    scale = vectors_ND.norm(dim=-1).median().item()
    return {"scale": round(scale, 2), "var": round(variance_nrm(vectors_ND), 5)}


def _verbalizer(run: Run) -> Verbalizer:
    return Verbalizer(run.model(), Prompt(run.tokenizer()), _figures(run)["scale"], run.settings)


def _begin(run: Run, network: Verbalizer | Reconstructor, half: str) -> None:
    if run.start is not None:
        load_folder(network, run.start / half)
    if run.bf16:
        halve_frozen(network)


STAGES: dict[str, Callable[[Run], None]] = {
    "vectors": vectors,
    "ar": ar,
    "av": av,
    "export": export,
    "score": score,
    "refine": refine,
    "score_refined": score,
}
