"""What the trivial rules reach on a corpus, span-level scores too: they stand beside every model's."""

from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.schema import Corpus
from kdecs.corpus.splits import read_split
from kdecs.evaluation.baselines import MAJORITY_EMOTION, trivial_predictions
from kdecs.evaluation.metrics import evaluate

_EMOTION_KEY = "emotion_accuracy"


def trivial_scores(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Scores (fold1, protocol reccon, percent) by rule.

    A rule about causes has no emotion accuracy, and the majority emotion has nothing else.
    """
    found = {}
    for name, predictions in trivial_predictions(corpus, "fold1").items():
        values = evaluate(corpus, predictions).values
        is_emotion = name == MAJORITY_EMOTION
        found[name] = {key: value for key, value in values.items() if (key == _EMOTION_KEY) == is_emotion}
    return found


def trivial_scores_on_validation(config: CorpusConfig) -> dict[str, dict[str, float]]:
    """The same on the validation split that a config names."""
    return trivial_scores(read_split(config, config.valid))
