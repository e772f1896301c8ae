"""Vectors of the source model, and what they can be said to hold."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from describe import Facts, content_words, frequent
from sizes import Settings
from texts import Document
from tiny import Progress
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

READ_BATCH = 24
SURE_NEXT = 0.3
SURE_TOPIC = 0.25
MOST_TOPICS = 2
RIDGE = 30.0


@dataclass(frozen=True)
class Sample:
    """Vectors and what is known about each.

    Attributes:
        vectors_ND: Residuals at the output of block K, float32.
        facts: The facts of each vector.
        prefixes: The text up to and including each vector's token.
        sources: Kind and source of its document, as `kind/source`.
        documents: Number of its document.
    """

    vectors_ND: torch.Tensor
    facts: list[Facts]
    prefixes: list[str]
    sources: list[str]
    documents: list[int]

    def __len__(self) -> int:
        return len(self.facts)

    def state(self) -> dict:
        """Returns it as plain values, for `torch.save`."""
        return {**self.__dict__, "facts": [asdict(fact) for fact in self.facts]}

    @classmethod
    def of(cls, state: dict) -> Sample:
        """Makes it again out of what `state` gave."""
        return cls(**{**state, "facts": [Facts(**fact) for fact in state["facts"]]})

    def pick(self, index: Sequence[int]) -> Sample:
        """Returns some of it."""
        lists = {
            name: [values[i] for i in index]
            for name, values in self.__dict__.items()
            if name != "vectors_ND"
        }
        return Sample(self.vectors_ND[list(index)], **lists)


@torch.no_grad()
def collect(
    source: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    settings: Settings,
    seed: int,
    name: str,
) -> Sample:
    """Runs the source model over documents and keeps some positions of each.

    Topics are not known yet: `with_topics` adds them.

    Args:
        source: The source model, in float32.
        tokenizer: Its tokenizer.
        documents: What is read.
        settings: Sizes of the run.
        seed: Seed of the positions.
        name: Name for the log.
    """
    rows = [tokenizer(item.text)["input_ids"][: settings.max_tokens] for item in documents]
    kept = [i for i, row in enumerate(rows) if len(row) > settings.min_position]
    rng = random.Random(seed)
    places = {}
    for i in kept:
        wanted = range(settings.min_position, len(rows[i]))
        places[i] = sorted(rng.sample(wanted, min(settings.per_document, len(wanted))))
    vectors, expected = {}, {}
    progress = Progress(name, len(kept))
    for batch in equal_lengths(rows, kept):
        ids_BT = torch.tensor([rows[i] for i in batch], device=source.device)
        out = source.model(input_ids=ids_BT, use_cache=False, output_hidden_states=True)
        for row, i in enumerate(batch):
            vectors[i] = out.hidden_states[settings.layer + 1][row, places[i]].cpu().clone()
            logits_NV = source.lm_head(out.last_hidden_state[row, places[i]])
            expected[i] = [value.tolist() for value in logits_NV.softmax(-1).max(-1)]
            progress.update()
    facts, prefixes, sources, numbers = [], [], [], []
    for i in kept:
        for place, p, token in zip(places[i], *expected[i], strict=True):
            seen = rows[i][: place + 1]
            sure = p >= SURE_NEXT
            facts.append(
                Facts(
                    last=tokenizer.decode(seen[-1:]).strip(),
                    before=tokenizer.decode(seen[-2:-1]).strip(),
                    tail=tokenizer.decode(seen[-settings.tail :]).strip(),
                    kind=documents[i].kind,
                    next_word=tokenizer.decode([token]).strip() if sure else "",
                )
            )
            prefixes.append(tokenizer.decode(seen))
            sources.append(f"{documents[i].kind}/{documents[i].source}")
            numbers.append(i)
    return Sample(torch.cat([vectors[i] for i in kept]), facts, prefixes, sources, numbers)


def equal_lengths(
    rows: Sequence[Sequence[int]], kept: Sequence[int], most: int = READ_BATCH
) -> Iterator[list[int]]:
    """Yields batches of rows of one length, so that nothing is padded."""
    lengths: dict[int, list[int]] = {}
    for i in kept:
        lengths.setdefault(len(rows[i]), []).append(i)
    for length in sorted(lengths):
        for start in range(0, len(lengths[length]), most):
            yield lengths[length][start : start + most]


class TopicProbe:
    """A ridge regression from vectors to the content words of the text so far."""

    def __init__(self, sample: Sample, words: Sequence[str]):
        """Fits it.

        Args:
            sample: Vectors to learn from.
            words: The words it can tell.
        """
        self.words = list(words)
        unit_ND = F.normalize(sample.vectors_ND, dim=-1).double()
        self.mean_D, self.std_D = unit_ND.mean(0), unit_ND.std(0) + 1e-9
        index = {word: i for i, word in enumerate(self.words)}
        truth_NW = torch.zeros(len(sample), len(self.words), dtype=torch.float64)
        for row, prefix in enumerate(sample.prefixes):
            truth_NW[row, [index[w] for w in content_words(prefix) if w in index]] = 1.0
        self.base_W = truth_NW.mean(0)
        x_ND = (unit_ND - self.mean_D) / self.std_D
        gram_DD = x_ND.T @ x_ND + RIDGE * torch.eye(x_ND.shape[1], dtype=torch.float64)
        self.weight_DW = torch.linalg.solve(gram_DD, x_ND.T @ (truth_NW - self.base_W))

    def topics(self, sample: Sample) -> list[tuple[str, ...]]:
        """Returns, for each vector, the words of its text that the probe finds in it."""
        unit_ND = F.normalize(sample.vectors_ND, dim=-1).double()
        told_NW = (unit_ND - self.mean_D) / self.std_D @ self.weight_DW + self.base_W
        found = []
        for told_W, prefix in zip(told_NW, sample.prefixes, strict=True):
            said = set(content_words(prefix))
            ranked = told_W.argsort(descending=True)[: 4 * MOST_TOPICS].tolist()
            own = [self.words[i] for i in ranked if told_W[i] >= SURE_TOPIC]
            found.append(tuple([word for word in own if word in said][:MOST_TOPICS]))
        return found


def with_topics(train: Sample, others: Sequence[Sample], words: int) -> list[Sample]:
    """Adds topic words: those that are in the text and that a probe reads from the vector.

    Each half of the training documents is told by a probe of the other half, so that no vector is
    told what its own document taught.

    Args:
        train: Vectors of training documents.
        others: Vectors of other documents, told by a probe of all training vectors.
        words: How many words are candidates.

    Returns:
        `train` and `others`, with topics.
    """
    # Of each document the last prefix, which is the longest.
    last_prefix = dict(zip(train.documents, train.prefixes, strict=True))
    candidates = frequent(list(last_prefix.values()), words)
    if not candidates:
        return [train, *others]
    halves = [[i for i, n in enumerate(train.documents) if n % 2 == half] for half in (0, 1)]
    topics: list[tuple[str, ...]] = [()] * len(train)
    for own, other in (halves, halves[::-1]):
        told = TopicProbe(train.pick(other), candidates).topics(train.pick(own))
        for i, found in zip(own, told, strict=True):
            topics[i] = found
    probe = TopicProbe(train, candidates)
    told = [topics, *(probe.topics(sample) for sample in others)]
    return [_with(sample, own) for sample, own in zip([train, *others], told, strict=True)]


def _with(sample: Sample, topics: Sequence[tuple[str, ...]]) -> Sample:
    facts = [replace(fact, topics=own) for fact, own in zip(sample.facts, topics, strict=True)]
    return Sample(sample.vectors_ND, facts, sample.prefixes, sample.sources, sample.documents)
