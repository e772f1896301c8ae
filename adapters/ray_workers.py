"""What a worker of a job on Ray holds and does; see `ray_jobs`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nla_lens.errors import NLAError
from nla_lens.halves.options import Options
from nla_lens.jobs.corpus import Excerpt
from nla_lens.jobs.job import Job
from nla_lens.jobs.manifest import about_nla
from nla_lens.jobs.plan import Plan, Row
from nla_lens.jobs.positions import Picker
from nla_lens.jobs.reading import Reader
from nla_lens.jobs.running import Made
from nla_lens.nla import NLA

SHARD: Final = "shard"
"""Column of the tables that go to workers: which of the tasks."""
Loading: TypeAlias = NLA | Mapping[str, Any]
"""An NLA, or the arguments of `NLA.from_pretrained`."""


def import_ray() -> Any:
    """Ray, with Ray Data.

    Raises:
        NLAError: It is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise NLAError("jobs on Ray need Ray Data: pip install 'nla-lens[ray]'") from error
    return ray


def load(loading: Loading, gpus: float = 0) -> NLA:
    """The NLA, on the GPUs that a worker has to itself."""
    if isinstance(loading, NLA):
        return loading
    asked = dict(loading)
    if gpus and not any(asked.get(name) for name in ("device", "device_map")):
        asked.update({"device_map": "auto"} if gpus > 1 else {"device": "cuda"})
    return NLA.from_pretrained(**asked)


@dataclass(frozen=True)
class Task:
    """A stretch of rows, with all that a worker needs for it."""

    rows: range
    documents: Excerpt
    plan: Plan


@dataclass(frozen=True)
class Settings:
    """What is the same for all rows; `nla` says what each worker must hold."""

    picker: Picker
    options: Options
    vectors: bool
    strict: bool
    rows_per_shard: int
    nla: Mapping[str, Any]


class Worker:
    """An actor of Ray Data: loads the NLA once, and makes the rows it is sent."""

    def __init__(
        self, loading: Any, model: Any, settings: Settings, gpus: float, tasks: Sequence[Any]
    ) -> None:
        """See `ray_jobs.Cluster`; what is loaded may be a reference to it, and tasks are."""
        ray = import_ray()
        self._settings, self._model, self._tasks = settings, model, tasks
        self._nla = load(ray.get(loading) if isinstance(loading, ray.ObjectRef) else loading, gpus)
        self._source: Any = None
        self._other = _difference(about_nla(self._nla), settings.nla)

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        """A row that names a `Task` becomes one that holds what was made of it."""
        get = import_ray().get
        vectors = self._settings.vectors
        made = [
            packed(*self._made(get(self._tasks[i])), vectors=vectors)
            for i in batch[SHARD].to_pylist()
        ]
        return {name: [one[name] for one in made] for name in made[0]}

    def _made(self, task: Task) -> tuple[list[Made], str | None, list[Made]]:
        """Rows in order, what ended them too early, and what was finished behind that."""
        made: list[Made] = []
        try:
            if self._other:
                raise NLAError(self._other)
            job = self._job(task)
            for row, values in job.explain(job.reader.read(task.rows, job.plan)):
                made.append((row, values))
        except Exception as error:
            later = list(getattr(error, "later_rows", ()))
            said = "" if isinstance(error, NLAError) else f"{type(error).__name__}: "
            return made, f"{said}{error}" or "it failed", later
        return made, None, []

    def _job(self, task: Task) -> Job:
        settings = self._settings
        if self._source is None and not task.documents.is_vectors:
            self._source = self._nla.open_source(self._model)
        reader = Reader(task.documents, settings.picker, self._nla.spec, self._source)
        return Job(
            self._nla,
            reader,
            task.plan,
            settings.options,
            settings.vectors,
            settings.strict,
            settings.rows_per_shard,
        )


def packed(
    made: list[Made], failure: str | None, later: list[Made], *, vectors: bool
) -> dict[str, Any]:
    """What a worker made, as a row of a table: JSON, and the vectors where they are kept."""
    rows = [*made, *later]
    said = [
        {
            "row": {name: getattr(row, name) for name in _OF_A_ROW},
            "has_vector": vectors and row.vector is not None,
            "values": values,
        }
        for row, values in rows
    ]
    kept = [_plain(row.vector) for row, _ in rows if vectors and row.vector is not None]
    return {
        "made": json.dumps({"rows": said, "n": len(made), "failure": failure}),
        "vectors": np.concatenate(kept).tobytes() if kept else b"",
    }


def unpacked(made: str, vectors: bytes, d_model: int) -> tuple[list[Made], str | None, list[Made]]:
    """The inverse of `packed`."""
    found = json.loads(made)
    flat = torch.from_numpy(np.frombuffer(vectors, dtype=np.float32).copy())
    each = iter(flat.reshape(-1, d_model))
    rows = [
        (Row(**one["row"], vector=next(each) if one["has_vector"] else None), one["values"])
        for one in found["rows"]
    ]
    return rows[: found["n"]], found["failure"], rows[found["n"] :]


_OF_A_ROW: Final = ("number", "document", "error", "before", "after")


def _plain(vector: Tensor) -> np.ndarray[Any, Any]:
    """`[d]` float32, without what is known of it."""
    plain: Tensor = vector.detach().as_subclass(Tensor).float().cpu()
    found: np.ndarray[Any, Any] = plain.numpy()
    return found


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    differs = sorted(key for key in here if here[key] != there.get(key))
    if not differs:
        return ""
    return (
        f"a worker loaded another NLA than the process that began the job ({differs[0]} differs): "
        "the same checkpoint must be there on every node"
    )


def settings_of(job: Job) -> Settings:
    """What is the same for all rows of a job."""
    return Settings(
        job.reader.picker,
        job.options,
        job.vectors,
        job.strict,
        job.rows_per_shard,
        about_nla(job.nla),
    )


def task_of(job: Job, rows: range) -> Task:
    """Some rows of a job, with their documents."""
    numbers = job.plan.documents(rows)
    return Task(rows, Excerpt(job.reader.corpus, numbers), job.plan.of(numbers))


def shards_of(rows: range, most: int) -> Iterator[range]:
    """A stretch of rows, cut where shards end."""
    first = rows.start
    while first < rows.stop:
        last = min((first // most + 1) * most, rows.stop)
        yield range(first, last)
        first = last
