"""What an export needs of a teacher, a rank and a stop signal; the real ones import torch, tests need not."""

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
