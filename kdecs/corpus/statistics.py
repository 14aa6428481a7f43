"""Counts of a corpus file: the paper's Table 1 (emotions) and Table 2 (pairs, dialogues, utterances)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdecs.corpus.pairs import count_rows, pairs_of
from kdecs.corpus.schema import Corpus


@dataclass(frozen=True)
class CorpusStatistics:
    """What `kdecs corpus stats` tells of one file; rows are those of fold 1, `pairs_all` of "all"."""

    file: str
    dialogues: int
    utterances: int
    positive_rows: int
    negative_rows: int
    pairs_all: int
    emotions: dict[str, int]
    pairs_of_several_spans: int
    targets_caused_outside_alone: int
    normalised: dict[str, int]
    warnings: tuple[str, ...]
    faults: int

    def as_dict(self) -> dict[str, Any]:
        """The keys of one file in `kdecs corpus stats --json`."""
        return {**vars(self), "warnings": list(self.warnings)}


def statistics_of(corpus: Corpus, num_faults: int = 0) -> CorpusStatistics:
    """The counts of a corpus; emotions by falling count, then name."""
    utterances = [u for dialogue in corpus.dialogues for u in dialogue.utterances]
    pairs = [pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue)]
    positive, negative = count_rows(pairs)
    emotions = Counter(u.emotion for u in utterances if u.emotion is not None)
    return CorpusStatistics(
        file=str(corpus.path),
        dialogues=len(corpus.dialogues),
        utterances=len(utterances),
        positive_rows=positive,
        negative_rows=negative,
        pairs_all=sum(_triangle(len(dialogue.utterances)) for dialogue in corpus.dialogues),
        emotions=dict(sorted(emotions.items(), key=lambda item: (-item[1], item[0]))),
        pairs_of_several_spans=sum(len(pair.spans) > 1 for pair in pairs),
        targets_caused_outside_alone=sum(
            bool(u.evidence) and all(e.turn is None for e in u.evidence or ()) for u in utterances
        ),
        normalised=dict(sorted(corpus.normalised.items())),
        warnings=corpus.warnings,
        faults=num_faults,
    )


def cause_distances(corpus: Corpus) -> Counter[int]:
    """Positive rows of fold 1 by target minus candidate: 0 is the target itself."""
    return Counter(
        pair.target - pair.candidate
        for dialogue in corpus.dialogues
        for pair in pairs_of(dialogue)
        for _ in pair.spans
    )


def display_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each file: its stem, or the whole path where two files share a stem."""
    counts = Counter(path.stem for path in paths)
    return [path.stem if counts[path.stem] == 1 else str(path) for path in paths]


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
