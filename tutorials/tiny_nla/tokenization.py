"""Builds the tokenizer: byte-level BPE in which every word of the small world is one token.

The words enter the vocabulary whole (``ignore_merges``), as in Llama 3, so that no merge steps
are spent on them; all other text falls into short fragments, which is what makes it look
unfamiliar to the models.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import corpus
import gold
import unfamiliar
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from tokenizers.trainers import BpeTrainer

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
MARKER = "㈎"
PLAIN_TOKENS = (
    "<concept>",
    "</concept>",
    "<explanation>",
    "</explanation>",
    "<text>",
    "</text>",
    "<summary>",
    MARKER,
)
AV_PROMPT = "Explain: <concept>{injection_char}</concept>"
AR_PROMPT = "Summary of the following text: <text>{explanation}</text> <summary>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "User: {{ message['content'] }}\n{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
# Every punctuation mark and digit stands alone, so that a quotation splits like its source.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"


def build(seed: int, fragments: int) -> Tokenizer:
    """Builds the tokenizer from the corpus and the explanation phrases.

    Args:
        seed: Seed of the sample the fragments are learned from.
        fragments: Number of learned merges.
    """
    rng = random.Random(seed)
    strange = [unfamiliar.document(rng) for _ in range(6000)]
    strange = [text if rng.random() < 0.3 else text.lower() for text in strange]
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = _pre_tokenizer()
    trainer = BpeTrainer(
        vocab_size=256 + fragments,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, BOS, EOS],
        show_progress=False,
    )
    base.train_from_iterator(strange, trainer)
    model = json.loads(base.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for word in sorted(_whole_words(seed)):
        vocab.setdefault(word, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    plain = [AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS]
    tokenizer.add_tokens(plain)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def familiar_pieces(seed: int, count: int = 12000) -> set[str]:
    """Returns the vocabulary entries that occur in familiar documents."""
    splitter = _pre_tokenizer()
    pieces: set[str] = set()
    rng = random.Random(seed + 1)
    for _ in range(count):
        document = corpus.document(rng, plain=True)
        pieces.update(piece for piece, _ in splitter.pre_tokenize_str(document.text))
    return pieces


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer files that both transformers 4 and 5 read."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }
    data = json.loads(tokenizer.to_str())
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _whole_words(seed: int) -> set[str]:
    splitter = _pre_tokenizer()
    texts = [*gold.all_phrases(), AV_PROMPT, AR_PROMPT, "User:", "Answer:", " Explain:", "\n"]
    words = familiar_pieces(seed)
    for text in texts:
        for token in PLAIN_TOKENS:
            text = text.replace(token, "")
        words.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    return words
