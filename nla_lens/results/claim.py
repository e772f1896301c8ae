"""One claim of an explanation, and what speaks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from nla_lens.errors import NLAError
from nla_lens.results.columns import Column


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
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if not isinstance(known.get("text"), str) or known.get("kind") not in ("sentence", "quote"):
            raise NLAError(f"a claim is {values!r:.80}; expected its text and kind")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)
