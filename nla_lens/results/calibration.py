"""How far to trust an explanation: a probability from what is known of it, fitted beforehand.

The model is a sum of curves, one a feature, given by points: plain numbers that can be read, and
used without the library that fitted them. `nla_lens.calibrate` makes one; it lies beside a
checkpoint as `nla_calibration.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nla_lens.checkpoints.layout import CALIBRATION_NAME
from nla_lens.checks import is_int, is_number, naming, to_path
from nla_lens.disk.reading import read_json
from nla_lens.disk.writing import make_folder, write_whole
from nla_lens.errors import NLAError
from nla_lens.results.calibration_page import draw, lines, page
from nla_lens.results.curve import LARGEST, Curve, finite, read_curve
from nla_lens.results.evidence import SCORES, Record, evidence

if TYPE_CHECKING:
    from nla_lens.results.explanation import Explanation

FORMAT: Final = "nla_lens.calibration"
VERSION: Final = 1
_MOST_BYTES: Final = 1 << 20
_SAME: Final = 0.02
"""Numbers of a checkpoint that differ by less, relatively, are the same in another dtype."""
MEASURES: Final = ("auroc", "ece", "brier")


@dataclass(frozen=True)
class Calibration:
    """The probability that an explanation is right, fitted where errors are known.

    Attributes:
        curves: One a feature.
        intercept: Log odds to which they are added.
        least: The score and the value of it below which an explanation is likelier wrong than
            right: where flag `low_fidelity` begins; None where there is no such value.
        nla: What it belongs to; None: fitted on a table of which that is not known.
        fitted_on: Rows, documents, errors, labels.
        held_out: What was measured on documents it was not fitted on.
    """

    curves: tuple[Curve, ...]
    intercept: float
    least: tuple[str, float] | None = None
    nla: Mapping[str, Any] | None = field(default=None, hash=False)
    fitted_on: Mapping[str, Any] = field(default_factory=dict, hash=False)
    held_out: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features it looks at."""
        return tuple(curve.name for curve in self.curves)

    @property
    def auroc(self) -> float:
        """How well trust tells right from wrong on other documents; 0.5 is chance."""
        return float(self.held_out["auroc"])

    @property
    def ece(self) -> float:
        """Mean distance of trust and share that is right, over 10 bins, on other documents."""
        return float(self.held_out["ece"])

    @property
    def brier(self) -> float:
        """Mean squared distance of trust and 1 (right) or 0 (wrong), on other documents."""
        return float(self.held_out["brier"])

    def trust(self, explanation: Explanation) -> float | None:
        """The probability that an explanation is right; None without the score it looks at."""
        return self.trust_all([vars(explanation)])[0]

    def trust_all(self, records: Sequence[Record]) -> list[float | None]:
        """The same of many, as fields or rows of a table."""
        if not records:
            return []
        found = [evidence(record, self.features) for record in records]
        columns = {
            name: np.asarray([np.nan if f[name] is None else f[name] for f in found])
            for name in self.features
        }
        scores = [name for name in self.features if name in SCORES]
        return [
            None if any(f[name] is None for name in scores) else float(trust)
            for f, trust in zip(found, self.predict(columns), strict=True)
        ]

    def predict(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """`[n]` probabilities of features `[n]`, by name; NaN is not known."""
        odds_N = self.intercept + sum(curve(columns[curve.name]) for curve in self.curves)
        return 1 / (1 + np.exp(-np.clip(odds_N, -500, 500)))

    # --- files ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "nla": None if self.nla is None else dict(self.nla),
            "fitted_on": dict(self.fitted_on),
            "held_out": dict(self.held_out),
            "low_fidelity": self.least and {"score": self.least[0], "below": self.least[1]},
            "intercept": self.intercept,
            "features": [
                {"name": c.name, "at": list(c.at), "adds": list(c.adds), "unknown": c.unknown}
                for c in self.curves
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Writes it: a name that ends in `.json` is the file, any other the folder it goes into.

        Returns:
            The file.
        """
        path = calibration_path(path)
        make_folder(path.parent)
        return write_whole(path, json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            NLAError: No such file, damaged, or made by a later version; names the file.
        """
        path = calibration_path(path)
        values = read_json(path, most_bytes=_MOST_BYTES)
        with naming(path):
            return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_dict`.

        Raises:
            NLAError: Something else, or features that this version does not know.
        """
        if not isinstance(values, Mapping):
            raise NLAError(
                f"a calibration is {values!r:.80}; expected an object, as to_dict gives it"
            )
        if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise NLAError(f"this is not {FORMAT} version {VERSION}")
        listed = values.get("features")
        if not isinstance(listed, list) or not listed:
            raise NLAError("features must be a list of at least one")
        curves = tuple(read_curve(entry) for entry in listed)
        names = [curve.name for curve in curves]
        if len(set(names)) < len(names) or not set(names) & set(SCORES):
            raise NLAError(f"features are {names}; each once, and one of {', '.join(SCORES)}")
        parts = {name: values.get(name) for name in ("fitted_on", "held_out")}
        for name, part in parts.items():
            if not isinstance(part, Mapping) or not _is_plain(part):
                raise NLAError(f"{name} must be an object of numbers and texts")
        held_out = parts["held_out"] or {}
        for name in MEASURES:
            if not (is_number(held_out.get(name)) and 0 <= held_out[name] <= 1):
                raise NLAError(f"held_out.{name} is {held_out.get(name)!r:.80}; expected 0 to 1")
        nla = values.get("nla")
        if nla is not None and not (isinstance(nla, Mapping) and _is_plain(nla)):
            raise NLAError("nla must be an object, or null")
        return cls(
            curves,
            finite(values.get("intercept"), "intercept"),
            _least(values.get("low_fidelity")),
            nla,
            parts["fitted_on"] or {},
            held_out,
        )

    def check_fits(self, nla: Mapping[str, Any]) -> None:
        """Refuses a calibration that was fitted on another NLA.

        Args:
            nla: What the other says of itself.

        Raises:
            NLAError: Names what differs.
        """
        for name, here in nla.items():
            there = None if self.nla is None else self.nla.get(name)
            if there is not None and not _same(here, there):
                raise NLAError(
                    f"this calibration was fitted on another NLA: {name} is {there!r:.100} there, "
                    f"{here!r:.100} here; fit one with nla_lens.calibrate"
                )

    # --- shown ------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return "\n  ".join(lines(self.to_dict()))

    def _repr_html_(self) -> str:
        return page(self.to_dict(), whole_page=False)

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page with both curves, everything escaped."""
        return write_whole(path, page(self.to_dict(), whole_page=True))

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws `reliability.png` and `risk_coverage.png`.

        Raises:
            NLAError: matplotlib (extra `plots`) is not installed.
        """
        return draw(self.to_dict(), make_folder(folder))


def calibration_path(path: str | Path) -> Path:
    """The file that is meant: itself, or the one in a folder."""
    path = to_path(path)
    return path if path.suffix == ".json" else path / CALIBRATION_NAME


def _least(entry: Any) -> tuple[str, float] | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or entry.get("score") not in ("fve_nrm", "cos"):
        raise NLAError('low_fidelity must be {"score": "fve_nrm" or "cos", "below": NUMBER}')
    return entry["score"], finite(entry.get("below"), "low_fidelity")


def _is_plain(value: Any) -> bool:
    """Whether it is made of objects, lists, texts and finite numbers."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return (
        value is None or isinstance(value, (str, bool)) or (is_int(value) and abs(value) <= LARGEST)
    )


def _same(here: Any, there: Any) -> bool:
    if isinstance(here, (list, tuple)) and isinstance(there, (list, tuple)):
        return len(here) == len(there) and all(map(_same, here, there))
    if is_number(here) and is_number(there):
        return math.isclose(here, there, rel_tol=_SAME, abs_tol=1e-5)
    return bool(here == there)
