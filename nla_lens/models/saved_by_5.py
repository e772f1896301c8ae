"""What transformers 5 saves, read by transformers 4: right, or not at all.

4.57 takes some of it for something else and says nothing: a theta of 10000, a BOS that was switched
off. So what it cannot read is handed to it in its own terms, and what came out is looked at.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Final

from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError
from nla_lens.models.small_files import find_small_file

_OWN_NAMES: Final = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
"""Rotary parameters that are not part of a scaling, by what configs of 4 call them."""
_TABLES: Final = ("embed_tokens.weight", "lm_head.weight")
_ROWS: Final = 4096
_PROBES: Final = ("The quick brown fox", " a  b\n\n<c> \u00e9")


def reads_as_4() -> bool:
    """Whether the transformers that is installed is of before 5."""
    from transformers import __version__

    return int(__version__.split(".")[0]) < 5


def tokenizer_saved_by_5(path: str | Path) -> Any:
    """A tokenizer that transformers 5 saved; None where it did not, or no tokenizer.json is there.

    In 5 tokenizer.json says everything; 4 builds parts of it anew, as the class named beside it
    does.

    Raises:
        NLAError: 4 makes other ids of it than what is saved says.
    """
    config_file, whole_file = (
        find_small_file(path, name) for name in ("tokenizer_config.json", "tokenizer.json")
    )
    config = {} if config_file is None else read_json(config_file)
    extra = config.get("extra_special_tokens")
    by_5 = "backend" in config or config.get("tokenizer_class") == "TokenizersBackend"
    if whole_file is None or not (by_5 or isinstance(extra, list)):
        return None
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    listed: dict[str, Any] = {"extra_special_tokens": {}, "additional_special_tokens": extra}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(path), **(listed if isinstance(extra, list) else {})
    )
    saved = Tokenizer.from_file(str(whole_file))
    # transformers cuts and pads where it is told to, whatever stands here.
    saved.no_truncation()
    saved.no_padding()
    for text in (*_PROBES, *tokenizer.all_special_tokens):
        if tokenizer(text)["input_ids"] != saved.encode(text).ids:
            raise NLAError(
                f"the tokenizer of {path} was saved by transformers 5, and the installed release "
                f"makes other ids of {text!r}: pip install --upgrade 'transformers>=5'"
            )
    return tokenizer


def advice(path: str | Path) -> str:
    """What to do where files of a newer transformers cannot be read; else nothing."""
    from transformers import __version__

    if not reads_as_4():
        return ""
    try:
        found = find_small_file(path, "config.json")
        saved_by = read_json(found).get("transformers_version") if found else None
    # It explains another error, and must not be one: of a name that is none, 4.57 raises its own.
    except Exception:
        return ""
    if not str(saved_by).startswith("5."):
        return ""
    return (
        f"; it was saved by transformers {saved_by!r:.20} and is read by {__version__}: "
        "pip install --upgrade 'transformers>=5'"
    )


def read_rope_parameters(config: Any) -> None:
    """Puts the rotary parameters where 4 looks for them."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    whole = rope.get("full_attention", rope)
    scaling = {key: value for key, value in whole.items() if key not in _OWN_NAMES}
    # Also where the class has another name for it: left alone, that says what is usual.
    for saved, names in _OWN_NAMES.items():
        for name in names if saved in whole else ():
            if name == saved or hasattr(config, name):
                setattr(config, name, whole[saved])
    config.rope_scaling = None if scaling.get("rope_type") in (None, "default") else scaling
    if "sliding_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]


def keep_own_head(config: Any, path: str | Path) -> None:
    """Lets 4 load an lm_head that a config calls tied, where the file has another one, as 5 does.

    4 leaves it out, and writes fluent text by the table of the embeddings.
    """
    from safetensors import SafetensorError, safe_open

    parts = (config, config.get_text_config())
    tied = any(getattr(part, "tie_word_embeddings", False) for part in parts)
    if not (os.path.isdir(path) and tied):
        return
    found: dict[str, Path] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        # What is damaged is told by who loads it.
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as held:
            found |= {name: file for name in held.keys() if name.endswith(_TABLES)}  # noqa: SIM118
    by_kind = [[n for n in found if n.endswith(kind)] for kind in _TABLES]
    if any(len(names) != 1 for names in by_kind):
        return
    (embeds,), (head,) = by_kind
    with safe_open(found[embeds], "pt") as one, safe_open(found[head], "pt") as other:
        a, b = one.get_slice(embeds), other.get_slice(head)
        rows = a.get_shape()[0]
        is_same = a.get_shape() == b.get_shape() and all(
            bool(a[i : i + _ROWS].equal(b[i : i + _ROWS])) for i in range(0, rows, _ROWS)
        )
    for part in () if is_same else parts:
        part.tie_word_embeddings = False
