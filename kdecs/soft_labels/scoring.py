"""The labels of one shard, chunk by chunk: scored, checked to be finite, and counted against gold.

Shapes: n pairs of a chunk, A answer words, K top logits.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from kdecs.artifact import Manifest
from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.pairs import Pair
from kdecs.errors import LabelError
from kdecs.evaluation.counts import PairCounts
from kdecs.soft_labels.format import ShardTable
from kdecs.soft_labels.plan import Plan, PlannedDialogue

CHUNK_PAIRS = 256
"""Pairs scored between two looks at the stop signal. They also fix a shard's batches, and so its last bits."""

# Agreement with gold selects teachers, so the test split must not take part.
_COUNTED_SPLITS = ("train", "valid")


class Scorer(Protocol):
    """A loaded teacher (`kdecs.teacher.scoring.TeacherScorer`)."""

    @property
    def answer_words(self) -> tuple[str, ...]:
        """The words whose logits are scored, in their order."""
        ...

    @property
    def lineage(self) -> Mapping[str, str]:
        """What the labels depend on besides the corpus: teacher, prompt version, emotions shown."""
        ...

    @property
    def manifest(self) -> Manifest:
        """The manifest of the teacher's directory."""
        ...

    def score(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Raw logits (n, A) and log rest mass (n,), float32, in the order of `pairs`."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """Checksum of the tokenizer that the ids of top logits refer to; a student must have the same tokenizer."""
        ...

    def score_with_top(
        self, pairs: Sequence[Pair], top_k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `score`, and ids (n, K) int32 and logits (n, K) float32 of the K largest logits, largest first."""
        ...


class WaitPolicy(Protocol):
    """What a worker does while it has nothing to label.

    Workers that share only a directory sleep (`SleepingWait`). The ranks of a launch whose forwards are collective run
    the forwards of the others (`kdecs.teacher.scoring.Lockstep`): a rank that slept would keep them from scoring.
    """

    @property
    def may_complete(self) -> bool:
        """Whether this worker may write the manifest."""
        ...

    def wait(self, seconds: float) -> None:
        """Let about this much time pass, until something may have become free."""
        ...

    def finish(self) -> None:
        """Nothing is left for this worker; return once no other worker depends on it."""
        ...


class SleepingWait:
    """The wait policy of a worker that no other one depends on."""

    may_complete = True

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def finish(self) -> None:
        """Return at once."""


def is_causal(logits_nA: np.ndarray) -> np.ndarray:
    """Boolean (…,): whether the causal words together are more probable than `other`, for logits (…, A)."""
    # The softmax's denominator is the same on both sides, so raw logits will do.
    return np.logaddexp.reduce(logits_nA[..., :NUM_CAUSAL], axis=-1) > logits_nA[..., NUM_CAUSAL]


class ShardScoring:
    """Scores one shard, chunk by chunk; `agreement` counts the fold1 pairs scored so far against gold, by split."""

    def __init__(
        self,
        plan: Plan,
        shard: int,
        scorer: Scorer,
        *,
        top_k: int = 0,
        on_chunk: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.agreement: dict[str, PairCounts] = {}
        self._plan, self._shard, self._scorer, self._top_k = plan, shard, scorer, top_k
        self._on_chunk = on_chunk

    def tables(self) -> Iterator[ShardTable]:
        """The rows of each chunk; `on_chunk` is called before each with the pairs scored so far.

        Raises LabelError for a label that is not finite.
        """
        num_scored = 0
        for chunk in self._plan.chunks(self._shard, CHUNK_PAIRS):
            # Before each chunk and not after the last: a stop that comes then still lets the shard be published.
            self._on_chunk(num_scored)
            table = self._score(chunk)
            num_scored += len(table)
            yield table

    def _score(self, chunk: Sequence[PlannedDialogue]) -> ShardTable:
        pairs = [pair for planned in chunk for pair in planned.pairs]
        top_ids = top_logits = None
        if self._top_k:
            logits_nA, log_rest_mass_n, top_ids, top_logits = self._scorer.score_with_top(pairs, self._top_k)
            assert top_ids.shape == top_logits.shape == (len(pairs), self._top_k)
        else:
            logits_nA, log_rest_mass_n = self._scorer.score(pairs)
        assert logits_nA.shape == (len(pairs), len(self._scorer.answer_words))
        assert log_rest_mass_n.shape == (len(pairs),)
        _check_finite(pairs, logits_nA, log_rest_mass_n, top_logits)
        self._count(chunk, logits_nA)
        return ShardTable(
            pair_ids=[pair.id for pair in pairs],
            pair_hashes=[pair.hash for pair in pairs],
            splits=[planned.split for planned in chunk for _ in planned.pairs],
            logits=logits_nA,
            log_rest_mass=log_rest_mass_n,
            top_ids=top_ids,
            top_logits=top_logits,
        )

    def _count(self, chunk: Sequence[PlannedDialogue], logits_nA: np.ndarray) -> None:
        """Add a chunk's fold1 pairs to the agreement of its splits."""
        is_causal_n = is_causal(logits_nA)
        row = 0
        for planned in chunk:
            first, row = row, row + len(planned.pairs)
            if planned.split not in _COUNTED_SPLITS:
                continue
            # An export also labels the pair (i, i) of a neutral target, for which gold annotates no cause.
            utterances = planned.pairs[0].dialogue.utterances
            in_fold1 = [utterances[pair.target - 1].evidence is not None for pair in planned.pairs]
            gold = np.array([pair.is_cause for pair in planned.pairs])[in_fold1]
            counts = PairCounts.of(gold, is_causal_n[first:row][in_fold1])
            self.agreement[planned.split] = self.agreement.get(planned.split, PairCounts()) + counts


def _check_finite(
    pairs: Sequence[Pair],
    logits_nA: np.ndarray,
    log_rest_mass_n: np.ndarray,
    top_logits_nK: np.ndarray | None,
) -> None:
    is_bad_n = ~(np.isfinite(logits_nA).all(axis=1) & np.isfinite(log_rest_mass_n))
    if top_logits_nK is not None:
        is_bad_n |= ~np.isfinite(top_logits_nK).all(axis=1)
    if is_bad_n.any():
        first = int(np.flatnonzero(is_bad_n)[0])
        raise LabelError(
            f"pair {pairs[first].id}: logits {logits_nA[first].tolist()} and log rest mass "
            f"{float(log_rest_mass_n[first])} are not all finite ({int(is_bad_n.sum())} such pairs in this "
            "chunk of the shard); check the teacher, or export in float32"
        )
