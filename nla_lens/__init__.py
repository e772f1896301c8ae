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
    from nla_lens.checkpoints.spec import NLASpec
    from nla_lens.errors import NLAError, NLARemoteError, NLAWarning
    from nla_lens.evaluation.calibrate import calibrate
    from nla_lens.evaluation.compare import compare
    from nla_lens.evaluation.evaluate import evaluate
    from nla_lens.evaluation.examine import examine
    from nla_lens.evaluation.sweep import sweep
    from nla_lens.jobs.running import explain_corpus
    from nla_lens.nla import NLA
    from nla_lens.results.calibration import Calibration
    from nla_lens.results.explanation import Explanation
    from nla_lens.results.explanations import Explanations
    from nla_lens.results.store import Store, open_store
    from nla_lens.stream.extraction import extract
    from nla_lens.stream.frameworks import Probe, attach
    from nla_lens.stream.hook_point import ResidPost
    from nla_lens.stream.residual import ResidualTensor
    from nla_lens.stream.steering import steer

__version__ = "0.1.0"
__all__ = [
    "NLA",
    "Calibration",
    "Explanation",
    "Explanations",
    "NLAError",
    "NLARemoteError",
    "NLASpec",
    "NLAWarning",
    "Probe",
    "ResidPost",
    "ResidualTensor",
    "Store",
    "attach",
    "calibrate",
    "compare",
    "evaluate",
    "examine",
    "explain_corpus",
    "extract",
    "open_store",
    "steer",
    "sweep",
]
_HOMES = {
    "NLA": "nla",
    "Calibration": "results.calibration",
    "Explanation": "results.explanation",
    "Explanations": "results.explanations",
    "NLAError": "errors",
    "NLARemoteError": "errors",
    "NLASpec": "checkpoints.spec",
    "NLAWarning": "errors",
    "Probe": "stream.frameworks",
    "ResidPost": "stream.hook_point",
    "ResidualTensor": "stream.residual",
    "Store": "results.store",
    "attach": "stream.frameworks",
    "calibrate": "evaluation.calibrate",
    "compare": "evaluation.compare",
    "evaluate": "evaluation.evaluate",
    "examine": "evaluation.examine",
    "explain_corpus": "jobs.running",
    "extract": "stream.extraction",
    "open_store": "results.store",
    "steer": "stream.steering",
    "sweep": "evaluation.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
