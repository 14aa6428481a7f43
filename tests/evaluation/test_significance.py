import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.metrics import SCORE_KEYS, evaluate, metrics_of
from kdecs.evaluation.significance import bootstrap_intervals, compare_systems, holm, summarise_seeds


@pytest.fixture(scope="module")
def sums():
    """Contributions by dialogue of two rules on the bundled test sample: (18, K) each."""
    corpus = read_corpus(bundled_sample("test"))
    rules = trivial_predictions(corpus, "fold1")
    return [evaluate(corpus, rules[name]).sums_by_dialogue for name in ("j >= i-1", "j = i")]


def test_intervals_agree_with_a_plain_bootstrap(sums):
    found = bootstrap_intervals(sums[0], num_samples=4000, seed=1)
    rng = np.random.default_rng(7)
    drawn = [metrics_of(sums[0][rng.integers(18, size=18)].sum(axis=0)) for _ in range(4000)]
    for key in SCORE_KEYS:
        low, high = np.percentile([float(values[key]) for values in drawn], [2.5, 97.5])
        assert found[key] == (pytest.approx(low, abs=1.2), pytest.approx(high, abs=1.2)), key


def test_intervals_are_seeded_and_hold_the_score(sums):
    first = bootstrap_intervals(sums[0], num_samples=500, seed=3)
    assert first == bootstrap_intervals(sums[0], num_samples=500, seed=3)
    assert first != bootstrap_intervals(sums[0], num_samples=500, seed=4)
    total = metrics_of(sums[0].sum(axis=0))
    for key, (low, high) in first.items():
        assert low <= total[key] <= high
    narrow = bootstrap_intervals(sums[0], num_samples=500, seed=3, level=0.5)["macro_f1"]
    assert first["macro_f1"][0] < narrow[0] < narrow[1] < first["macro_f1"][1]


def test_intervals_cover_at_the_named_rate():
    """Of 200 corpora drawn from one population, about 95% of the intervals hold its accuracy."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        sums = np.zeros((60, 15))
        decided = rng.integers(5, 15, size=60)
        sums[:, -1] = decided
        sums[:, -2] = rng.binomial(decided, 0.6)
        low, high = bootstrap_intervals(sums, num_samples=300, seed=seed)["emotion_accuracy"]
        held += low <= 60 <= high
    assert 0.89 <= held / 200 <= 0.99


def test_one_dialogue_has_no_spread(sums):
    one = sums[0][:1]
    low, high = bootstrap_intervals(one)["macro_f1"]
    assert low == high == float(metrics_of(one.sum(axis=0))["macro_f1"])
    assert compare_systems(one, sums[1][:1], keys=["macro_f1"])["macro_f1"].p == 1


def test_the_permutation_p_is_exact_for_few_dialogues(sums):
    a, b = sums[0][:7], sums[1][:7]
    found = compare_systems(a, b, keys=["utterance_macro_f1"], num_samples=1000)["utterance_macro_f1"]
    differences = []
    for swaps in itertools.product([False, True], repeat=7):
        swap = np.array(swaps)[:, None]
        left, right = np.where(swap, b, a).sum(axis=0), np.where(swap, a, b).sum(axis=0)
        key = "utterance_macro_f1"
        differences.append(float(metrics_of(left)[key] - metrics_of(right)[key]))
    above = np.mean([d >= found.difference - 1e-9 for d in differences])
    below = np.mean([d <= found.difference + 1e-9 for d in differences])
    assert found.p == pytest.approx(min(1, 2 * min(above, below)))


def test_a_comparison_is_paired_and_antisymmetric(sums):
    forth = compare_systems(*sums, num_samples=1000)
    back = compare_systems(*reversed(sums), num_samples=1000)
    for key in SCORE_KEYS:
        assert forth[key].difference == pytest.approx(forth[key].a - forth[key].b)
        assert forth[key].difference == -back[key].difference
        assert forth[key].low == pytest.approx(-back[key].high, abs=1e-9)
        assert forth[key].low <= forth[key].difference <= forth[key].high
    same = compare_systems(sums[0], sums[0], num_samples=200)
    assert all((found.difference, found.low, found.high, found.p) == (0, 0, 0, 1) for found in same.values())


def test_a_real_difference_is_found_and_noise_is_not():
    rng = np.random.default_rng(5)

    def system(accuracy: float) -> np.ndarray:
        sums = np.zeros((100, 15))
        sums[:, -1] = 10
        sums[:, -2] = rng.binomial(10, accuracy, size=100)
        return sums

    better = compare_systems(system(0.7), system(0.6), keys=["emotion_accuracy"])["emotion_accuracy"]
    assert better.p < 0.01
    assert better.low > 0
    p_values = [
        compare_systems(system(0.6), system(0.6), keys=["emotion_accuracy"], num_samples=200)[
            "emotion_accuracy"
        ].p
        for _ in range(40)
    ]
    assert sum(p < 0.05 for p in p_values) <= 6


def test_other_corpora_cannot_be_compared(sums):
    with pytest.raises(ValueError, match="expected two systems on the same corpus"):
        compare_systems(sums[0], sums[1][:-1])


def test_seeds_are_summarised():
    values = [58.1, 59.3, 58.7, 57.9, 58.6]
    found = summarise_seeds(values)
    assert found.mean == pytest.approx(58.52)
    assert found.std == pytest.approx(0.5495, abs=1e-4)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    one = summarise_seeds([58.1])
    assert (one.num_seeds, one.mean, one.std, one.low, one.high) == (1, 58.1, None, None, None)
    for wrong in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite values"):
            summarise_seeds(wrong)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        ([0.03], [0.03]),
        (
            [0.01, 0.04, 0.03],
            [0.03, 0.06, 0.06],
        ),  # 3 x 0.01, then 2 x 0.03, which 1 x 0.04 must not fall below
        ([0.4, 0.6, 0.001], [0.8, 0.8, 0.003]),
        ([0.9, 0.8], [1.0, 1.0]),
    ],
)
def test_holm_by_hand(given, expected):
    assert holm(given) == pytest.approx(expected)
