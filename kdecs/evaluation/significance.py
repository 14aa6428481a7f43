"""The uncertainty of scores: bootstrap over dialogues, paired comparison of two systems, spread over seeds.

Whole dialogues are drawn, since the pairs of one dialogue depend on each other. All scores are in percent. Under the
protocol reccon-released, incorrect positives count in every sample as they do in the whole corpus.

Shapes: D dialogues, K contributions (kdecs.evaluation.rows), S scores (SCORE_KEYS).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdecs.evaluation.metrics import SCORE_KEYS, metrics_of

_BATCH_DIALOGUES = 50_000  # drawn at a time over all samples, which bounds their contributions to 6 MB


Statistic = Callable[..., NDArray[np.float64]]
Metrics = Callable[[NDArray[np.float64]], dict[str, NDArray[np.float64]]]
"""From contributions summed to (…, K) to every score of a protocol, each of the shape (…)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Score of A minus score of B: the difference, its interval, and the two-sided p."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class SeedSummary:
    """Mean, sample standard deviation and t interval of the mean; the last three are None for one value."""

    num_seeds: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


def bootstrap_intervals(
    sums_by_dialogue: NDArray[np.float64],
    *,
    num_samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    metrics: Metrics = metrics_of,
) -> dict[str, tuple[float, float]]:
    """(low, high) of each score: percentile bootstrap over the D dialogues of (D, K) sums.

    With fewer than two dialogues there is no spread, and both ends equal the score. `metrics` are the protocol's.
    """
    low, high = _bootstrap(
        _scores_of(sums_by_dialogue, metrics), len(sums_by_dialogue), num_samples, seed, level
    )
    return {key: (float(low[n]), float(high[n])) for n, key in enumerate(_keys(sums_by_dialogue, metrics))}


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a score is above a rule's on the same dialogues, with the ends of its interval."""

    difference: float
    low: float
    high: float


def distance_from_rule(
    sums: NDArray[np.float64],
    rule_sums: NDArray[np.float64],
    keys: Sequence[str],
    *,
    num_samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    metrics: Metrics = metrics_of,
) -> dict[str, Distance]:
    """The distance of each score from the rule's: percentile bootstrap over the D dialogues, the same for both.

    Without scipy, which takes longer to import than this takes to compute: every report has these.
    """
    whole, of_rule = metrics(sums.sum(axis=0)), metrics(rule_sums.sum(axis=0))
    num_dialogues = len(sums)
    rng = np.random.default_rng(seed)
    # How often each dialogue is drawn, a sample in a row: the sums of all samples are one product of matrices.
    shares = np.full(num_dialogues, 1 / max(1, num_dialogues))
    counts = rng.multinomial(num_dialogues, shares, size=num_samples).astype(np.float64)
    drawn, drawn_of_rule = metrics(counts @ sums), metrics(counts @ rule_sums)
    tails = ((1 - level) / 2, (1 + level) / 2)
    found = {}
    for key in keys:
        low, high = np.quantile(drawn[key] - drawn_of_rule[key], tails)
        found[key] = Distance(float(whole[key] - of_rule[key]), float(low), float(high))
    return found


def compare_systems(
    sums_a: NDArray[np.float64],
    sums_b: NDArray[np.float64],
    *,
    keys: Sequence[str] = SCORE_KEYS,
    num_samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    metrics: Metrics = metrics_of,
) -> dict[str, Comparison]:
    """Compare A with B on the same D dialogues: for each score a paired bootstrap interval and permutation p.

    The test swaps the results of both systems for random dialogues (scipy.stats.permutation_test, "samples").
    """
    if sums_a.shape != sums_b.shape:
        raise ValueError(
            f"found sums of the shapes {sums_a.shape} and {sums_b.shape}, expected two systems on the same corpus"
        )
    num_dialogues = len(sums_a)
    score_a, score_b = _scores_of(sums_a, metrics), _scores_of(sums_b, metrics)
    all_keys = _keys(sums_a, metrics)

    def difference(index: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        return np.subtract(score_a(index, axis), score_b(index, axis))

    low, high = _bootstrap(difference, num_dialogues, num_samples, seed, level)
    everything = np.arange(num_dialogues)
    a, b = score_a(everything), score_b(everything)
    found = {}
    for key in keys:
        n = all_keys.index(key)
        p = _permutation_p(sums_a, sums_b, key, num_samples, seed, metrics)
        found[key] = Comparison(
            float(a[n]), float(b[n]), float(a[n] - b[n]), float(low[n]), float(high[n]), p
        )
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for all of them together (Holm 1979), in the same order, each at least as large as before.

    Below 0.05 after the correction, the chance of a single false finding among all of them is below 0.05.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def summarise_seeds(values: Sequence[float], *, level: float = 0.95) -> SeedSummary:
    """Mean, standard deviation (n - 1) and Student's t interval of a score over runs that differ in seed."""
    from scipy import stats

    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a summary needs finite values, found {list(values)}")
    mean = float(np.mean(values))
    if len(values) == 1:
        return SeedSummary(1, mean, None, None, None)
    # n - 1, since the seeds are a sample of all seeds; with numpy's n five seeds would look a tenth steadier.
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return SeedSummary(len(values), mean, std, mean - half, mean + half)


def _keys(sums: NDArray[np.float64], metrics: Metrics) -> list[str]:
    return list(metrics(sums[:0].sum(axis=0)))


def _scores_of(sums: NDArray[np.float64], metrics: Metrics) -> Statistic:
    """A statistic that maps dialogue indices (…, D) to every score of the drawn dialogues (S, …)."""

    def statistic(index: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        # Sums first, scores after: F1 of the drawn corpus is not the mean of the dialogues' F1.
        drawn = sums[np.moveaxis(index, axis, -1)].sum(axis=-2)
        return np.stack(list(metrics(drawn).values()))

    return statistic


def _bootstrap(
    statistic: Statistic, num_dialogues: int, num_samples: int, seed: int, level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from scipy import stats

    if num_dialogues < 2:
        values = statistic(np.arange(num_dialogues))
        return values, values
    result = stats.bootstrap(
        # Dialogue numbers, drawn with replacement; `statistic` looks up their sums.
        (np.arange(num_dialogues),),
        statistic,
        n_resamples=num_samples,
        batch=_batch(num_dialogues),
        vectorized=True,
        # Not BCa, whose jackknife would score the corpus once more for every dialogue.
        method="percentile",
        confidence_level=level,
        rng=np.random.default_rng(seed),
    )
    return result.confidence_interval.low, result.confidence_interval.high


def _batch(num_dialogues: int) -> int:
    return max(1, _BATCH_DIALOGUES // num_dialogues)


def _permutation_p(
    sums_a: NDArray[np.float64],
    sums_b: NDArray[np.float64],
    key: str,
    num_samples: int,
    seed: int,
    metrics: Metrics,
) -> float:
    # With a single dialogue there is nothing to swap that would change a difference's size.
    if len(sums_a) < 2:
        return 1.0
    from scipy import stats

    # scipy permutes one-dimensional samples, so it is given row numbers of this table instead of the rows.
    both = np.concatenate([sums_a, sums_b])
    num_dialogues = len(sums_a)

    def difference(x: NDArray[np.int64], y: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        x, y = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
        return np.subtract(metrics(both[x].sum(axis=-2))[key], metrics(both[y].sum(axis=-2))[key])

    result = stats.permutation_test(
        (np.arange(num_dialogues), np.arange(num_dialogues) + num_dialogues),
        difference,
        # Pairs are kept: each dialogue may swap its two systems, but no result moves to another dialogue.
        permutation_type="samples",
        vectorized=True,
        n_resamples=num_samples,
        batch=_batch(num_dialogues),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
