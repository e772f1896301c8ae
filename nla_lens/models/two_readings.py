"""Tokenizers whose files say two things, of which each transformers takes another.

transformers 4 reads tokenizer.json and lets tokenizer_config.json decide whether a BOS comes first;
transformers 5 takes the BOS from tokenizer.json, and of some classes nothing else: it builds them
anew. Either is fluent, and only one is what a model was trained with. So where they differ, it is
said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_WITH_A_BOS: Final = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Of these transformers 4 goes by `add_bos_token`, which is true where nothing is said."""
_PROBES: Final = (
    "The quick brown fox: it isn't 12345, \u201cé\u201d \u65e5\u672c.\n\n  a  b\t<c>\n",
    " x",
    "UPPER",
)
_PLAIN_PROBES: Final = ("The quick brown fox isn't 12345.", "UPPER, lower")
_SPECIAL_PIECES: Final = 16
"""Those before may have other names."""
_MOST_ADDED: Final = 64
_OF_THE_MODEL: Final = ("byte_fallback", "ignore_merges", "dropout")


def two_readings(tokenizer: Any, whole: Mapping[str, Any], config: Any) -> str | None:
    """Where a loaded tokenizer is not what its tokenizer.json says, or may be read otherwise.

    Args:
        tokenizer: As transformers loaded it.
        whole: Its parsed tokenizer.json.
        config: Its parsed tokenizer_config.json; empty where there is none.

    Returns:
        What is to be said; None where all say the same.
    """
    return _other_tokens(tokenizer, whole) or _other_beginning(tokenizer, whole, config)


def other_pieces(tokenizer: Any, model_file: Path) -> str | None:
    """Where a tokenizer that transformers made of a SentencePiece model is not that model.

    Args:
        tokenizer: As transformers loaded it.
        model_file: The SentencePiece model; where it is something else, nothing is said.
    """
    try:
        from sentencepiece import SentencePieceProcessor

        alone = SentencePieceProcessor(model_file=str(model_file))
    # Not installed; or the file is of another kind, as tiktoken's.
    except (ImportError, OSError, RuntimeError):
        return None
    n_pieces = alone.get_piece_size()
    known = range(_SPECIAL_PIECES, n_pieces, max(1, n_pieces // 16))
    # Some families number the pieces otherwise.
    if any(tokenizer.convert_ids_to_tokens(i) != alone.id_to_piece(i) for i in known):
        return None
    for text in _PLAIN_PROBES:
        ids, due = tokenizer(text, add_special_tokens=False)["input_ids"], alone.encode(text)
        if list(ids) != due:
            return (
                f"as {type(tokenizer).__name__} it makes {_shown(ids)} of {text!r}, and "
                f"{model_file.name} alone {_shown(due)}; a model that was trained with the latter "
                "reads other tokens here: save its tokenizer.json beside it"
            )
    return None


def _other_tokens(tokenizer: Any, whole: Mapping[str, Any]) -> str | None:
    loaded = getattr(tokenizer, "backend_tokenizer", None)
    if loaded is None:
        return None
    moved = list(_moved(tokenizer, whole))
    if moved:
        text, said, given = moved[0]
        return (
            f"tokenizer.json says that {text!r:.80} is the token {said}, and it is loaded as "
            f"{given}; look which of them the model knows"
        )
    if _parts(loaded) == _parts_of(whole):
        return None
    from tokenizers import Tokenizer

    alone = Tokenizer.from_str(json.dumps(whole))
    alone.no_truncation()
    alone.no_padding()
    for text in _PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        due = alone.encode(text, add_special_tokens=False).ids
        # What is unknown may be one token or several, and is none that a model was trained with.
        if list(ids) != due and tokenizer.unk_token_id not in due:
            return (
                f"as {type(tokenizer).__name__} it makes {_shown(ids)} of {text[:20]!r}, and "
                f"tokenizer.json alone {_shown(due)}; a model that was trained with the latter "
                "reads other tokens here (transformers 4 and 5 differ in this)"
            )
    return None


def _other_beginning(
    tokenizer: Any, whole: Mapping[str, Any], config: Mapping[str, Any]
) -> str | None:
    """Whether a text begins with a BOS: by either file, and here."""
    written = _begins(whole.get("post_processor"))
    ids, bare = (
        tokenizer("x", add_special_tokens=with_them)["input_ids"] for with_them in (True, False)
    )
    here, name = list(ids)[:1] != list(bare)[:1], str(config.get("tokenizer_class"))
    # What transformers 5 saved says the same twice, or once.
    goes_by = name.removesuffix("Fast") in _WITH_A_BOS and "backend" not in config
    said = config.get("add_bos_token", True) if goes_by else written
    if not isinstance(said, bool) or said == written == here:
        return None
    begins = {True: "begins with a BOS", False: "begins without one"}
    return (
        f"a text {begins[here]}, by tokenizer.json it {begins[written]}, and by the class and "
        f"add_bos_token in tokenizer_config.json it {begins[said]}: transformers 4 and 5 differ in "
        "which they go by; let both say what the model was trained with"
    )


def _begins(step: Any) -> bool:
    """Whether a post-processor puts a token in front."""
    if not isinstance(step, Mapping):
        return False
    if isinstance(step.get("processors"), list):
        return any(map(_begins, step["processors"]))
    single = step.get("single")
    if isinstance(single, list):
        return bool(single) and isinstance(single[0], Mapping) and "SpecialToken" in single[0]
    return step.get("type") in ("BertProcessing", "RobertaProcessing")


def _moved(tokenizer: Any, whole: Mapping[str, Any]) -> Iterator[tuple[str, int, Any]]:
    """Added tokens that have another id than in the file, up to so many of them."""
    added = whole.get("added_tokens")
    for token in (added if isinstance(added, list) else [])[-_MOST_ADDED:]:
        content, said = token.get("content"), token.get("id")
        given = tokenizer.convert_tokens_to_ids(content)
        if given != said:
            yield content, said, given


def _parts(loaded: Any) -> dict[str, Any]:
    """What makes tokens of a text, merges and vocabulary apart."""
    found = {name: _state(getattr(loaded, name)) for name in ("normalizer", "pre_tokenizer")}
    return found | {name: getattr(loaded.model, name, None) for name in _OF_THE_MODEL}


def _parts_of(whole: Mapping[str, Any]) -> dict[str, Any]:
    model = whole.get("model")
    of_the_model = model if isinstance(model, Mapping) else {}
    found = {name: _plain(whole.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return found | {
        name: of_the_model.get(name, None if name == "dropout" else False) for name in _OF_THE_MODEL
    }


def _state(step: Any) -> Any:
    return None if step is None else _plain(json.loads(step.__getstate__()))


def _plain(step: Any) -> Any:
    """Without what is about offsets alone."""
    if isinstance(step, Mapping):
        return {key: _plain(value) for key, value in step.items() if key != "trim_offsets"}
    return [_plain(part) for part in step] if isinstance(step, list) else step


def _shown(ids: Any) -> str:
    return f"{list(ids)[:8]}".replace("]", ", ...]" if len(ids) > 8 else "]")
