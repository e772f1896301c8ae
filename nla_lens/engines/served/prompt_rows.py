"""What enters block 0 for prompt tokens, read out of a checkpoint row by row.

A client of a server needs the embeddings of about 150 tokens and no other weight, so only those
rows are read from the file: not the table (2 GB for Gemma 3), and never a block.

What a server does with embeddings it is sent differs by family and decides what must be sent:

* llama, qwen2, qwen3: the row of the table.
* gemma3, gemma3_text: the row times sqrt(d), both in the model's dtype, as its embedding module
  does. The servers do not multiply again: vLLM 0.32.0 multiplies in `embed_input_ids`
  (models/gemma3.py) and takes `inputs_embeds` as they are, SGLang 0.5.23 in `embed_tokens`
  (models/gemma3_causal.py).

Read in both sources, and measured on vLLM 0.32.0 (CPU, float32) for llama, qwen2, qwen3 and
gemma3_text: a prompt sent as ids and as these rows gives equal ids and equal log-probabilities to
the last digit; Gemma's rows divided or multiplied once more give other texts. The multimodal
wrapper `gemma3` needs torchvision, which the test machines do not have for vLLM: its path
(models/gemma3_mm.py, worker/gpu_model_runner.py) was read only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.checkpoints.fetching import fetch_file
from nla_lens.checkpoints.files import Checkpoint, open_checkpoint
from nla_lens.checkpoints.folders import Name
from nla_lens.checkpoints.sidecar import Role
from nla_lens.disk.reading import read_json
from nla_lens.errors import NLAError
from nla_lens.models.lora import CONFIG_NAME, WEIGHTS_NAME, adapter_base
from nla_lens.models.small_files import read_index

PLAIN: Final = frozenset({"llama", "qwen2", "qwen3"})
SCALED: Final = frozenset({"gemma3", "gemma3_text"})
"""Families whose embedding module multiplies by sqrt(d)."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_KEY: Final = "embed_tokens.weight"
_ENDS: Final = 1 << 16


class PromptRows:
    """Rows of an embedding table, each read from the file once.

    Attributes:
        vocab_size: Rows of the table.
        d_model: Its width.
        dtype: Of the model, and of the multiplication.
    """

    def __init__(self, path: Path, key: str, factor: float | None, dtype: Any) -> None:
        """Args:
        path: The safetensors file.
        key: The table's name in it.
        factor: What the embedding module multiplies by; None is nothing.
        dtype: What the model computes in; None is the file's.

        Raises:
            NLAError: No such table.
        """
        self._path, self._key = path, key
        self._rows: dict[int, Tensor] = {}
        shape, sample_1D = self._read([])
        if len(shape) != 2 or not sample_1D.is_floating_point():
            raise NLAError(
                f"{path}: {key} is {sample_1D.dtype} {shape}; expected [vocab, d] floats"
            )
        self.vocab_size, self.d_model = shape
        self.dtype: torch.dtype = dtype or sample_1D.dtype
        self._factor = None if factor is None else torch.tensor(factor).to(self.dtype)

    def of(self, ids: Sequence[int]) -> Tensor:
        """What enters block 0 for these ids, `[T, d]` float32 with the values of `dtype`.

        Raises:
            NLAError: An id the table does not have, or a row that is not finite.
        """
        missing = sorted(set(ids) - set(self._rows))
        if missing and not 0 <= missing[0] <= missing[-1] < self.vocab_size:
            raise NLAError(f"{self._path} has {self.vocab_size} rows; the prompt's ids go beyond")
        if missing:
            _, rows_ND = self._read(missing)
            rows_ND = rows_ND.to(self.dtype)
            if self._factor is not None:
                rows_ND = rows_ND * self._factor
            if not rows_ND.isfinite().all():
                raise NLAError(f"{self._path}: {self._key} holds NaN or infinity")
            self._rows |= dict(zip(missing, rows_ND.float(), strict=True))
        return torch.stack([self._rows[token] for token in ids])

    def digest(self, beside: Path | None) -> str:
        """A hash of both ends of the table's file, and of an adapter's file that is beside it."""
        digest = hashlib.sha256(str(self.dtype).encode())
        for path in (self._path, *([] if beside is None else [beside])):
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{size}\0".encode() + file.read(_ENDS))
                file.seek(max(0, size - _ENDS))
                digest.update(file.read(_ENDS))
        return digest.hexdigest()

    def _read(self, ids: Sequence[int]) -> tuple[list[int], Tensor]:
        """The table's shape and some rows; an empty row list gives the dtype alone."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, framework="pt") as file:
                table: Any = file.get_slice(self._key)
                rows = [table[token : token + 1] for token in ids] or [table[0:0]]
                return list(table.get_shape()), torch.cat(rows)
        except (SafetensorError, OSError, ValueError, RuntimeError, IndexError) as error:
            raise NLAError(
                f"{self._path}: {self._key} cannot be read as safetensors: {error}"
            ) from error


def open_rows(checkpoint: Checkpoint, config: Any, dtype: Any) -> PromptRows:
    """The embedding table of a checkpoint; from the hub its one file is fetched.

    Args:
        checkpoint: The AV; of a LoRA adapter the base's table is read.
        config: The model's transformers config.
        dtype: What the server computes in; None is what the config says.

    Raises:
        NLAError: Another family, an adapter that trained the table, no such file or tensor.
    """
    text = config.get_text_config()
    if config.model_type not in PLAIN | SCALED:
        raise NLAError(
            f"{checkpoint.name} is a {config.model_type!r}; what a server does with embeddings it "
            f"is sent was read and measured for {sorted(PLAIN | SCALED)} only: use another engine"
        )
    _check_adapter(checkpoint)
    base = model_files(checkpoint)
    name, key = _find(base)
    factor = text.hidden_size**0.5 if config.model_type in SCALED else None
    known = dtype or getattr(config, "dtype", None) or getattr(text, "dtype", None)
    path = fetch_file(base, name)
    if not path.is_file():
        raise NLAError(f"no {name} in {base.path}: the prompt's embeddings are read from it")
    return PromptRows(path, key or _key_in(path), factor, known)


def open_small(
    name: Name,
    *,
    role: Role | None = None,
    revision: str | None = None,
    foreign_code: bool = False,
    base: str | Path | None = None,
) -> Checkpoint:
    """A checkpoint without weights; of an adapter with them: they are small, and say what it is."""
    options: dict[str, Any] = {
        "role": role,
        "revision": revision,
        "foreign_code": foreign_code,
        "base": base,
    }
    opened = open_checkpoint(name, weights=False, **options)
    return open_checkpoint(name, **options) if opened.is_adapter else opened


def model_files(checkpoint: Checkpoint) -> Checkpoint:
    """The files of the model itself: of an adapter, its base's; without weights."""
    base = adapter_base(checkpoint.path, checkpoint.base)
    return checkpoint if base is None else open_checkpoint(base, weights=False)


def _check_adapter(checkpoint: Checkpoint) -> None:
    """Refuses an adapter after which the base's table is not the one that is served.

    Raises:
        NLAError: Names what it trained.
    """
    if not checkpoint.is_adapter:
        return
    from safetensors import SafetensorError, safe_open

    try:
        config = read_json(checkpoint.path / CONFIG_NAME)
        trained = str([config.get(k) for k in ("modules_to_save", "target_modules")])
        indices = config.get("trainable_token_indices")
        with safe_open(checkpoint.path / WEIGHTS_NAME, framework="pt") as file:
            keys = " ".join(file.keys())
    except (OSError, SafetensorError) as error:
        raise NLAError(f"the adapter {checkpoint.path} cannot be read: {error}") from error
    if indices or "embed_tokens" in trained + keys:
        raise NLAError(
            f"the adapter {checkpoint.name} also trained embeddings, which its base's file does "
            "not hold: merge it into its base and serve that, or use another engine"
        )


def _find(base: Checkpoint) -> tuple[str, str | None]:
    """The file that holds the table, and the table's name where an index says it."""
    # As transformers does: a whole file wins over an index beside it.
    index = base.path / _INDEX
    if (base.path / _SINGLE).is_file() or not index.is_file():
        return _SINGLE, None
    files = read_index(index)
    key = _one_key(files, index)
    return files[key], key


def _key_in(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise NLAError(f"{path} cannot be read as safetensors: {error}") from error
    return _one_key(keys, path)


def _one_key(keys: Any, where: Path) -> str:
    found = [key for key in keys if key == _KEY or str(key).endswith(f".{_KEY}")]
    if len(found) != 1:
        raise NLAError(f"{where} names {len(found)} embedding tables (*.{_KEY}); expected one")
    return str(found[0])
