"""Results: one `Explanation` per vector, `Explanations` for many, and how they are stored."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

from nla_lens.errors import NLAError

if TYPE_CHECKING:
    import pandas as pd

_FORMAT: Final = "nla_lens.explanations"
_VERSION: Final = 1
_NUMBER: Final = (float, int)
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "text": (str,),
    "raw_text": (str,),
    "token_ids": (list,),
    "complete": (bool,),
    "norm": _NUMBER,
    "cos": (*_NUMBER, NoneType),
    "mse_nrm": (*_NUMBER, NoneType),
    "fve_nrm": (*_NUMBER, NoneType),
    "token": (str, NoneType),
    "token_id": (int, NoneType),
    "position": (int, NoneType),
    "hook_name": (str, NoneType),
    "flags": (list,),
    "samples": (list,),
}
_NEEDED: Final = ("text", "raw_text", "token_ids", "complete", "norm")
"""What `Explanation.to_dict` writes."""


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
    """

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

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        about = [repr(self.text)]
        if self.token is not None:
            about.append(f"token={self.token!r}")
        if self.position is not None:
            about.append(f"position={self.position}")
        for name in ("cos", "fve_nrm"):
            if (score := getattr(self, name)) is not None:
                about.append(f"{name}={score:.3f}")
        if self.flags:
            about.append(f"flags={list(self.flags)}")
        return f"Explanation({', '.join(about)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        as_dict = asdict(self)
        as_dict["flags"] = list(self.flags)
        as_dict["samples"] = [sample.to_dict() for sample in self.samples]
        return as_dict

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Explanation:
        """The inverse of `to_dict`; unknown keys are ignored.

        Raises:
            NLAError: A key is missing, or a value is of another type than `to_dict` writes.
        """
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name, value in known.items():
            if not isinstance(value, _TYPES[name]):
                expected = " or ".join(kind.__name__ for kind in _TYPES[name])
                raise NLAError(f"{name} is {value!r:.80}; expected {expected}")
        if missing := [name for name in _NEEDED if name not in known]:
            raise NLAError(f"{missing[0]} is missing")
        known["flags"] = tuple(known.get("flags", ()))
        known["samples"] = tuple(cls.from_dict(s) for s in known.get("samples", ()))
        return cls(**known)

    def _repr_html_(self) -> str:
        from nla_lens.results.display import to_html

        return to_html([self], whole_page=False)


class Explanations(Sequence["Explanation | Explanations"]):
    """Explanations in the shape of the vectors' leading axes, indexed like an array.

    >>> explanations.shape
    (2, 9)
    >>> explanations[0, -1]     # the last position of row 0
    >>> explanations[0]         # the whole row: Explanations of shape (9,)
    """

    def __init__(self, items: Iterable[Explanation], shape: Sequence[int] | None = None) -> None:
        """Args:
        items: In row-major order.
        shape: Leading axes; None is one axis.

        Raises:
            NLAError: The shape does not hold as many as there are.
        """
        listed = list(items)
        self.shape: tuple[int, ...] = (len(listed),) if shape is None else tuple(shape)
        if math.prod(self.shape) != len(listed) or not self.shape or min(self.shape) < 0:
            raise NLAError(f"{len(listed)} explanations do not fill the shape {self.shape}")
        self._grid = np.empty(len(listed), dtype=object)
        self._grid[:] = listed
        self._grid = self._grid.reshape(self.shape)

    @property
    def flat(self) -> list[Explanation]:
        """All of them in row-major order."""
        return list(self._grid.ravel())

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> Explanation | Explanations: ...
    @overload
    def __getitem__(self, index: slice) -> Explanations: ...
    @overload
    def __getitem__(self, index: tuple[Any, ...]) -> Explanation | Explanations: ...
    def __getitem__(self, index: Any) -> Explanation | Explanations:
        picked = self._grid[index]
        if isinstance(picked, Explanation):
            return picked
        return Explanations(picked.ravel(), picked.shape)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanations):
            return NotImplemented
        return self.shape == other.shape and self.flat == other.flat

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [f"  {e!r}" for e in self.flat[:8]]
        if len(self.flat) > len(shown):
            shown.append(f"  ... {len(self.flat) - len(shown)} more")
        return "\n".join([f"Explanations of shape {self.shape}:", *shown])

    def _repr_html_(self) -> str:
        from nla_lens.results.display import to_html

        return to_html(self.flat, whole_page=False)

    def to_dict(self) -> dict[str, Any]:
        """`{"shape": [...], "explanations": [...]}`, ready for JSON."""
        return {"shape": list(self.shape), "explanations": [e.to_dict() for e in self.flat]}

    def to_pandas(self) -> pd.DataFrame:
        """One row per explanation; a MultiIndex over the leading axes where there are several.

        Raises:
            NLAError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise NLAError("to_pandas needs pandas: pip install pandas") from error
        columns = [f.name for f in fields(Explanation) if f.name != "samples"]
        rows = [{c: getattr(e, c) for c in columns} for e in self.flat]
        frame = pd.DataFrame(rows, columns=columns)
        if len(self.shape) > 1:
            frame.index = pd.MultiIndex.from_product([range(n) for n in self.shape])
        return frame

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page, everything escaped.

        Returns:
            The file written.
        """
        from nla_lens.results.display import to_html

        path = Path(path)
        with _writing(path):
            path.write_text(
                to_html(self.flat, whole_page=True), encoding="utf-8", errors="backslashreplace"
            )
        return path

    def save(self, path: str | Path) -> Path:
        """Writes JSON lines: a header, then one explanation a line.

        The file appears whole or not at all.
        """
        path = Path(path)
        header = {"format": _FORMAT, "version": _VERSION, "shape": list(self.shape)}
        lines = [header, *(e.to_dict() for e in self.flat)]
        partial = path.with_name(f"{path.name}.partial")
        # Half of a surrogate pair, as from broken bytes, has no UTF-8.
        written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with _writing(path):
            partial.write_text(written, encoding="utf-8", errors="surrogatepass", newline="\n")
            return partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Explanations:
        """Reads what `save` wrote.

        Raises:
            NLAError: Not such a file, or a damaged one; names the file and the line.
        """
        try:
            content = Path(path).read_bytes().decode("utf-8", "surrogatepass")
        except (OSError, UnicodeDecodeError) as error:
            raise NLAError(f"{path} cannot be read: {error}") from error
        # Not splitlines: a text may hold U+2028 and other separators JSON leaves as they are.
        lines, number = content.rstrip("\n").split("\n"), 1
        try:
            header = json.loads(lines[0])
            if header.get("format") != _FORMAT or header.get("version") != _VERSION:
                raise NLAError(f"not written by Explanations.save (version {_VERSION})")
            items = []
            for line in lines[1:]:
                number += 1
                items.append(Explanation.from_dict(json.loads(line)))
            return cls(items, header["shape"])
        # Whatever is in the file: JSON of another kind gives any of these.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise NLAError(f"{path} is damaged at line {number}: {error}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NLAError(f"{path} cannot be written: {error}") from error
