"""Small checkpoints in the released formats, and plain arithmetic to compare with.

from tests.checkpoints import build_pair, reference
av, ar = build_pair(tmp_path, "llama")
"""

from . import reference
from .builders import build_ar, build_av, build_pair, build_source
from .configs import FAMILIES
from .lora import build_lora_ar, build_lora_av
from .sidecars import ABSENT, sidecar, write_sidecar
from .texts import AR_TEMPLATE, AV_TEMPLATE, EXPLANATIONS, MARKERS
from .weights import many_vectors, vectors

__all__ = [
    "ABSENT",
    "AR_TEMPLATE",
    "AV_TEMPLATE",
    "EXPLANATIONS",
    "FAMILIES",
    "MARKERS",
    "build_ar",
    "build_av",
    "build_lora_ar",
    "build_lora_av",
    "build_pair",
    "build_source",
    "many_vectors",
    "reference",
    "sidecar",
    "vectors",
    "write_sidecar",
]
