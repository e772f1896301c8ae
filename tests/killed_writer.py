"""A process that writes until it is killed; run by `test_stores.py`.

    python killed_writer.py KIND PATH

KIND is save, append, repair or create. What is certainly written is acknowledged on stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nla_lens.adapters.dictionaries.feature_table import FeatureExplanation, FeatureStore
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations

LONG = "é😀 " * 2000


def latent(index: int) -> FeatureExplanation:
    return FeatureExplanation(index=index, text=f"{index} {LONG}", norm=1.0)


def save(path: Path) -> None:
    for n in range(10**6):
        e = Explanation(f"{n % 10}{LONG}", "", [], True, 1.0)
        Explanations([e] * (1 + n % 7)).save(path)
        said(n)


def append(path: Path) -> None:
    with FeatureStore.open(path, {"a": 1}) as store:
        for n in range(max(store.finished, default=-1) + 1, 10**6):
            store.append(latent(n))
            said(n)


def repair(path: Path) -> None:
    while True:
        with path.open("ab") as file:
            file.write(b'{"index": 9, "text": "\xc3')
        with FeatureStore.open(path, {"a": 1}):
            said(0)


def create(path: Path) -> None:
    # What the one before left holds a latent of another number.
    path.unlink(missing_ok=True)
    for n in range(10**6):
        with FeatureStore.open(path, {"a": 1, "long": LONG}) as store:
            store.append(latent(n))
        said(n)
        path.unlink()


def said(n: int) -> None:
    print(n, flush=True)


if __name__ == "__main__":
    print("ready", flush=True)
    {"save": save, "append": append, "repair": repair, "create": create}[sys.argv[1]](
        Path(sys.argv[2])
    )
