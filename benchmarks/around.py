"""What stands around a model: import time, memory of a long stream, an attached probe.

Each function answers rows `(what, setting, numbers)`.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from subject import SHAPES, Shape, random_model

import nla_lens
from nla_lens.models.weights import load_tokenizer

Row = tuple[str, str, dict[str, str]]

_IMPORTS = {
    "import nla_lens": "import nla_lens",
    "import nla_lens, every public name": "from nla_lens import *",
}


def import_rows(repeats: int = 7) -> list[Row]:
    """Milliseconds beyond `import torch`, each in a process of its own."""
    taken: dict[str, list[float]] = {what: [] for what in _IMPORTS}
    for _ in range(repeats):
        for what, statement in _IMPORTS.items():
            taken[what].append(_import_ms(statement))
    return [("import", what, {"ms": f"{median(ms):.1f}"}) for what, ms in taken.items()]


def _import_ms(statement: str) -> float:
    code = (
        "import time, torch\nstart = time.perf_counter()\n"
        f"{statement}\nprint(1000 * (time.perf_counter() - start))"
    )
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def streaming_rows(n_vectors: int = 10_000, *, max_new_tokens: int = 8) -> list[Row]:
    """Memory of this process while vectors stream through `explain_iter` of the embedded pair."""
    nla = nla_lens.NLA.from_pretrained("tiny")
    vectors = torch.randn(n_vectors, nla.spec.d_model, generator=torch.Generator().manual_seed(0))
    resident, start = [], time.perf_counter()
    for n, _ in enumerate(nla.explain_iter(vectors, max_new_tokens=max_new_tokens), start=1):
        if n % (n_vectors // 10) == 0:
            gc.collect()
            resident.append(psutil.Process().memory_info().rss / 2**20)
    seconds = time.perf_counter() - start
    numbers = {
        "s": f"{seconds:.1f}",
        "per s": f"{n_vectors / seconds:.0f}",
        "MiB after a tenth": f"{resident[0]:.0f}",
        "MiB more at most": f"{max(resident) - resident[0]:.1f}",
    }
    return [("memory", f"{n_vectors} vectors by explain_iter, scored", numbers)]


@torch.inference_mode()
def probe_rows(rounds: int = 80, *, shape: Shape = SHAPES["cpu"], n_tokens: int = 64) -> list[Row]:
    """`run_with_cache` of TransformerLens with a probe that nobody asks, against without.

    In seconds of this process' own, so that others on the machine count for little; medians of the
    ratios within a round, so that a machine that slows down counts for little. `A/A %` is what two
    measurements of the same thing, without a probe, differ by.
    """
    rows: list[Row] = []
    for name, make in (("TransformerBridge", _bridge), ("HookedTransformer", _hooked)):
        model = make(shape)
        if model is None:
            rows.append(("probe", f"{name}: not in this TransformerLens", {}))
            continue
        ids_BT = torch.randint(1, 500, (1, n_tokens))
        without, again, attached = _compared(model, ids_BT, shape, rounds)
        numbers = {
            "ms": f"{1000 * median(without):.1f}",
            "% slower": f"{_percent_slower(attached, without):+.2f}",
            "A/A %": f"{_percent_slower(again, without):+.2f}",
        }
        rows.append(("probe", f"{name}, run_with_cache, {n_tokens} tokens", numbers))
    return rows


def _percent_slower(these: list[float], those: list[float]) -> float:
    return 100 * (median(a / b for a, b in zip(these, those, strict=True)) - 1)


def _compared(
    model: Any, ids_BT: torch.Tensor, shape: Shape, rounds: int
) -> tuple[list[float], list[float], list[float]]:
    nla = _Unasked(shape)

    def plain() -> float:
        # One run before: attaching itself, and what it pushes out of the caches, is not the run.
        model.run_with_cache(ids_BT)
        return _cpu_seconds(lambda: model.run_with_cache(ids_BT))

    def attached() -> float:
        with nla_lens.attach(model, nla):  # type: ignore[arg-type]
            return plain()

    runs, taken = (plain, plain, attached), ([], [], [])
    for n in range(rounds + 3):
        # Each comes first, second and third equally often.
        for i in (n % 3, (n + 1) % 3, (n + 2) % 3):
            seconds = runs[i]()
            if n >= 3:
                taken[i].append(seconds)
    return taken


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


class _Unasked:
    """All of an NLA that attaching looks at."""

    def __init__(self, shape: Shape) -> None:
        self.spec = SimpleNamespace(
            d_model=shape.d_model, layer=2, hook_name="blocks.2.hook_resid_post", source_model=None
        )

    def explain(self, *args: object) -> None:
        raise NotImplementedError


def _tokenizer() -> Any:
    return load_tokenizer(nla_lens.NLA.from_pretrained("tiny").verbalizer.tokenizer.name_or_path)


def _bridge(shape: Shape) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return None
    model = random_model(shape, "cpu")
    model.config.architectures = [type(model).__name__]
    return TransformerBridge.boot_transformers(
        "random", hf_model=model, tokenizer=_tokenizer(), dtype=torch.float32, device="cpu"
    )


def _hooked(shape: Shape) -> Any:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return None
    cfg = HookedTransformerConfig(
        n_layers=shape.n_blocks,
        d_model=shape.d_model,
        d_head=shape.d_model // shape.n_heads,
        n_heads=shape.n_heads,
        n_key_value_heads=shape.n_kv_heads,
        d_mlp=shape.d_mlp,
        d_vocab=shape.d_vocab,
        n_ctx=256,
        act_fn="silu",
        normalization_type="RMS",
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=shape.d_model // shape.n_heads,
        device="cpu",
    )
    return HookedTransformer(cfg, _tokenizer(), move_to_device=False).requires_grad_(False).eval()
