from collections import Counter
from pathlib import Path

import pytest

from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Corpus, Dialogue
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.metrics import breakdowns, emotion_report, evaluate
from kdecs.evaluation.predictions import Prediction, by_pair


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus(bundled_sample("test"))


def restrict(corpus: Corpus, dialogue: Dialogue) -> Corpus:
    return Corpus(Path("one.json"), (dialogue,), Counter(), ())


def test_groups_add_up_to_the_whole(corpus):
    scores = evaluate(corpus, trivial_predictions(corpus, "fold1")["j >= i-1"])
    for groups in breakdowns(scores).values():
        assert sum(group["num_positive"] for group in groups.values()) == scores.num_positive
        assert sum(group["num_negative"] for group in groups.values()) == scores.num_negative
        weighted = sum(group["positive_f1"] * group["num_positive"] for group in groups.values())
        assert weighted / scores.num_positive == pytest.approx(scores["positive_f1"])


def test_distances_show_what_a_rule_sees(corpus):
    groups = breakdowns(evaluate(corpus, trivial_predictions(corpus, "fold1")["j >= i-1"]))["distance"]
    assert list(groups) == sorted(groups)
    for distance, group in groups.items():
        assert (group["utterance_positive_f1"] > 0) == (distance in "01")


def test_emotions_and_lengths_are_those_of_target_and_candidate(corpus):
    groups = breakdowns(evaluate(corpus, {}))
    targets = {u.emotion for d in corpus.dialogues for u in d.utterances if u.evidence is not None}
    assert set(groups["emotion"]) == targets
    assert set(groups["utterance_length"]) <= {"1-5 words", "6-10 words", "11-20 words", "21+ words"}
    assert list(groups["utterance_length"]) == sorted(
        groups["utterance_length"], key=lambda name: int(name.split("-")[0].split("+")[0])
    )


def test_scores_add_over_dialogues(corpus):
    predictions = trivial_predictions(corpus, "fold1")["j = i"]
    whole = evaluate(corpus, predictions)
    for index, dialogue in enumerate(corpus.dialogues):
        one = evaluate(restrict(corpus, dialogue), predictions)
        assert one.sums_by_dialogue[0].tolist() == whole.sums_by_dialogue[index].tolist()


def test_emotions_are_compared_label_by_label(corpus):
    dialogue = corpus.dialogues[0]
    golds = [u.emotion for u in dialogue.utterances]
    predicted = [*golds[:-1], "excited"]
    predictions = [Prediction(dialogue.id, n, n, e, False, "") for n, e in enumerate(predicted, 1)]
    report = emotion_report(restrict(corpus, dialogue), by_pair(predictions))
    assert report.accuracy == pytest.approx(100 * (len(golds) - 1) / len(golds))
    assert report.confusion.sum() == len(golds)
    assert report.confusion[report.labels.index(golds[-1]), report.labels.index("excited")] == 1
    assert report.f1["excited"] == 0
    assert report.macro_f1 == pytest.approx(sum(report.f1.values()) / len(report.f1))
    assert report.as_dict()["count"]["excited"] == 0
    metrics = pytest.importorskip("sklearn.metrics")
    assert report.macro_f1 == pytest.approx(100 * metrics.f1_score(golds, predicted, average="macro"))
    assert (
        report.confusion.tolist() == metrics.confusion_matrix(golds, predicted, labels=report.labels).tolist()
    )


def test_no_emotion_at_all(corpus):
    report = emotion_report(corpus, {})
    assert (report.labels, report.accuracy, report.macro_f1) == ((), 0.0, 0.0)
