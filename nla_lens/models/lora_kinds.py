"""Kinds of adapters: which are merged, and those with more tokens than their base, or fewer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError, NLAWarning
from nla_lens.models.tokenizer_names import TOKENIZER_NAMES

CONFIG_NAME: Final = "adapter_config.json"
_NOT_MERGED: Final = {
    "alora_invocation_tokens": "acts behind some tokens only",
    "layer_replication": "runs blocks more than once",
}


def refuse_other_kinds(path: str | Path) -> None:
    """Refuses adapters that are no change of the base's weights by LoRA.

    Raises:
        NLAError: Names the kind.
    """
    config = read_json(Path(path) / CONFIG_NAME)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise NLAError(
            f"the adapter {path} is of the kind {kind!r:.40} and cannot be loaded: LoRA adapters "
            "are (rsLoRA and DoRA, too). Merge it with PEFT, and load the whole model"
        )
    for name, what in _NOT_MERGED.items():
        if config.get(name):
            raise NLAError(
                f"the adapter {path} cannot be loaded: it {what} ({name} in {CONFIG_NAME}), so it "
                "cannot be merged into its base"
            )


def fit_vocabulary(
    model: Any, part: Any, given: Mapping[str, tuple[int, ...]], path: str | Path
) -> None:
    """Gives the base as many token embeddings as the adapter was trained with.

    How many is what the adapter's own tables say. Where it has none, only tokens that its tokenizer
    has and the base has not are added; nothing is known of them, and they get the mean of all.

    Args:
        model: The whole base.
        part: Of it, what the adapter's keys start from.
        given: Shapes by the adapter's keys.
        path: The adapter's directory.

    Raises:
        NLAError: Two tables of different lengths.
    """
    import torch

    rows = {n for key, shape in given.items() if (n := _rows(part, model, key, shape)) is not None}
    if len(rows) > 1:
        raise NLAError(f"the adapter {path} has tables of {sorted(rows)} tokens; expected one size")
    there = len(model.get_input_embeddings().weight)
    if rows:
        wanted = rows.pop()
    else:
        wanted = max(there, _tokens_of(path))
        if wanted > there:
            warnings.warn(
                f"the adapter {path} adds {wanted - there} tokens to its base and has no "
                "embeddings for them; they get the mean of all others",
                NLAWarning,
                stacklevel=2,
            )
    if wanted != there:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if table is not None and wanted > there:
                with torch.no_grad():
                    table.weight[there:] = table.weight[:there].float().mean(0)
        model.requires_grad_(False)


def untie(adapted: Any) -> None:
    """Gives lm_head a table of its own where LoRA changes one of two tied tables.

    Merged into what both share, the change would reach the other, or be there twice.
    """
    import torch

    whole = adapted.get_base_model()
    tables = [whole.get_input_embeddings(), whole.get_output_embeddings()]
    if None in tables or not any(hasattr(table, "lora_A") for table in tables):
        return
    first, second = (getattr(table, "base_layer", table) for table in tables)
    if first.weight is second.weight:
        second.weight = torch.nn.Parameter(second.weight.detach().clone(), requires_grad=False)
        whole.config.tie_word_embeddings = False


def is_table(adapted: Any, key: str) -> bool:
    """Whether a key names a whole table of embeddings that found its place in the adapted model."""
    module = _module(adapted.base_model.model, key.removeprefix("base_model.model."), ".weight")
    whole = adapted.get_base_model()
    return module is not None and any(
        module is table or module is getattr(table, "base_layer", None)
        for table in (whole.get_input_embeddings(), whole.get_output_embeddings())
    )


def is_copy(key: str, given: Collection[str]) -> bool:
    """Whether a key is one of those that PEFT saves of a resized table beside the table itself."""
    return any(
        inside in key and key.replace(inside, ".") in given
        for inside in (".modules_to_save.", ".original_module.")
    )


def _rows(part: Any, model: Any, key: str, shape: tuple[int, ...]) -> int | None:
    """How many tokens an adapter's tensor is made for; None where it is no table."""
    key, tables = key.removeprefix("base_model.model."), _tables(model)
    for ending, axis in ((".weight", 0), (".lora_embedding_A", 1), (".lora_B.weight", 0)):
        module = _module(part, key, ending)
        # The second factor of an embedding's LoRA would be d_model long.
        if any(module is table for table in tables):
            return shape[axis]
    return None


def _tables(model: Any) -> list[Any]:
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [table for table in found if table is not None]


def _module(root: Any, key: str, ending: str) -> Any:
    if not key.endswith(ending):
        return None
    try:
        return root.get_submodule(key.removesuffix(ending))
    except AttributeError:
        return None


def _tokens_of(path: str | Path) -> int:
    """How many tokens the tokenizer beside an adapter has; 0 where there is none."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    config, whole = (Path(path) / name for name in TOKENIZER_NAMES)
    if config.is_file():
        return len(AutoTokenizer.from_pretrained(str(path)))
    return int(Tokenizer.from_file(str(whole)).get_vocab_size()) if whole.is_file() else 0
