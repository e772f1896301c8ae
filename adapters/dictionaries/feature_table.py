"""What the AV says of latents: one line each, kept in JSON lines that a later run goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from nla_lens.errors import NLAError
from nla_lens.results.explanation import Explanation

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_FORMAT: Final = "nla_lens.features"
_VERSION: Final = 1


@dataclass(frozen=True)
class FeatureExplanation:
    """What the AV says of one decoder row.

    Attributes:
        index: The latent.
        text: The AV's text for `sign * row`.
        cos: Cosine of AR(text) and `sign * row`; None without a reconstructor.
        fve_nrm: The same as a share of the residuals' variance.
        norm: ||row|| as it is in the dictionary.
        sign: 1, or -1 where the opposite direction was read.
        complete: The closing tag was reached.
        flags: Those of `nla_lens.results.flags`, `off_distribution`, `unknown_place`.
        distance: Squared distance of the normalised row from the mean residual in units of the
            residuals' own variance: 1 is usual for a residual. None without `mean`.
        shifted_text: The second reading, of the mean residual with the row added to it.
        shifted_cos: Cosine of AR(shifted_text) and that sum.
    """

    index: int
    text: str
    norm: float
    cos: float | None = None
    fve_nrm: float | None = None
    sign: int = 1
    complete: bool = True
    flags: tuple[str, ...] = ()
    distance: float | None = None
    shifted_text: str | None = None
    shifted_cos: float | None = None

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "flags": list(self.flags)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureExplanation:
        """The inverse of `to_dict`; unknown keys are ignored."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**{**known, "flags": tuple(known.get("flags", ()))})

    def as_explanation(self) -> Explanation:
        """The same as an `Explanation`, the latent in the token's place, to be shown as one."""
        return Explanation(
            text=self.text,
            raw_text=self.text,
            token_ids=[],
            complete=self.complete,
            norm=self.norm,
            cos=self.cos,
            fve_nrm=self.fve_nrm,
            token=f"latent {self.index}",
            position=self.index,
            flags=self.flags,
        )


class FeatureExplanations(Sequence["FeatureExplanation"]):
    """Explanations of latents, in the order they were asked for."""

    def __init__(self, items: Iterable[FeatureExplanation]) -> None:
        """Args:
        items: In the order they are shown.
        """
        self.items = tuple(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        found = self.items[index]
        return FeatureExplanations(found) if isinstance(index, slice) else found

    def __iter__(self) -> Iterator[FeatureExplanation]:
        return iter(self.items)

    def __repr__(self) -> str:
        lines = [f"{e.index}: {e.text!r}" for e in self.items[:5]]
        more = f", ... {len(self) - 5} more" if len(self) > 5 else ""
        return f"FeatureExplanations({', '.join(lines)}{more})"

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain values, ready for JSON."""
        return [e.to_dict() for e in self.items]

    def to_pandas(self) -> pd.DataFrame:
        """A table, indexed by latent."""
        import pandas as pd

        columns = [f.name for f in fields(FeatureExplanation)]
        return pd.DataFrame(self.to_dict(), columns=columns).set_index("index")

    def to_table(self, *, title: str | None = None) -> Table:
        """A table for terminals and notebooks."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        shifted = any(e.shifted_text is not None for e in self.items)
        table.add_column("latent", justify="right", style="bold cyan")
        table.add_column("the AV says", ratio=1, overflow="fold")
        if shifted:
            table.add_column("added to the mean", ratio=1, overflow="fold")
        table.add_column("cos", justify="right")
        table.add_column("flags", style="yellow")
        for e in self.items:
            texts = [Text(e.text)] + ([Text(e.shifted_text or "")] if shifted else [])
            cos = "–" if e.cos is None else f"{e.cos:.2f}"
            table.add_row(str(e.index), *texts, cos, Text(" ".join(e.flags)))
        return table

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page, everything escaped.

        Returns:
            The file written.
        """
        from nla_lens.results.display import to_html

        path = Path(path)
        page = to_html([e.as_explanation() for e in self.items], whole_page=True)
        path.write_text(page, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        from nla_lens.results.display import to_html

        return to_html([e.as_explanation() for e in self.items], whole_page=False)

    def to_neuronpedia(
        self,
        path: str | Path,
        *,
        model_id: str,
        source_id: str,
        explainer: str = "nla",
        type_name: str = "nla_decoder-row",
    ) -> Path:
        """Writes explanations as JSON lines in the layout of Neuronpedia's data sets.

        The layout is that of `v1/<model>/<source>/explanations/batch-*.jsonl.gz`, as
        `neuronpedia_utils` writes them (hijohnnylin/neuronpedia, `batch-autointerp.py`); ids and
        authors are left to the import.

        Args:
            path: The file.
            model_id: Neuronpedia's name of the model, for instance `gpt2-small`.
            source_id: Its name of the dictionary, for instance `6-res-jb`.
            explainer: What wrote the texts.
            type_name: How.

        Returns:
            The file written.
        """
        path = Path(path)
        lines = [
            {
                "modelId": model_id,
                "layer": source_id,
                "index": str(e.index),
                # One line each, as theirs are.
                "description": " ".join(e.text.split()),
                "typeName": type_name,
                "explanationModelName": explainer,
            }
            for e in self.items
        ]
        path.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
            encoding="utf-8",
        )
        return path

    def save(self, path: str | Path) -> Path:
        """Writes JSON lines, a header and then a latent a line; `load` reads them."""
        path = Path(path)
        lines = [_header({}), *map(json_line, self.items)]
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(lines), encoding="utf-8")
        return partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> FeatureExplanations:
        """Reads what `save` or a store wrote.

        Raises:
            NLAError: No such file, or a damaged one.
        """
        return cls(FeatureStore(Path(path)).finished.values())


class FeatureStore:
    """Latents finished so far, in a file of JSON lines that grows by a line a latent.

    Attributes:
        path: The file.
        finished: What is in it, by latent.
        about: What the header says it was made with.
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line that was cut short is taken as not written.

        Raises:
            NLAError: No such file, or a damaged one.
        """
        self.path = path
        self.finished: dict[int, FeatureExplanation] = {}
        try:
            held = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise NLAError(f"{path} cannot be read: {error}") from error
        # Not splitlines: a text may hold U+2028, which JSON leaves as it is.
        lines, self._torn = held.split("\n")[:-1], held.rpartition("\n")[2]
        try:
            header = json.loads(lines[0])
            if header["format"] != _FORMAT or header["version"] != _VERSION:
                raise ValueError(f"not {_FORMAT} version {_VERSION}")
            self.about: dict[str, Any] = header["about"]
            for line in lines[1:]:
                found = FeatureExplanation.from_dict(json.loads(line))
                self.finished[found.index] = found
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise NLAError(f"{path} is no store of explained latents: {error}") from error

    @classmethod
    def open(cls, path: str | Path, about: Mapping[str, Any]) -> FeatureStore:
        """Goes on with a store, or begins one.

        Raises:
            NLAError: The store was made with something else; names what differs.
        """
        path = Path(path)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_header(about), encoding="utf-8")
        store = cls(path)
        due = json.loads(json.dumps(dict(about)))
        differs = sorted(k for k in {*due, *store.about} if due.get(k) != store.about.get(k))
        if differs:
            key = differs[0]
            raise NLAError(
                f"{path} was made with {key}={store.about.get(key)!r}, not {due.get(key)!r}; name "
                "another file"
            )
        if store._torn:
            whole = path.read_bytes()
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        return store

    def append(self, file: TextIO, found: FeatureExplanation) -> None:
        """Adds a latent, on disk before the next one is begun."""
        self.finished[found.index] = found
        file.write(json_line(found))
        file.flush()


def json_line(found: FeatureExplanation) -> str:
    """One latent as a line of JSON."""
    return json.dumps(found.to_dict(), ensure_ascii=False) + "\n"


def _header(about: Mapping[str, Any]) -> str:
    return json.dumps({"format": _FORMAT, "version": _VERSION, "about": dict(about)}) + "\n"
