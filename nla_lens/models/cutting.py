"""Loading only the first blocks of a model.

The blocks behind are taken away after the model was laid out by its whole config and before any
weight is read. So what the config says of all blocks (which attention each has, which of them share
keys and values, scales that go by their number) holds for those that are left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

from nla_lens.errors import NLAError
from nla_lens.models.anatomy import blocks_of, text_config

_PER_BLOCK_LISTS: Final = ("layer_types",)


def check_blocks(config: Any, n_blocks: int, path: object) -> None:
    """Refuses a config of fewer blocks.

    Raises:
        NLAError: Says how many there are.
    """
    there = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(there, int):
        raise NLAError(f"{path}: its config.json does not say how many blocks there are")
    if there < n_blocks:
        raise NLAError(f"{path} has {there} blocks; layer {n_blocks - 1} does not exist")


def cut(auto_class: Any, n_blocks: int) -> Any:
    """An Auto class of transformers whose models keep their first blocks alone.

    Foreign code is left whole: its classes are not known before they are run.
    """
    mapping = _CutMapping(auto_class._model_mapping, n_blocks)
    return type(auto_class.__name__, (auto_class,), {"_model_mapping": mapping})


def finish(model: Any, n_blocks: int) -> None:
    """What is left to do on a model once it is loaded; one of foreign code is cut now."""
    blocks = blocks_of(model)
    del blocks[n_blocks:]
    model.__class__ = getattr(type(model), "uncut_class", type(model))
    config = text_config(model.config)
    if getattr(config, "hidden_size_per_layer_input", None):
        # Gemma 3n and 4 lay their inputs for all blocks side by side, and go by this number.
        return
    config.num_hidden_layers = n_blocks
    for name in _PER_BLOCK_LISTS:
        per_block = getattr(config, name, None)
        if isinstance(per_block, list):
            # Some configs derive theirs from what they say otherwise.
            with contextlib.suppress(AttributeError):
                setattr(config, name, per_block[:n_blocks])


class _CutMapping:
    """From a config's class to model classes, as transformers' own, each of them cut."""

    def __init__(self, mapping: Any, n_blocks: int) -> None:
        self._mapping, self._n_blocks = mapping, n_blocks

    def __contains__(self, config_class: Any) -> bool:
        return config_class in self._mapping

    def __getitem__(self, config_class: Any) -> Any:
        classes = self._mapping[config_class]
        if isinstance(classes, (list, tuple)):
            return tuple(_cut_class(cls, self._n_blocks) for cls in classes)
        return _cut_class(classes, self._n_blocks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)


def _cut_class(cls: type, n_blocks: int) -> type:
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]

    def cut_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        del blocks_of(self)[n_blocks:]

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {"__init__": cut_init, "uncut_class": cls, **names})
