"""One `Explanation`: what a vector says, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Final

from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.results.claim import Claim
from nla_lens.results.columns import Column
from nla_lens.results.display import to_html

if TYPE_CHECKING:
    from typing_extensions import Self

NUMBER: Final = (float, int)
_LARGEST: Final = 2**63 - 1
"""Of integers: what tables hold, and a float can be compared with."""


@dataclass(frozen=True)
class Explanation:
    """What one vector says, and how far to trust it.

    Attributes:
        text: What stands between the explanation tags, stripped; everything where they are missing.
        raw_text: Everything generated, tags included, prompt and end-of-sequence not.
        token_ids: The generated ids, an end-of-sequence id included.
        complete: The closing tag was reached.
        cos: Cosine of the text's reconstruction and the vector; None without a reconstructor.
        mse_nrm: Mean squared difference of the two after scaling, in [0, 4].
        fve_nrm: `1 - mse_nrm / var_nrm`; None also where var_nrm is not known.
        norm: ||v|| before rescaling, float32.
        token: Text of the token the vector stands at; None when not known.
        token_id: Its id.
        position: Its position in its text, from 0.
        hook_name: Where in the model it was read.
        flags: Machine-readable warnings, see `nla_lens.results.flags`.
        samples: With num_samples > 1 all of them, best reconstruction first.
        claims: Its sentences and quotations, where `nla_lens.examine` looked at them.
        trust: Probability that it is right, by the NLA's calibration; None without one.
    """

    TYPES: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "text": (str,),
        "raw_text": (str,),
        "token_ids": (list,),
        "complete": (bool,),
        "norm": NUMBER,
        "cos": (*NUMBER, NoneType),
        "mse_nrm": (*NUMBER, NoneType),
        "fve_nrm": (*NUMBER, NoneType),
        "token": (str, NoneType),
        "token_id": (int, NoneType),
        "position": (int, NoneType),
        "hook_name": (str, NoneType),
        "flags": (list,),
        "samples": (list,),
        "claims": (list,),
        "trust": (*NUMBER, NoneType),
    }
    """What `to_dict` writes."""
    NEEDED: ClassVar[Sequence[str]] = ("text", "raw_text", "token_ids", "complete", "norm")
    """Without these there is no record."""
    columns: ClassVar[Sequence[Column]] = (
        Column("pos", "place", lambda e: e.position),
        Column("token", "token", lambda e: e.token),
        Column("explanation", "text", lambda e: e.text, always=True),
        Column("cos", "number", lambda e: e.cos),
        Column("fve_nrm", "score", lambda e: e.fve_nrm),
        Column("trust", "number", lambda e: e.trust),
        Column("flags", "flags", lambda e: e.flags),
    )
    """What is shown of it."""

    text: str
    raw_text: str
    token_ids: list[int] = field(hash=False)
    complete: bool
    norm: float
    cos: float | None = None
    mse_nrm: float | None = None
    fve_nrm: float | None = None
    token: str | None = None
    token_id: int | None = None
    position: int | None = None
    hook_name: str | None = None
    flags: tuple[str, ...] = ()
    samples: tuple[Explanation, ...] = field(default=(), repr=False)
    claims: tuple[Claim, ...] = field(default=(), repr=False)
    trust: float | None = None

    @property
    def label(self) -> str | None:
        """What stands for it in a line of many; None where nothing is known of its place."""
        return self.token if self.token is not None or self.position is None else "·"

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        about = [repr(self.text)]
        if self.token is not None:
            about.append(f"token={self.token!r}")
        if self.position is not None:
            about.append(f"position={self.position}")
        for name in ("cos", "fve_nrm", "trust"):
            if (score := getattr(self, name)) is not None:
                about.append(f"{name}={score:.3f}")
        if self.flags:
            about.append(f"flags={list(self.flags)}")
        return f"Explanation({', '.join(about)})"

    def with_claims(self, claims: Sequence[Claim]) -> Self:
        """The same, with its claims."""
        return replace(self, claims=tuple(claims))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        as_dict = asdict(self)
        as_dict["flags"] = list(self.flags)
        as_dict["samples"] = [sample.to_dict() for sample in self.samples]
        as_dict["claims"] = [claim.to_dict() for claim in self.claims]
        return as_dict

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown keys are ignored.

        Raises:
            NLAError: A key is missing, or a value is of another type than `to_dict` writes.
        """
        if not isinstance(values, Mapping):
            raise NLAError(f"a record is {values!r:.80}; expected an object")
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name, value in known.items():
            # A truth value is an int to Python, and no position.
            as_number = isinstance(value, bool) and bool not in cls.TYPES[name]
            too_large = isinstance(value, int) and abs(value) > _LARGEST
            if as_number or too_large or not isinstance(value, cls.TYPES[name]):
                expected = " or ".join(kind.__name__ for kind in cls.TYPES[name])
                raise NLAError(f"{name} is {value!r:.80}; expected {expected}")
        if not all(is_int(i) and abs(i) <= _LARGEST for i in known.get("token_ids", ())):
            raise NLAError(f"token_ids is {known['token_ids']!r:.80}; expected integers")
        if not all(isinstance(flag, str) for flag in known.get("flags", ())):
            raise NLAError(f"flags is {known['flags']!r:.80}; expected names")
        if (trust := known.get("trust")) is not None and not 0 <= trust <= 1:
            raise NLAError(f"trust is {trust!r:.80}; expected 0 to 1")
        if missing := [name for name in cls.NEEDED if name not in known]:
            raise NLAError(f"{missing[0]} is missing")
        known["flags"] = tuple(known.get("flags", ()))
        known["samples"] = tuple(cls.from_dict(s) for s in known.get("samples", ()))
        known["claims"] = tuple(Claim.from_dict(c) for c in known.get("claims", ()))
        return cls(**known)

    def _repr_html_(self) -> str:
        return to_html([self], whole_page=False)
