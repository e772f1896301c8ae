"""The tokenizer of a TransformerLens model as its files say it is.

TransformerLens loads it once more with `add_bos_token=True`, and takes the BOS off again where that
is asked for. A text read with it as it is would begin with a BOS that the model's own tokenizer
does not write (Pythia, GPT-2, OLMo), and every position would be one further.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

from nla_lens.errors import NLAError, NLAWarning
from nla_lens.models.weights import load_tokenizer

_found: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def plain_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer without the BOS that TransformerLens has it put before a text.

    Args:
        tokenizer: `model.tokenizer`. One that puts none there, or whose tokens are not those of its
            files (some were added), is given back.
    """
    if not getattr(tokenizer, "init_kwargs", {}).get("add_bos_token"):
        return tokenizer
    try:
        return _found[tokenizer]
    except KeyError:
        found = _found[tokenizer] = _reloaded(tokenizer)
        return found


def _reloaded(tokenizer: Any) -> Any:
    path = str(tokenizer.name_or_path)
    try:
        plain = load_tokenizer(path)
        if len(plain) == len(tokenizer):
            return plain
        reason = "tokens were added to it"
    except NLAError:
        reason = f"its files are not found under {path!r:.80}"
    warnings.warn(
        "TransformerLens has this model's tokenizer put a BOS before each text, whether its own "
        f"does is not known ({reason}): pass tokenizer=",
        NLAWarning,
        stacklevel=5,
    )
    return tokenizer
