"""Explains a corpus into a store, and goes on where an earlier run stopped."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from nla_lens.jobs.inputs import Source
from nla_lens.jobs.job import Job
from nla_lens.jobs.manifest import about_job
from nla_lens.jobs.plan import Row
from nla_lens.jobs.positions import Positions
from nla_lens.nla import NLA
from nla_lens.progress import with_progress
from nla_lens.results.growing_store import GrowingStore
from nla_lens.results.store import Store
from nla_lens.stream.explainer import check_nla

_ROWS_AT_ONCE: Final = 2048
"""Rows whose vectors are in memory: many shards, so that batches rarely run empty."""


def explain_corpus(
    nla: NLA,
    source: Source,
    out: str | Path,
    *,
    positions: Positions = "all",
    column: str | None = None,
    model: Any = None,
    vectors: bool = False,
    limit: int | None = None,
    strict: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Store:
    """Explains a corpus into a store; the same call goes on where an earlier one stopped.

    Ctrl-C, a kill, a full disk or a lost server cost at most the shard in flight. Rows are the same
    however often the job was interrupted: greedy texts do not depend on their batch, and sampled
    ones are seeded by the row's number.

    Args:
        nla: The NLA.
        source: A path or paths (text, JSONL, parquet, safetensors, npy, folders of these); a list
            of texts, chats or dicts; a data frame; vectors `[..., d]`.
        out: The store's folder.
        positions: "all", "last", "every:8", "from:50", "regex:...", "spread:16" (at most 16,
            evenly), "assistant" (what assistants wrote), a function of `jobs.positions.Tokens`; or
            several, one after the other.
        column: Which column is read; None: `text`, else `messages`. The others travel along.
        model: The source model, or a checkpoint's name; None: `spec.source_model`.
        vectors: Keep the vectors beside the rows, as float32 safetensors.
        limit: Only the first so many documents.
        strict: Stop at what cannot be explained, instead of keeping it as a row with its error.
        progress: As in `NLA.explain`.
        **options: Those of `NLA.explain`.

    Returns:
        The store.

    Raises:
        NLAError: The input, an option or the folder will not do, before any model runs; another
            job is writing there, or wrote with other settings (which, is said); or the engine
            failed on the way: then what was finished is in the store.
    """
    check_nla(nla)
    job = Job.of(
        nla,
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
    return run_job(job, out, about_job(job, positions, column, model), progress)


Made: TypeAlias = tuple[Row, dict[str, Any]]
"""A row, and what the store holds of it."""


def run_job(
    job: Job,
    out: str | Path,
    about: Mapping[str, Any],
    progress: bool | None,
    make: Callable[[Job, list[range]], Iterator[Made]] | None = None,
) -> Store:
    """Runs what of a job is missing in a store.

    Args:
        job: The job.
        out: The store's folder.
        about: The settings, as its manifest holds them.
        progress: As in `NLA.explain`.
        make: Makes stretches of rows somewhere else; each in order. None: in this process.
    """
    with begun(job, out, about) as (job, store):
        missing = store.missing()
        n_missing = sum(map(len, missing))
        made = (make or _here)(job, missing) if missing else iter(())
        _write(job, store, with_progress(made, total=n_missing, show=progress))
    return store


def _here(job: Job, missing: list[range]) -> Iterator[Made]:
    return (made for gap in missing for made in _prefetched(job, gap))


@contextlib.contextmanager
def begun(
    job: Job, out: str | Path, about: Mapping[str, Any]
) -> Iterator[tuple[Job, GrowingStore]]:
    """A job and its store, which nobody else writes to meanwhile."""
    user = dict(job.reader.corpus.user.values())
    with GrowingStore.writing(out):
        seed = job.options.seed
        if job.options.temperature > 0 and seed is None:
            # Drawn once, for whoever goes on with the store.
            seed = GrowingStore.seed_of(out)
            job = replace(
                job,
                options=replace(job.options, seed=secrets.randbits(48) if seed is None else seed),
            )
        store = GrowingStore.create(
            out,
            {**about, "seed": job.options.seed},
            n_rows=job.plan.n_rows,
            n_documents=len(job.reader.corpus),
            user=user,
        )
        yield job, store


def _prefetched(job: Job, rows: range) -> Iterator[Made]:
    """Rows as they are made; the next ones are read while these are explained."""
    parts = [rows[i : i + _ROWS_AT_ONCE] for i in range(0, len(rows), _ROWS_AT_ONCE)]
    pool = ThreadPoolExecutor(1, "nla-lens-reader")
    try:
        ahead: Future[list[Row]] = pool.submit(job.reader.read, parts[0], job.plan)
        for following in [*parts[1:], None]:
            read = ahead.result()
            if following is not None:
                ahead = pool.submit(job.reader.read, following, job.plan)
            yield from job.explain(read)
    finally:
        # Not waited for: what was explained is written first.
        pool.shutdown(wait=False, cancel_futures=True)


def _write(job: Job, store: GrowingStore, made: Iterator[Made]) -> None:
    """Writes rows as shards; on the way out, whatever is finished.

    Raises:
        NLAError: As `Job.run`; or the disk is full.
    """
    held: list[Made] = []
    try:
        for row, values in made:
            if held and row.number != held[-1][0].number + 1:
                _flush(job, store, held)
            held.append((row, values))
            if (row.number + 1) % job.rows_per_shard == 0:
                _flush(job, store, held)
        _flush(job, store, held)
    except BaseException as error:
        _flush(job, store, held)
        for later in getattr(error, "later_rows", ()):
            if held and later[0].number != held[-1][0].number + 1:
                _flush(job, store, held)
            held.append(later)
        _flush(job, store, held)
        raise


def _flush(job: Job, store: GrowingStore, held: list[Made]) -> None:
    if not held:
        return
    vectors = (
        torch.stack([_plain(row, job.nla.spec.d_model) for row, _ in held]) if job.vectors else None
    )
    around = [
        {"row": row.number, "before": row.before, "after": row.after}
        for row, _ in held
        if row.before or row.after
    ]
    store.write(held[0][0].number, [values for _, values in held], vectors, around)
    held.clear()


def _plain(row: Row, d_model: int) -> torch.Tensor:
    if row.vector is None:
        return torch.full((d_model,), torch.nan)
    return row.vector.detach().as_subclass(torch.Tensor).float().cpu()
