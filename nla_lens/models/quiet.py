"""transformers without its reports and bars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nla_lens.models.turns import turn


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the report of unused weights: a reconstructor's lm_head is unused on purpose."""
    from transformers.utils import logging

    # One at a time: two would each put back what the other had set.
    with turn(logging):
        level = logging.get_verbosity()
        bar = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bar:
                logging.enable_progress_bar()
