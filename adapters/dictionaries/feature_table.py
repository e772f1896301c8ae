"""What the AV says of latents: a record each, in JSON lines that a later run goes on with."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

from nla_lens.checks import to_path
from nla_lens.disk.writing import write_whole
from nla_lens.errors import NLAError, NLAWarning
from nla_lens.foreign import to_json
from nla_lens.results.columns import Column
from nla_lens.results.display import to_html, to_table
from nla_lens.results.explanation import NUMBER, Explanation
from nla_lens.results.explanations import Explanations
from nla_lens.results.lines import Format, Growing, growing, read_lines, write_lines
from nla_lens.results.parquet import SUFFIX, is_parquet, read_records, write_records

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class FeatureExplanation(Explanation):
    """What the AV says of one decoder row: an `Explanation` of `sign * row`.

    Attributes:
        index: The latent.
        norm: ||row|| as it is in the dictionary.
        sign: 1, or -1 where the opposite direction was read.
        flags: Those of `nla_lens.results.flags`, `off_distribution`, `unknown_place`.
        distance: Squared distance of the normalised row from the mean residual in units of the
            residuals' own variance: 1 is usual for a residual. None without `mean`.
        shifted_text: The second reading, of the mean residual with the row added to it.
        shifted_cos: Cosine of AR(shifted_text) and that sum.
    """

    TYPES: ClassVar[Mapping[str, tuple[type, ...]]] = {
        **Explanation.TYPES,
        "index": (int,),
        "sign": (int,),
        "distance": (*NUMBER, NoneType),
        "shifted_text": (str, NoneType),
        "shifted_cos": (*NUMBER, NoneType),
    }
    NEEDED: ClassVar[Sequence[str]] = ("index", "text", "norm")
    columns: ClassVar[Sequence[Column]] = (
        Column("latent", "place", lambda e: e.index),
        Column("the AV says", "text", lambda e: e.text, always=True),
        Column("added to the mean", "text", lambda e: e.shifted_text),
        Column("cos", "number", lambda e: e.cos),
        Column("fve_nrm", "score", lambda e: e.fve_nrm),
        Column("flags", "flags", lambda e: e.flags),
    )

    index: int
    # Files of the first releases lack what has a default here.
    raw_text: str = ""
    token_ids: list[int] = field(default_factory=list, hash=False)
    complete: bool = True
    norm: float
    sign: int = 1
    distance: float | None = None
    shifted_text: str | None = None
    shifted_cos: float | None = None

    @property
    def label(self) -> str:
        """See `Explanation`."""
        return f"latent {self.index}"


class FeatureExplanations(Explanations):
    """Explanations of latents, in the order they were asked for."""

    LINES: ClassVar[Format] = Format("nla_lens.features", 1)
    RECORD: ClassVar[type[Explanation]] = FeatureExplanation

    def __init__(self, items: Iterable[FeatureExplanation], shape: Sequence[int] | None = None):
        """Args:
        items: In the order they are shown.
        shape: As in `Explanations`.
        """
        super().__init__(items, shape)

    @property
    def flat(self) -> list[Any]:
        """All of them, in order."""
        return super().flat

    def __repr__(self) -> str:
        lines = [f"{e.index}: {e.text!r}" for e in self.flat[:5]]
        more = f", ... {len(self) - 5} more" if len(self) > 5 else ""
        return f"FeatureExplanations({', '.join(lines)}{more})"

    def _repr_html_(self) -> str:
        return to_html(self.flat, whole_page=False)

    def _page(self) -> str:
        # Latents stand in no text: a table says more.
        return to_html(self.flat, whole_page=True)

    def to_dict(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Plain values, ready for JSON."""
        return [e.to_dict() for e in self.flat]

    def to_pandas(self) -> pd.DataFrame:
        """A table, indexed by latent."""
        return super().to_pandas().set_index("index")

    def to_table(self, *, title: str | None = None) -> Table:
        """A table for terminals and notebooks."""
        return to_table(self.flat, title=title)

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
            for e in self.flat
        ]
        return write_whole(path, "".join(to_json(line) + "\n" for line in lines))

    def save(self, path: str | Path) -> Path:
        """Writes a store's rows by the suffix `.parquet`, else JSON lines; `load` reads both."""
        write = write_records if to_path(path).suffix == SUFFIX else write_lines
        return write(path, self.LINES, {"about": {}}, self.flat)

    @classmethod
    def load(cls, path: str | Path) -> FeatureExplanations:
        """Reads what `save` or `explain_features(store=...)` wrote, by its content.

        Raises:
            NLAError: No such file, or a damaged one.
        """
        path = to_path(path)
        if is_parquet(path):
            return cls(read_records(path, cls.LINES, cls.RECORD)[1])
        return cls(FeatureStore(path).finished.values())


class FeatureStore:
    """Latents finished so far, in a file of JSON lines that grows by a line a latent.

    Not a store of parquet shards: those are many rows each, and latents are asked for in any choice
    and order, each of them minutes of a large model that a kill must not cost.

    Attributes:
        path: The file.
        finished: What is in it, by latent.
        about: What the header says it was made with.
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line that was cut short is taken as not written.

        A damaged line is left out with an `NLAWarning`: its latent counts as not explained.

        Raises:
            NLAError: No such file, or another one's header.
        """
        self.path = path
        self._file: Growing | None = None
        lost: list[NLAError] = []
        header, records = read_lines(
            path,
            FeatureExplanations.LINES,
            FeatureExplanation.from_dict,
            keep_torn=False,
            lost=lost.append,
        )
        about = header.get("about")
        if not isinstance(about, dict):
            raise NLAError(f"{path} does not say what it was made with")
        self.about: dict[str, Any] = about
        self.finished = {record.index: record for record in records}
        if lost:
            more = f" (and {len(lost) - 1} more lines)" if len(lost) > 1 else ""
            warnings.warn(f"{lost[0]}{more}: left out", NLAWarning, stacklevel=3)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | Path, about: Mapping[str, Any]) -> Iterator[FeatureStore]:
        """Goes on with a store, or begins one; nobody else writes to it meanwhile.

        Raises:
            NLAError: The store was made with something else (names what differs), or is being
                written.
        """
        path = to_path(path)
        due = json.loads(json.dumps(dict(about)))
        with growing(path, FeatureExplanations.LINES, {"about": due}) as file:
            store = cls(path)
            differs = sorted(k for k in {*due, *store.about} if due.get(k) != store.about.get(k))
            if differs:
                key = differs[0]
                raise NLAError(
                    f"{path} was made with {key}={store.about.get(key)!r}, not {due.get(key)!r}; "
                    "name another file"
                )
            store._file = file
            yield store

    def append(self, found: FeatureExplanation) -> None:
        """Adds a latent, written before the next one is begun.

        Raises:
            NLAError: It cannot be written, or the store is not open.
        """
        if self._file is None:
            raise NLAError(f"{self.path} is not open for writing; use FeatureStore.open")
        self._file.append(found)
        self.finished[found.index] = found
