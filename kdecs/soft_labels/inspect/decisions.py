"""What a teacher decides about pairs, by its soft labels, as predictions in the format of every other system.

A pair is a cause if the causal words together are more probable than `other`, as everywhere that labels are compared
with gold. Its score is p(cause), the summed probability of the causal words, softmax over the answer words at τ = 1. A
label tells neither an emotion nor a span: `emotion` is null, and the span of a cause is "", the whole utterance.

Shapes: n pairs of a dialogue, A answer words.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import IO

import numpy as np

from kdecs.artifact import scratch_folder
from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.pairs import UNANNOTATED_UNIVERSE, Pair, candidate_pairs
from kdecs.corpus.reading import iter_dialogues
from kdecs.corpus.schema import Dialogue
from kdecs.errors import LabelError
from kdecs.evaluation.predictions import Prediction
from kdecs.soft_labels.format import candidates_after_of
from kdecs.soft_labels.inspect.calibration import probabilities, require_cause_words
from kdecs.soft_labels.labels import SoftLabels
from kdecs.soft_labels.scoring import is_causal


@dataclass
class Counts:
    """What was written, and the dialogues of which the directory labels no pair."""

    dialogues: int = 0
    pairs: int = 0
    causes: int = 0
    missing: int = 0
    first_missing: str = ""


def write_decisions(
    directory: Path, corpus: Path, file: IO[bytes], *, cache_dir: Path | None = None
) -> Counts:
    """Write the decisions about every pair of a corpus that a label directory has, as lines with the key `score`.

    The corpus needs no gold labels. Dialogues without a label are counted. Raises ArtifactError, CorpusError, and
    LabelError for labels of other words or of none of the dialogues, or for a dialogue whose texts have changed since.
    """
    counts = Counts()
    with scratch_folder("labels") as scratch:
        labels = SoftLabels.open(directory, cache_dir or scratch)
        require_cause_words(directory, labels.answer_words)
        for dialogue, found in decisions(labels, iter_dialogues(corpus, labelled=False)):
            if not found:
                counts.first_missing = counts.first_missing or dialogue.id
                counts.missing += 1
                continue
            counts.dialogues += 1
            counts.pairs += len(found)
            counts.causes += sum(prediction.is_cause for prediction, _ in found)
            for prediction, score in found:
                line = asdict(prediction) | {"score": round(score, 6)}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    if not counts.dialogues:
        raise LabelError(
            f"{directory}: labels no pair of {corpus}; name the file whose dialogues were labelled (ids and texts must "
            "agree)"
        )
    return counts


def decisions(
    labels: SoftLabels, dialogues: Iterable[Dialogue]
) -> Iterator[tuple[Dialogue, list[tuple[Prediction, float]]]]:
    """Each dialogue with the predictions of its labelled pairs and their p(cause); an empty list if it has none.

    Pairs are found by id and hash in any split. Raises LabelError for a dialogue of which a part is labelled that no
    export labels alone.
    """
    after = candidates_after_of(labels.directory, labels.manifest)
    # Such an export labels every target, whichever emotions it was given. Others leave out what has no gold.
    has_every_target = labels.manifest.details.get("universe") == UNANNOTATED_UNIVERSE
    for dialogue in dialogues:
        pairs = candidate_pairs(dialogue, after=after)
        rows_n = labels.find([pair.id for pair in pairs], [pair.hash for pair in pairs])
        known = [pair for pair, row in zip(pairs, rows_n, strict=True) if row >= 0]
        if known and (fault := _partly_labelled(pairs, known, has_every_target=has_every_target)):
            raise LabelError(
                f"{labels.directory}: {fault} of the dialogue {dialogue.id}; its texts are others than those that were "
                "labelled, so export the labels of this file"
            )
        logits_nA = labels.logits(rows_n[rows_n >= 0])
        # Rounding may exceed 1.
        p_cause_n = np.minimum(probabilities(logits_nA, 1.0)[:, :NUM_CAUSAL].sum(axis=1), 1.0)
        found = [
            (Prediction(dialogue.id, pair.target, pair.candidate, None, bool(is_cause), ""), float(p_cause))
            for pair, is_cause, p_cause in zip(known, is_causal(logits_nA), p_cause_n, strict=True)
        ]
        yield dialogue, found


def _partly_labelled(pairs: Sequence[Pair], known: Sequence[Pair], *, has_every_target: bool) -> str | None:
    """What is wrong with the labelled pairs of a dialogue: a target has some of its candidates, or none; else None."""
    all_of, known_of = (
        {
            target: [pair.candidate for pair in group]
            for target, group in groupby(each, lambda pair: pair.target)
        }
        for each in (pairs, known)
    )
    for target, candidates in all_of.items():
        found = known_of.get(target, [])
        # Of a neutral target an export labels the target itself alone.
        if found not in (candidates, [target]) and (found or has_every_target):
            return f"labels {len(found)} of the {len(candidates)} candidates of turn {target}"
    return None
