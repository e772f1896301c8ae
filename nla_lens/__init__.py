"""nla_lens: read a model's residual stream in words.

>>> import nla_lens
>>> nla = nla_lens.NLA.from_pretrained("tiny")
>>> probe = nla_lens.attach(model, nla)              # TransformerLens
>>> logits, cache = model.run_with_cache("The garlic sizzles in the pan.")
>>> cache["resid_post", nla.spec.layer][0, -1].explain()
"""

from nla_lens.errors import NLAError, NLAWarning
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
    "NLASpec",
    "NLAWarning",
    "Probe",
    "ResidPost",
    "ResidualTensor",
    "attach",
    "extract",
]
