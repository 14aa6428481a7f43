"""Transformers without what it prints of its own accord."""

import contextlib
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep Transformers from drawing bars for its files: they take milliseconds and tear our own."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Keep Transformers from printing tables of weights that are missing: for callers that check them."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
