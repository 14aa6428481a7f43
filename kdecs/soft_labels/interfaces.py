"""What an export needs of a teacher, a rank and a stop signal; the real ones import torch, tests need not.

Shapes: n pairs, A answer words, K top logits.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kdecs.artifact import Manifest
from kdecs.corpus.pairs import Pair


class Scorer(Protocol):
    """A loaded teacher (`kdecs.teacher.scoring.TeacherScorer`)."""

    @property
    def answer_words(self) -> tuple[str, ...]:
        """The words whose logits are scored, in their order."""
        ...

    @property
    def lineage(self) -> Mapping[str, str]:
        """What the labels depend on beside the corpus: teacher, prompt version, emotions shown."""
        ...

    @property
    def manifest(self) -> Manifest:
        """The manifest of the teacher's directory."""
        ...

    def score(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Raw logits (n, A) and log rest mass (n,), float32, in the order of `pairs`."""
        ...


class TopScorer(Scorer, Protocol):
    """A teacher that also gives the largest logits over its whole vocabulary."""

    @property
    def tokenizer_sha256(self) -> str:
        """What the token ids mean: a student may use them only with a tokenizer of this checksum."""
        ...

    def score_with_top(
        self, pairs: Sequence[Pair], top_k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `score`, and the ids (n, K) int32 and logits (n, K) float32 of the K largest, largest first."""
        ...


class Company(Protocol):
    """How a worker gets on with the others of its launch while it has nothing to label."""

    @property
    def may_complete(self) -> bool:
        """Whether this worker may write the manifest."""
        ...

    def wait(self, seconds: float) -> None:
        """Let about so much time pass until something may have become free."""
        ...

    def finish(self) -> None:
        """Nothing is left for this worker: return once that holds for all that depend on it."""
        ...


class Independent:
    """Workers that share a directory and nothing else."""

    may_complete = True

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def finish(self) -> None:
        """Nobody depends on this worker."""


class Worker(Protocol):
    """What an export needs of `kdecs.runtime.Runtime`."""

    @property
    def rank(self) -> int:
        """Where this worker begins to look for free shards."""
        ...

    @property
    def world_size(self) -> int:
        """Workers of this launch; others may work on the same directory."""
        ...

    @property
    def device(self) -> Any:
        """The device that scores; its type is noted in the manifest."""
        ...


class Stop(Protocol):
    """What an export needs of `kdecs.runtime.StopSignal`."""

    def raise_if_requested(self, message: str) -> None:
        """Raise Stopped once a signal came."""
        ...
