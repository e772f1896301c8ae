"""`nla-lens explain-file FILE... --out STORE`: a corpus into a store, resumable."""

from __future__ import annotations

import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_lens.cli.command import Command
from nla_lens.cli.options import halves_options, load_nla, loading, loading_options
from nla_lens.errors import NLAError
from nla_lens.plugins import load_plugin

if TYPE_CHECKING:
    from nla_lens.jobs.job import Job
    from nla_lens.results.store import Store

_SAMPLED_ROWS = 16
"""Rows that --dry-run explains, to tell how long all of them would take."""


@click.command(
    "explain-file",
    cls=Command,
    short_help="Explain FILES into a store; goes on where it stopped.",
    examples=[
        "nla-lens explain-file notes.txt --out notes",
        "nla-lens explain-file texts/ --out texts-store --positions last --dry-run",
        "nla-lens explain-file chats.jsonl --out chats --positions assistant --limit 100",
    ],
)
@click.argument("files", nargs=-1, required=True)
@click.option("--out", required=True, help="The store's folder; an unfinished one is gone on with.")
@click.option(
    "--positions",
    multiple=True,
    default=["all"],
    show_default=True,
    help="Which tokens: all, last, every:N, from:N, spread:N, regex:PATTERN, assistant; several "
    "apply one after the other.",
)
@click.option("--column", help="Which column is read; default: text, else messages.")
@click.option("--model", help="Source model: directory or hub repository; default: the NLA's own.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N documents.")
@click.option("--vectors", is_flag=True, help="Keep the vectors beside the rows.")
@click.option("--strict", is_flag=True, help="Stop at the first row that cannot be explained.")
@click.option("--dry-run", is_flag=True, help="Say how much there is and about how long it takes.")
@click.option("--max-new-tokens", default=200, show_default=True, help="Longest explanation.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is argmax.")
@click.option("--num-samples", default=1, show_default=True, help="Best of N; needs a temperature.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--batch-size", type=int, help="Most vectors at once; default: from free memory.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    callback=lambda context, param, value: _check_address(value),
    help="Run it on a Ray cluster: --ray=auto or --ray=HOST:PORT; --ray alone: the one of "
    "RAY_ADDRESS, or on this machine.",
)
@click.option("--workers", type=click.IntRange(min=1), help="With --ray: how many hold the NLA.")
@click.option("--gpus-per-worker", type=float, help="With --ray: GPUs that each has to itself.")
@halves_options
@loading_options
@click.pass_context
def explain_file(
    context: click.Context,
    /,
    files: tuple[str, ...],
    out: str,
    positions: tuple[str, ...],
    column: str | None,
    model: str | None,
    limit: int | None,
    vectors: bool,
    strict: bool,
    dry_run: bool,
    ray: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
    **options: Any,
) -> None:
    """Explain the tokens of FILES into a store that pandas, polars, duckdb and datasets read.

    FILES: text, JSON lines and parquet (a `text` or `messages` column; the others travel along),
    vectors (safetensors, npy, or a `vector` column), or folders of these. The same command goes on
    where an earlier one was stopped, by whatever. Exit status 1 if rows could not be explained.
    """
    from nla_lens.jobs.job import Job
    from nla_lens.jobs.manifest import about_job
    from nla_lens.jobs.running import run_job

    wished = {name: options.pop(name) for name in _EXPLAIN_OPTIONS}
    _check_files(files)
    if ray is None and (workers or gpus_per_worker):
        raise NLAError("--workers and --gpus-per-worker need --ray")
    source = [Path(file) for file in files]
    given: dict[str, Any] = {"column": column, "model": model, "limit": limit}
    given |= {"positions": list(positions), "vectors": vectors, "strict": strict}
    if ray is not None and not dry_run:
        where: dict[str, Any] = {"workers": workers or 1, "gpus_per_worker": gpus_per_worker or 0}
        where |= {"address": ray or None}
        store = _on_ray()(loading(**options), source, out, **where, **given, **wished)
    else:
        job = Job.of(load_nla(**options), source, options=wished, **given)
        if dry_run:
            click.echo(_estimate(job))
            return
        store = run_job(job, out, about_job(job, list(positions), column, model), None)
    click.echo(_summary(store))
    if store.n_failed:
        context.exit(1)


_EXPLAIN_OPTIONS = ("max_new_tokens", "temperature", "num_samples", "seed", "batch_size")


def _check_address(address: str | None) -> str | None:
    """An address may be left out, and then a file is taken for it."""
    if address and Path(address).expanduser().exists():
        raise click.BadParameter(
            f"takes {address} for an address: write --ray=auto, or another option behind --ray"
        )
    return address


def _on_ray() -> Any:
    """The adapter's `explain_corpus`."""
    for entry in entry_points(group="nla_lens.jobs", name="ray"):
        return load_plugin(entry)
    raise NLAError("nla-lens is installed without its entry point `ray`: install it again")


def _check_files(files: tuple[str, ...]) -> None:
    """Before any model is loaded."""
    for file in files:
        if not Path(file).expanduser().exists():
            raise NLAError(f"{file} is not there")


def _estimate(job: Job) -> str:
    plan, n = job.plan, min(job.plan.n_rows, _SAMPLED_ROWS)
    start = time.perf_counter()
    done = sum(1 for _ in job.run(range(n)))
    seconds = (time.perf_counter() - start) / done * plan.n_rows
    tokens = f", {plan.n_tokens} tokens" if plan.n_tokens else ""
    failed = f", {plan.n_failed} of them cannot be explained" if plan.n_failed else ""
    return (
        f"{len(job.reader.corpus)} documents{failed}{tokens}, {plan.n_rows} vectors to explain: "
        f"about {_duration(seconds)} (from {done} of them)"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _summary(store: Store) -> str:
    failed = f"; {store.n_failed} could not be explained (column error)" if store.n_failed else ""
    return f"{len(store)} rows of {store.manifest['n_documents']} documents in {store.path}{failed}"
