import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Corpus, Dialogue, Evidence, Utterance
from kdecs.errors import PredictionError
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.metrics import STRICT_KEYS, evaluate
from kdecs.evaluation.predictions import Prediction, by_pair
from kdecs.evaluation.rows import match, squad_f1
from kdecs.evaluation.significance import compare_systems, distance_from_rule

RECCON = Path(os.environ.get("KDECS_RECCON", Path(__file__).parents[2].parent / "shared" / "reccon"))
BIG_GAME = "I am very happy , too . It was a big game and I won ."


def corpus_of(*dialogues: Dialogue) -> Corpus:
    return Corpus(Path("corpus.json"), dialogues, Counter(), ())


def dialogue_of(*utterances: tuple[str, str, list[tuple[int, str]] | None], id: str = "d") -> Dialogue:
    """Utterances (text, emotion, evidence)."""
    made = []
    for turn, (text, emotion, evidence) in enumerate(utterances, 1):
        causes = None if evidence is None else tuple(Evidence(j, span) for j, span in evidence)
        made.append(Utterance(turn, "AB"[turn % 2], text, emotion, causes))
    return Dialogue(id, tuple(made))


@pytest.mark.parametrize(
    ("gold", "predicted", "outcome", "token_f1"),
    [
        ("We won the game !", "we won the game", "incorrect", 1.0),
        ("We won the game !", "We won the game", "similar", 1.0),
        (BIG_GAME, "a big game", "similar", 0.2857),
        ("We won !", "!", "similar", 0.0),
        ("We won !", "", "similar", 0.0),
        (" We won ! ", "We won !", "correct", 1.0),
    ],
)
def test_worked_rows(gold, predicted, outcome, token_f1):
    assert match(gold, predicted) == outcome
    assert squad_f1(gold, predicted) == pytest.approx(token_f1, abs=5e-5)


@pytest.mark.parametrize(
    ("gold", "predicted", "positive_f1", "exact_match"),
    [
        ("We won the game !", "we won the game", 0.0, 0.0),
        ("We won the game !", "We won the game", 100.0, 0.0),
        (BIG_GAME, "a big game", 28.57, 0.0),
        ("We won !", "!", 0.0, 0.0),
        ("We won !", "We won !", 100.0, 100.0),
    ],
)
def test_worked_rows_through_evaluate(gold, predicted, positive_f1, exact_match):
    corpus = corpus_of(dialogue_of((gold, "happiness", [(1, gold)])))
    scores = evaluate(corpus, by_pair([Prediction("d", 1, 1, "happiness", True, predicted)]))
    assert scores["positive_f1"] == pytest.approx(positive_f1, abs=5e-3)
    assert scores["exact_match"] == exact_match
    assert scores["utterance_positive_f1"] == 100


def worked_corpus() -> tuple[Corpus, list[Prediction]]:
    """Two right negatives, a wrong one, an exact match, the third worked row, an incorrect positive."""
    corpus = corpus_of(
        dialogue_of(
            ("We won the game !", "happiness", [(1, "We won the game !")]),
            (BIG_GAME, "happiness", [(2, BIG_GAME)]),
            ("We won the game !", "happiness", [(3, "We won the game !")]),
        )
    )
    predictions = [
        Prediction("d", 1, 1, "happiness", True, "We won the game !"),
        Prediction("d", 2, 1, "happiness", False, ""),
        Prediction("d", 2, 2, "happiness", True, "a big game"),
        Prediction("d", 3, 1, "anger", True, "won"),
        Prediction("d", 3, 2, "anger", False, ""),
        Prediction("d", 3, 3, "anger", True, "we won the game"),
    ]
    return corpus, predictions


def test_worked_corpus():
    corpus, predictions = worked_corpus()
    scores = evaluate(corpus, by_pair(predictions))
    assert (scores.num_positive, scores.num_negative, scores.missing) == (3, 3, 0)
    assert scores["exact_match"] == pytest.approx(33.33, abs=5e-3)
    assert scores["positive_f1"] == pytest.approx(42.86, abs=5e-3)
    assert scores["negative_f1"] == pytest.approx(80.0)
    assert scores["macro_f1"] == pytest.approx((42.857142 + 80) / 2)
    assert scores["emotion_accuracy"] == pytest.approx(200 / 3)
    # Strict: the exact match and the similar row have the right emotion, the incorrect one has not.
    assert scores["strict_positive_f1"] == pytest.approx(scores["positive_f1"])
    assert scores["strict_utterance_positive_f1"] == pytest.approx(100 * 4 / 7)
    assert scores["utterance_positive_f1"] == pytest.approx(100 * 6 / 7)


def test_strict_needs_the_emotion_of_each_positive():
    corpus, predictions = worked_corpus()
    wrong = [
        Prediction(p.dialogue_id, p.target, p.candidate, "fear", p.is_cause, p.span) for p in predictions
    ]
    scores = evaluate(corpus, by_pair(wrong))
    assert scores["strict_exact_match"] == scores["strict_positive_f1"] == 0
    assert scores["strict_negative_f1"] == scores["negative_f1"] == pytest.approx(80)
    assert scores["positive_f1"] == pytest.approx(42.857142)


def test_a_neutral_target_has_no_cause():
    corpus, predictions = worked_corpus()
    scores = evaluate(corpus, by_pair(replace(p, emotion="neutral") for p in predictions))
    assert scores["exact_match"] == scores["positive_f1"] == scores["utterance_positive_f1"] == 0
    assert scores["negative_f1"] == pytest.approx(100 * 2 * 3 / (2 * 3 + 3))
    assert scores.scored.num_neutral == 4


def test_missing_pairs_count_as_no_cause_and_once_each():
    corpus = corpus_of(
        dialogue_of(
            ("a b", "happiness", [(1, "a"), (1, "b")]), ("c", "anger", [(2, "c")]), ("d", "neutral", None)
        )
    )
    scores = evaluate(corpus, {})
    assert (scores.num_positive, scores.num_negative, scores.missing) == (3, 1, 3)
    assert scores.utterances_without_emotion == 3
    assert scores["negative_f1"] == pytest.approx(100 * 2 / 5)
    assert evaluate(corpus, {}, universe="all").missing == 6


def test_predictions_outside_the_universe_serve_emotions_alone():
    corpus = corpus_of(dialogue_of(("a", "happiness", [(1, "a")]), ("b", "neutral", None)))
    inside = Prediction("d", 1, 1, "happiness", True, "a")
    outside = Prediction("d", 2, 2, "neutral", False, "")
    scores = evaluate(corpus, by_pair([inside, outside]))
    assert scores["emotion_accuracy"] == 100
    assert scores.utterances_without_emotion == 0
    assert scores["macro_f1"] == evaluate(corpus, by_pair([inside]))["macro_f1"]


def test_released_protocol_reads_the_last_similar_row():
    texts = ["first cause", "second cause", "third cause"]
    corpus = corpus_of(dialogue_of(*[(text, "anger", [(n, text)]) for n, text in enumerate(texts, 1)]))

    def negative_f1(*spans: str, protocol: str = "reccon-released") -> float:
        predictions = [Prediction("d", n, n, "anger", True, span) for n, span in enumerate(spans, 1)]
        return evaluate(corpus, by_pair(predictions), protocol=protocol)["negative_f1"]

    # Three negative rows are right by being missing; an empty last similar row charges every incorrect one.
    assert negative_f1("zzz", "yyy", "") == pytest.approx(100 * 6 / (6 + 3))
    assert negative_f1("zzz", "yyy", "", protocol="reccon") == pytest.approx(100 * 6 / (6 + 1))
    assert negative_f1("", "yyy", "third") == pytest.approx(100 * 6 / (6 + 1))
    assert negative_f1("xxx", "yyy", "zzz") == 100


def test_released_rows_run_in_evidence_order():
    corpus = corpus_of(
        dialogue_of(
            ("one", "neutral", None), ("two", "neutral", None), ("x", "anger", [(2, "two"), (1, "one")])
        )
    )
    predictions = [Prediction("d", 3, 1, "anger", True, "on"), Prediction("d", 3, 2, "anger", False, "")]
    # Evidence order: 2 (predicted ""), then 1 (similar, not empty), which is the last similar row.
    released = evaluate(corpus, by_pair(predictions), protocol="reccon-released")
    assert released["negative_f1"] == evaluate(corpus, by_pair(predictions))["negative_f1"]


def test_released_rows_end_with_another_dialogue_than_the_annotations():
    """te_291 ends the released test rows, wherever the corpus has it; a row file may give the whole order."""
    told = [dialogue_of(("told you", "anger", [(1, "told you")]), id=name) for name in ("te_291", "te_1")]
    corpus = corpus_of(*told, dialogue_of(("x", "anger", [(1, "x")]), ("y", "anger", []), id="te_2"))
    incorrect = Prediction("te_2", 1, 1, None, True, "zzz")

    def scores_of(first: str, last: str, *more: Prediction, order=None):
        given = [
            Prediction(d, 1, 1, None, bool(p), p) for d, p in (("te_291", first), ("te_1", last)) if p != "?"
        ]
        return evaluate(
            corpus, by_pair([*given, incorrect, *more]), protocol="reccon-released", released_order=order
        )

    # Two negative rows are right; one or two of the positives count as predicted "".
    for first, last, empty in (("", "told", 2), ("told", "", 1)):
        scores = scores_of(first, last)
        assert scores["negative_f1"] == pytest.approx(100 * 4 / (4 + empty))
        assert not scores.scored.is_order_guessed
        turned = scores_of(first, last, order=("te_2", "te_291", "te_1"))
        assert turned["negative_f1"] == pytest.approx(100 * 4 / (4 + 3 - empty))
    # Without a similar row in te_291, two others that differ leave it open which one was the last.
    corpus = corpus_of(*[replace(d, id=f"te_{n}") for n, d in enumerate(told, 5)], corpus.dialogues[2])
    given = [Prediction("te_5", 1, 1, None, True, "told"), Prediction("te_6", 1, 1, None, False, "")]
    guess = evaluate(corpus, by_pair([*given, incorrect]), protocol="reccon-released")
    assert guess.scored.is_order_guessed
    unanimous = evaluate(corpus, by_pair([*given[1:], incorrect]), protocol="reccon-released")
    assert not unanimous.scored.is_order_guessed
    with pytest.raises(PredictionError, match="dialogue te_6: the released rows have none of its rows"):
        evaluate(corpus, by_pair(given), protocol="reccon-released", released_order=("te_5", "te_2"))


@pytest.mark.parametrize(
    ("predicted", "right", "counted"),
    [
        *[(span, 1, 1) for span in ("", "I", "a", "i", "answer", "Impossible ≠æ≠æ≠ answer .")],
        *[(span, 0, 1) for span in ("you", "told you", "A")],
        ("Impossible ≠æ≠æ≠ answer", 0, 0),
    ],
)
def test_released_negatives_are_compared_with_their_text(predicted, right, counted):
    corpus = corpus_of(
        dialogue_of(("I told you", "neutral", None), ("you", "anger", []), ("well", "anger", []))
    )
    predictions = by_pair([Prediction("d", 2, 1, None, bool(predicted), predicted)])
    # Four other negatives are missing, and thus right.
    released = evaluate(corpus, predictions, protocol="reccon-released")
    assert released["negative_f1"] == pytest.approx(100 * 2 * (4 + right) / (4 + right + 4 + counted))
    assert released.num_negative == 5
    own = evaluate(corpus, predictions)["negative_f1"]
    assert own == pytest.approx(100 * 2 * (4 + (predicted == "")) / (4 + (predicted == "") + 5))


def test_squad_protocol_scores_overlap_without_containment():
    corpus = corpus_of(dialogue_of(("We won the game !", "happiness", [(1, "We won the game !")])))
    predictions = by_pair([Prediction("d", 1, 1, "happiness", True, "we won the game")])
    assert evaluate(corpus, predictions)["positive_f1"] == 0
    scores = evaluate(corpus, predictions, protocol="squad")
    assert scores["positive_f1"] == 100
    assert scores["exact_match"] == 0


def test_two_emotions_for_one_target_are_refused():
    corpus, predictions = worked_corpus()
    predictions[1] = Prediction("d", 2, 1, "fear", False, "")
    with pytest.raises(PredictionError, match="target d/2: found two predicted emotions"):
        evaluate(corpus, by_pair(predictions))


def test_trivial_rules_stand_beside_every_score():
    corpus = read_corpus(bundled_sample("test"))
    rules = trivial_predictions(corpus, "fold1")
    scores = evaluate(corpus, rules["j >= i-1"])
    assert set(scores.baselines) == {"all negative", "j = i", "j >= i-1", "majority emotion"}
    assert scores.baselines["j >= i-1"]["utterance_macro_f1"] == scores["utterance_macro_f1"]
    majority = evaluate(corpus, rules["majority emotion"])
    assert scores.baselines["majority emotion"]["emotion_accuracy"] == majority["emotion_accuracy"] > 0
    assert scores.baselines["all negative"]["utterance_positive_f1"] == 0


@pytest.mark.parametrize("universe", ["fold1", "all"])
def test_the_rules_scores_are_those_of_their_predictions(universe):
    corpus = read_corpus(bundled_sample("test"))
    rules = trivial_predictions(corpus, universe)
    beside = evaluate(corpus, {}, universe=universe).baselines
    assert set(beside) == set(rules)
    for name, predictions in rules.items():
        scores = evaluate(corpus, predictions, universe=universe)
        assert beside[name] == {key: pytest.approx(scores[key]) for key in beside[name]}


def test_empty_denominators_are_zero():
    scores = evaluate(corpus_of(dialogue_of(("a", "neutral", None))), {})
    assert set(scores.values.values()) == {0.0}


@pytest.mark.skipif(not RECCON.is_dir(), reason="the RECCON files are not here (KDECS_RECCON)")
def test_trivial_rules_on_the_test_split():
    scores = evaluate(read_corpus(RECCON / "dailydialog_test.json"), {})
    rules = {
        name: [round(value, 2) for value in values.values()] for name, values in scores.baselines.items()
    }
    assert rules["j >= i-1"] == [64.12, 85.89, 75.0]
    assert rules["j = i"] == [47.04, 85.89, 66.46]
    assert rules["majority emotion"][0] == 54.3
    given = evaluate(read_corpus(RECCON / "dailydialog_test.json"), {}, universe="gold-emotions")
    assert (given.num_positive, given.num_negative) == (1767, 14052)
    assert [round(v, 2) for v in given.baselines["j >= i-1"].values()] == [63.59, 94.92, 79.25]


def test_given_emotions_count_each_pair_once_and_bar_the_causes_of_neutral_targets():
    """Against sets of pairs; the system's own emotions, right or wrong, change nothing."""
    corpus = read_corpus(bundled_sample("test"))
    rng = random.Random(0)
    gold = {p.key for p in trivial_pairs(corpus) if p.is_cause}
    every = {p.key: p.emotion for p in trivial_pairs(corpus)}
    for _ in range(5):
        chosen = {key for key in every if rng.random() < 0.3}
        found = [Prediction(*key, rng.choice(["anger", "neutral"]), key in chosen, "") for key in every]
        # One emotion per target.
        found = [replace(p, emotion=("anger", "neutral")[p.target % 2]) for p in found]
        scores = evaluate(corpus, by_pair(found), universe="gold-emotions")
        said = {key for key in chosen if every[key] != "neutral"}
        right, negatives = len(said & gold), len(every) - len(gold | said)
        assert scores["utterance_positive_f1"] == pytest.approx(200 * right / (len(said) + len(gold)))
        assert scores["utterance_negative_f1"] == pytest.approx(
            200 * negatives / (2 * len(every) - len(said) - len(gold))
        )
        assert (scores.num_positive, scores.num_negative) == (len(gold), len(every) - len(gold))
        assert "emotion_accuracy" not in scores.values and not scores.has_emotions
    near = [replace(p, emotion="anger") for p in trivial_predictions(corpus, "all")["j >= i-1"].values()]
    scores = evaluate(corpus, by_pair(near), universe="gold-emotions")
    rule = scores.baselines["j >= i-1"]
    assert {key: scores[key] for key in rule} == pytest.approx(rule)


def trivial_pairs(corpus: Corpus) -> list[SimpleNamespace]:
    """Every pair j <= i with its key, gold and target's emotion."""
    return [
        SimpleNamespace(
            key=(d.id, u.turn, j), emotion=u.emotion, is_cause=any(e.turn == j for e in u.evidence or ())
        )
        for d in corpus.dialogues
        for u in d.utterances
        for j in range(1, u.turn + 1)
    ]


@pytest.mark.parametrize("universe", ["fold1", "all", "gold-emotions"])
@pytest.mark.parametrize("protocol", ["reccon", "squad"])
def test_the_distance_from_the_rule_is_that_of_its_predictions(universe, protocol):
    corpus = read_corpus(bundled_sample("test"))
    options = {"universe": universe, "protocol": protocol}
    rules = trivial_predictions(corpus, "all")
    rule = evaluate(corpus, rules["j >= i-1"], **options)
    other = evaluate(corpus, rules["j = i"], **options)
    for scores in (rule, other):
        found = distance_from_rule(scores.sums_by_dialogue, scores.rule_sums(), STRICT_KEYS)
        for key, distance in found.items():
            assert distance.difference == pytest.approx(scores[key] - rule[key])
            assert distance.low <= distance.difference <= distance.high
            if scores is rule:
                assert (distance.low, distance.high) == (0, 0)
    # The interval is that of a paired comparison, but for the samples that were drawn.
    key = "utterance_positive_f1"
    compared = compare_systems(other.sums_by_dialogue, rule.sums_by_dialogue, keys=[key])[key]
    assert found[key].low == pytest.approx(compared.low, abs=1.0)
    assert found[key].high == pytest.approx(compared.high, abs=1.0)
