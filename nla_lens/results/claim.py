"""One claim of an explanation, and what speaks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Any, ClassVar, Final, Literal

from nla_lens.checks import is_number
from nla_lens.errors import NLAError
from nla_lens.results.columns import Column

_LARGEST: Final = 1e12


@dataclass(frozen=True)
class Claim:
    """A sentence, or a quotation in one.

    Attributes:
        text: As it stands in the explanation; of a quotation without its marks.
        kind: "sentence" or "quote".
        support: Fall of fve_nrm (of cos where var_nrm is not known) without it; None if unknown.
        in_context: Of a quotation: whether it stands in the text read so far; None if unknown.
        agreement: Share of further samples that say it too, in [0, 1]; None without samples.
    """

    text: str
    kind: Literal["sentence", "quote"]
    support: float | None = None
    in_context: bool | None = None
    agreement: float | None = None

    columns: ClassVar[Sequence[Column]] = (
        Column("kind", "plain", lambda c: c.kind),
        Column("claim", "text", lambda c: c.text, always=True),
        Column("support", "number", lambda c: c.support),
        Column(
            "in the text", "verdict", lambda c: {True: "yes", False: "not there"}.get(c.in_context)
        ),
        Column("agreement", "number", lambda c: c.agreement),
    )
    position: ClassVar[None] = None
    label: ClassVar[None] = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Claim:
        """The inverse of `to_dict`.

        Raises:
            NLAError: Not what it writes.
        """
        if not isinstance(values, Mapping):
            raise NLAError(f"a claim is {values!r:.80}; expected an object")
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if not isinstance(known.get("text"), str) or known.get("kind") not in ("sentence", "quote"):
            raise NLAError(f"a claim is {values!r:.80}; expected its text and kind")
        for name in ("support", "agreement"):
            number = known.get(name)
            if number is not None and not (is_number(number) and not abs(number) > _LARGEST):
                raise NLAError(f"{name} of a claim is {number!r:.80}; expected a number or null")
        if not isinstance(known.get("in_context"), (bool, NoneType)):
            found = known["in_context"]
            raise NLAError(f"in_context of a claim is {found!r:.80}; expected true, false or null")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)
