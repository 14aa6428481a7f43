"""Trivial rules whose scores are shown next to every system's: a useful model must beat them."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from kdecs.corpus.pairs import Pair, Universe, pairs_of
from kdecs.corpus.schema import Corpus
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.evaluation.rows import Row

ALL_NEGATIVE, SELF, SELF_AND_PREVIOUS = "all negative", "j = i", "j >= i-1"
MAJORITY_EMOTION = "majority emotion"

# Each rule decides from the turns of target and candidate alone.
RULES: dict[str, Callable[[int, int], bool]] = {
    ALL_NEGATIVE: lambda target, candidate: False,
    SELF: lambda target, candidate: candidate == target,
    SELF_AND_PREVIOUS: lambda target, candidate: target - 1 <= candidate <= target,
}


def trivial_predictions(corpus: Corpus, universe: Universe) -> dict[str, dict[PairKey, Prediction]]:
    """The predictions of each rule, by its name.

    "all negative", "j = i" and "j >= i-1" predict the whole utterance as the span of a cause, and no emotion.
    "majority emotion" predicts the most frequent emotion of this corpus for every utterance, and no cause.
    """
    pairs = [pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue, universe)]
    found = {
        name: {p.key: p for p in (_predict(pair, rule(pair.target, pair.candidate)) for pair in pairs)}
        for name, rule in RULES.items()
    }
    emotion = majority_emotion(corpus)
    found[MAJORITY_EMOTION] = {
        (dialogue.id, turn, turn): Prediction(dialogue.id, turn, turn, emotion, False, "")
        for dialogue in corpus.dialogues
        for turn in range(1, len(dialogue.utterances) + 1)
    }
    return found


def rule_predictions(
    rows: Sequence[Row], name: str, neutral: Collection[tuple[str, int]] = ()
) -> dict[PairKey, Prediction]:
    """What a rule predicts for the pairs of rows; targets that are given as neutral have no cause."""
    rule = RULES[name]
    found: dict[PairKey, Prediction] = {}
    for row in rows:
        is_cause = rule(row.target, row.candidate) and row.key[:2] not in neutral
        span = row.dialogue.utterances[row.candidate - 1].text if is_cause else ""
        found[row.key] = Prediction(*row.key, None, is_cause, span)
    return found


def majority_emotion(corpus: Corpus) -> str | None:
    """The most frequent gold emotion (the first by name among equals); None if the corpus has no emotion."""
    counts = Counter(u.emotion for d in corpus.dialogues for u in d.utterances if u.emotion is not None)
    # Not `most_common`, which settles equal counts by the order of the file.
    return min(counts, key=lambda emotion: (-counts[emotion], emotion), default=None)


def _predict(pair: Pair, is_cause: bool) -> Prediction:
    span = pair.dialogue.utterances[pair.candidate - 1].text if is_cause else ""
    return Prediction(pair.dialogue.id, pair.target, pair.candidate, None, is_cause, span)
