"""Tokenizers of each family's kind, trained on a page of text and written in the hub's layout.

Llama and Qwen: byte-level BPE behind the GPT-4 style splitting pattern. Gemma: BPE over
characters with byte fallback, blanks written as "▁", no splitting, special tokens first.
In all of them the marker is one ordinary token (not an added one) and the tags are several:
`<`, `concept`, `>`, with `>` and `>\\n` both there, so that a closing tag may overhang.
"""

import json
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from . import texts

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPLIT = _SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# Gemma does not split at all; its merges are still learnt within words.
_GEMMA_LEARN = r"▁?\p{L}+|\p{N}|▁?[^▁\s\p{L}\p{N}]+\n*|\n+|▁+"

SPECIALS = {
    "llama": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ),
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "gemma3": (
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<image_soft_token>",
        "<start_of_image>",
        "<end_of_image>",
    ),
}
CHAT_TEMPLATES = {
    "llama": texts.LLAMA_CHAT,
    "qwen2": texts.QWEN2_CHAT,
    "qwen3": texts.QWEN3_CHAT,
    "gemma3": texts.GEMMA_CHAT,
}


def _kind(family: str) -> str:
    return "gemma3" if family.startswith("gemma3") else family


def _byte_level(family: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if family != "llama":
        tokenizer.normalizer = normalizers.NFC()
    split = Regex(_SPLIT if family == "llama" else _QWEN_SPLIT)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 220,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([texts.BPE_TEXT], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIALS[family]]
    )
    if family == "qwen3":  # added, yet not special: they stay when special tokens are skipped
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if family == "llama":
        bos = SPECIALS[family][0]
        add_bos = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
        tokenizer.post_processor = processors.Sequence([byte_level, add_bos])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer


def _gemma() -> Tokenizer:
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_GEMMA_LEARN), behavior="isolated")
    learner.train_from_iterator(
        [texts.BPE_TEXT], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]

    pieces = [*SPECIALS["gemma3"], *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learnt["vocab"], key=learnt["vocab"].get)
    merges = [tuple(pair) for pair in learnt["merges"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIALS["gemma3"]]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return tokenizer


@cache
def tokenizer(family: str) -> Tokenizer:
    """The family's tokenizer. Do not change what is returned: it is made once."""
    return _gemma() if _kind(family) == "gemma3" else _byte_level(family)


def token_id(family: str, text: str) -> int:
    """The id of a text that is one token.

    Raises:
        ValueError: the text is not one token.
    """
    ids = tokenizer(family).encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens of the {family} tokenizer, not one: {ids}")
    return ids[0]


def quiet_ids(family: str, vocab_size: int) -> list[int]:
    """Ids that a checkpoint should not write by chance: specials and the padding of the table."""
    known = tokenizer(family)
    names = [*SPECIALS[_kind(family)], *(("<think>", "</think>") if family == "qwen3" else ())]
    return sorted(
        {known.token_to_id(name) for name in names} | set(range(known.get_vocab_size(), vocab_size))
    )


def _settings(family: str) -> dict:
    if family == "llama":  # no pad token, as released
        return {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": True,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
    if family in ("qwen2", "qwen3"):
        return {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
        }
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
    }


def write_tokenizer(
    directory: Path, family: str, *, template_file: bool = False, **overrides
) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        directory: where; it must exist.
        family: see `configs.FAMILIES`.
        template_file: the chat template in `chat_template.jinja`, as newer files have it,
            instead of inside tokenizer_config.json.
        overrides: entries of tokenizer_config.json, e.g. `padding_side="left"`.
    """
    made = tokenizer(family)
    made.save(str(directory / "tokenizer.json"))
    settings = _settings(_kind(family))
    added = json.loads(made.to_str())["added_tokens"]
    settings["added_tokens_decoder"] = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
        for entry in added
    }
    settings["model_max_length"] = 131072
    template = CHAT_TEMPLATES[_kind(family)]
    if template_file:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        settings["chat_template"] = template
    settings.update(overrides)
    special = {
        key: settings[key]
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if settings.get(key)
    }
    for name, content in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", special),
    ):
        (directory / name).write_text(
            json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8"
        )
