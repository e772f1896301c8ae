"""A run as its caller sees it: a bar or a table beside it, and what was finished is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nla_lens.halves.explaining import explain_batch
from nla_lens.halves.options import Options
from nla_lens.halves.reconstructor import Reconstructor
from nla_lens.halves.verbalizer import Verbalizer
from nla_lens.progress import is_watched, with_progress
from nla_lens.results.calibration import Calibration
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations
from nla_lens.results.live import filling, written_live
from nla_lens.stream.vectors import VectorBatch


def run(
    verbalizer: Verbalizer,
    reconstructor: Reconstructor | None,
    calibration: Calibration | None,
    batch: VectorBatch,
    options: Options,
    *,
    table: bool = False,
    stream: bool = False,
    live: bool = False,
) -> Iterator[Explanation]:
    """Yields explanations in input order; see `explain_batch`.

    Args:
        verbalizer: Writes the texts.
        reconstructor: Scores them; None: nothing does.
        calibration: Says how far to trust them; None: nothing does.
        batch: The vectors.
        options: What the caller asked for.
        table: Let a table fill in a notebook.
        stream: Yield partial texts, too.
        live: Show texts while they are written, where someone looks.
    """
    live = live and is_watched(options.progress)
    partial = stream or (live and verbalizer.streams)
    explained = explain_batch(
        verbalizer, reconstructor, batch, options, stream=partial, calibration=calibration
    )
    if live:
        return written_live(explained)
    if stream:
        return explained
    if table:
        explained = filling(explained, total=len(batch), show=options.progress)
    return with_progress(explained, total=len(batch), show=options.progress)


def collected(explained: Iterator[Explanation], shape: Sequence[int]) -> Explanation | Explanations:
    """All that is yielded, in the shape of the vectors; one explanation for no shape.

    Raises:
        NLAError: What the run raises; its `explanations` are those that came before. So it is with
            Ctrl-C, and with whatever else stops it.
    """
    finished: list[Explanation] = []
    try:
        finished.extend(explained)
    except BaseException as error:
        # list.extend keeps what came before the error.
        error.explanations = Explanations(finished)  # type: ignore[attr-defined]
        raise
    return Explanations(finished, shape) if shape else finished[0]
