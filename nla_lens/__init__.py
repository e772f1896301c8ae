"""nla_lens: read a model's residual stream in words.

>>> import nla_lens
>>> nla = nla_lens.NLA.from_pretrained("tiny")
>>> probe = nla_lens.attach(model, nla)              # TransformerLens
>>> logits, cache = model.run_with_cache("The garlic sizzles in the pan.")
>>> cache["resid_post", nla.spec.layer][0, -1].explain()

Names are imported when they are first used; `import nla_lens` loads neither torch nor a framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nla_lens.errors import NLAError, NLARemoteError, NLAWarning
    from nla_lens.explanation import Explanation, Explanations
    from nla_lens.extraction import extract
    from nla_lens.frameworks import Probe, attach
    from nla_lens.hook_point import ResidPost
    from nla_lens.nla import NLA
    from nla_lens.residual import ResidualTensor
    from nla_lens.spec import NLASpec

__version__ = "0.1.0"
__all__ = [
    "NLA",
    "Explanation",
    "Explanations",
    "NLAError",
    "NLARemoteError",
    "NLASpec",
    "NLAWarning",
    "Probe",
    "ResidPost",
    "ResidualTensor",
    "attach",
    "extract",
]
_HOMES = {
    "NLA": "nla",
    "Explanation": "explanation",
    "Explanations": "explanation",
    "NLAError": "errors",
    "NLARemoteError": "errors",
    "NLASpec": "spec",
    "NLAWarning": "errors",
    "Probe": "frameworks",
    "ResidPost": "hook_point",
    "ResidualTensor": "residual",
    "attach": "frameworks",
    "extract": "extraction",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
