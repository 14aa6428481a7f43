"""The pairs of corpus files as labels need them: in bounded batches, one dialogue in memory where lines are read."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from kdecs.corpus.pairs import Pair, Universe, pairs_of
from kdecs.corpus.reading import holds_lines, iter_dialogues
from kdecs.corpus.schema import Dialogue
from kdecs.soft_labels.sources import LinesSource

PAIRS_A_BATCH = 8192


def dialogues_of_file(path: Path) -> Iterator[Dialogue]:
    """The dialogues of a labelled corpus file in its order. Raises CorpusError at the first fault.

    Of JSON lines nothing is kept, their ids neither: that one stands twice is for the caller to find.
    """
    if path.is_file() and holds_lines(path):
        yield from (dialogue for _, dialogue in LinesSource(path).scan())
    else:
        yield from iter_dialogues(path)


def pairs_of_file(path: Path, universe: Universe) -> Iterator[Pair]:
    """The pairs of a labelled corpus file, as `dialogues_of_file`."""
    for dialogue in dialogues_of_file(path):
        yield from pairs_of(dialogue, universe)


def batches_of(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Pairs in lists of a bounded length."""
    pairs = iter(pairs)
    while batch := list(itertools.islice(pairs, PAIRS_A_BATCH)):
        yield batch
