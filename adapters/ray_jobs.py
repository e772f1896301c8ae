"""Long jobs on several machines, by Ray Data: an actor for each worker, which holds the NLA.

```python
from nla_lens.adapters.ray_jobs import explain_corpus

explain_corpus("kitft/nla-qwen2.5-7b-L20", "transcripts/", "store", workers=8, gpus_per_worker=1,
               address="auto")
```

Whoever starts the job reads the input and writes the store, and is the only one who needs the two;
workers are sent documents, a shard's at a time, and send its rows back. A store says itself what is
missing, so the same call goes on wherever a worker, a node or the starting process has died, with
Ray or without. A shard that a worker took with it is made again by another.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nla_lens.adapters.ray_workers import (
    SHARD,
    Loading,
    Worker,
    import_ray,
    load,
    settings_of,
    shards_of,
    task_of,
    unpacked,
)
from nla_lens.checks import is_int, is_number
from nla_lens.errors import NLAError
from nla_lens.jobs.inputs import Source
from nla_lens.jobs.job import Job
from nla_lens.jobs.manifest import about_job
from nla_lens.jobs.positions import Positions
from nla_lens.jobs.running import Made, run_job
from nla_lens.nla import NLA
from nla_lens.results.store import Store

_log = logging.getLogger(__name__)
_FRUITLESS: Final = 3
"""Rounds in which nothing was made: then what is missing takes workers down."""
_PATHS: Final = ("name", "av", "ar", "base")


def explain_corpus(
    nla: NLA | str | Mapping[str, Any],
    source: Source,
    out: str | Path,
    *,
    workers: int = 1,
    gpus_per_worker: float = 0,
    address: str | None = None,
    positions: Positions = "all",
    column: str | None = None,
    model: Any = None,
    vectors: bool = False,
    limit: int | None = None,
    strict: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Store:
    """As `nla_lens.explain_corpus`, on a Ray cluster.

    Args:
        nla: A name, or the arguments of `NLA.from_pretrained`: each worker loads it for itself, on
            its GPUs where it has some, from a path that is there on every node or from the hub. An
            NLA that is loaded already travels as it is.
        source: As in `nla_lens.explain_corpus`; read by this process alone.
        out: The store's folder; written by this process alone.
        workers: How many hold the NLA, wherever there is room.
        gpus_per_worker: GPUs that each has to itself; with several the NLA is spread over them.
        address: The cluster: "auto", "HOST:PORT"; None: the one this process is connected to or
            RAY_ADDRESS names, else one on this machine, which ends with the job.
        positions: As there, and so are the rest.
        column: See there.
        model: See there; a name, or a model that can be pickled.
        vectors: See there.
        limit: See there.
        strict: See there.
        progress: See there.
        **options: Those of `NLA.explain`.

    Returns:
        The store.

    Raises:
        NLAError: As there; or Ray is not installed, cannot be reached, or has no room for a worker.
    """
    _check_workers(workers, gpus_per_worker)
    import_ray()
    loading = _everywhere(nla)
    here = load(loading)
    job = Job.of(
        here,
        source,
        positions=positions,
        column=column,
        model=model,
        limit=limit,
        progress=progress,
        options=options,
        vectors=vectors,
        strict=strict,
    )
    cluster = Cluster(loading, model, workers, gpus_per_worker, address)
    about = about_job(job, positions, column, model)
    return run_job(job, out, about, progress, cluster.make)


def _check_workers(workers: Any, gpus_per_worker: Any) -> None:
    if not is_int(workers) or workers < 1:
        raise NLAError(f"workers={workers!r} must be a positive integer")
    if not is_number(gpus_per_worker) or not 0 <= gpus_per_worker < float("inf"):
        raise NLAError(f"gpus_per_worker={gpus_per_worker!r} must be 0 or more")


def _everywhere(nla: Any) -> Loading:
    """What is loaded, by paths that mean the same in any working directory."""
    if isinstance(nla, NLA):
        return nla
    asked = {"name": nla} if isinstance(nla, (str, Path)) else nla
    if not isinstance(asked, Mapping):
        raise NLAError(f"nla is a {type(nla).__name__}; expected an NLA, a name or arguments")
    return {k: _absolute(v) if k in _PATHS else v for k, v in asked.items()}


def _absolute(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _absolute(v) for k, v in value.items()}
    if isinstance(value, (str, Path)):
        path = Path(value).expanduser()
        # A pair's stem is no folder of its own.
        if any(Path(f"{path}{end}").is_dir() for end in ("", "-av")):
            return str(path.resolve())
    return value


@dataclass(frozen=True)
class Cluster:
    """Where a job is run.

    Attributes:
        loading: What each worker loads.
        model: The source model.
        workers: How many.
        gpus: Of each.
        address: The cluster's.
    """

    loading: Loading
    model: Any
    workers: int
    gpus: float
    address: str | None

    def make(self, job: Job, missing: list[range]) -> Iterator[Made]:
        """Makes rows; see `run_job`. What a worker took with it is made in another round.

        Raises:
            NLAError: The engine failed; or workers die of what is missing.
        """
        ray = import_ray()
        shards = [rows for gap in missing for rows in shards_of(gap, job.rows_per_shard)]
        left = {rows.start: rows for rows in shards}
        fruitless, reason = 0, "no reason was given"
        with _connected(ray, self.address), _quiet(ray):
            self._check_room(ray)
            while left:
                n_before = len(left)
                try:
                    for made in self._round(ray, job, list(left.values())):
                        # What was made is whole: failures are raised.
                        left.pop(made[0][0].number, None)
                        yield from made
                except ray.exceptions.RayError as error:
                    reason = f"{type(error).__name__}: {_last_line(error)}"
                fruitless = fruitless + 1 if len(left) == n_before else 0
                if fruitless == _FRUITLESS:
                    raise NLAError(
                        f"workers died {_FRUITLESS} times before a shard was made, the first of "
                        f"which begins with row {next(iter(left))} ({reason}): look at Ray's logs; "
                        "what was finished is in the store, and the same call goes on with it"
                    )
                if left:
                    _log.warning("workers died: %d shards are made again", len(left))

    def _round(self, ray: Any, job: Job, shards: list[range]) -> Iterator[list[Made]]:
        """What comes of each shard; of one whose worker dies, nothing."""
        import pyarrow as pa

        # One after the other, so that Ray can put them on disk: they are not in memory at once.
        tasks = [ray.put(task_of(job, rows)) for rows in shards]
        tables = [ray.put(pa.table({SHARD: [i]})) for i in range(len(tasks))]
        loading = ray.put(self.loading) if isinstance(self.loading, NLA) else self.loading
        with warnings.catch_warnings():
            # Of the last two arguments, which the extra `ray` ends before they do.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            dataset = ray.data.from_arrow_refs(tables).map_batches(
                Worker,
                fn_constructor_args=(loading, self.model, settings_of(job), self.gpus, tasks),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(shards))),
                num_cpus=1,
                num_gpus=self.gpus,
                # A worker is started again where there is room. What it was at is not kept for it,
                # as that could be never: the others go on, and the next round makes it.
                max_restarts=-1,
                max_task_retries=0,
            )
        for batch in dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            for packed in batch.select(["made", "vectors"]).to_pylist():
                made, failure, later = unpacked(**packed, d_model=job.nla.spec.d_model)
                if failure is not None:
                    yield from [made] if made else []
                    error = NLAError(failure)
                    error.later_rows = later  # type: ignore[attr-defined]
                    raise error
                yield made

    def _check_room(self, ray: Any) -> None:
        has = ray.cluster_resources()
        room = int(has.get("CPU", 0))
        if self.gpus:
            room = min(room, int(has.get("GPU", 0) / self.gpus))
        if not room:
            raise NLAError(
                f"the Ray cluster has no room for a worker with 1 CPU and {self.gpus:g} GPUs: it "
                f"has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
            )
        if room < self.workers:
            _log.warning("the Ray cluster has room for %d of %d workers", room, self.workers)


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """A cluster: the one there is a connection to, or a new one, that ends with this."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    # Of an address that nobody answers at: several kinds.
    except Exception as error:
        raise NLAError(f"Ray cannot be reached at {address or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """No bars of Ray's own, and workers that die cost what they held and no more."""
    context = ray.data.DataContext.get_current()
    wanted = {
        "enable_progress_bars": False,
        "max_errored_blocks": -1,
        "max_consecutive_actor_init_deaths": 2 * _FRUITLESS,
    }
    before = {name: getattr(context, name) for name in wanted if hasattr(context, name)}
    for name in before:
        setattr(context, name, wanted[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _last_line(error: Exception) -> str:
    """What an error of Ray's says, without the traceback in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
