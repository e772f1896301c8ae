"""What is taken from `tutorials/tiny_nla`, whose modules have names of their own kind there."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_nla"))

from measures import permuted, retrieval
from networks import injected
from schedule import Progress, Stepper, batches_by_length, pad
from vectors import variance_nrm

__all__ = [
    "Progress",
    "Stepper",
    "batches_by_length",
    "injected",
    "pad",
    "permuted",
    "retrieval",
    "variance_nrm",
]
