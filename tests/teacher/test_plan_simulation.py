"""The simulation of failing trainings and exports: against a loop over single steps, rows worked by hand, and Daly."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kdecs.soft_labels import claims
from kdecs.teacher.plan import simulation
from kdecs.teacher.plan.simulation import (
    ExportRun,
    Lifetimes,
    Outcome,
    TrainingRun,
    best_interval_s,
    expected_training_s,
    mean_export,
    mean_training,
    random_lifetimes,
    simulate_export,
    simulate_training,
)

TRAINING = TrainingRun(
    steps=25, step_s=2.0, checkpoint_every_steps=10, checkpoint_s=3.0, start_s=7.0, finish_s=1.0
)
EXPORT = ExportRun(workers=2, shards=4, shard_s=10.0, claim_s=1.0, start_s=5.0, lease_s=50.0, finish_s=2.0)


def lives(*lifetimes: float) -> Lifetimes:
    """These lifetimes; whoever starts after them never fails."""
    return itertools.chain(lifetimes, itertools.repeat(math.inf))


def step_by_step(run: TrainingRun, lifetimes: Lifetimes) -> Outcome:
    """The slow oracle: every step and checkpoint is one piece of time that a failure may hit."""
    clock, saved, failures, lost = 0.0, 0, 0, 0.0
    while True:
        life, spent, step, at_risk = next(lifetimes), run.start_s, saved, 0.0
        if life < spent:
            clock, failures = clock + life, failures + 1
            continue
        has_failed = False
        while step < run.steps:
            pieces = [run.step_s]
            if (step + 1) % run.checkpoint_every_steps == 0 or step + 1 == run.steps:
                pieces.append(run.checkpoint_s)
            if life < spent + sum(pieces):
                has_failed = True
                at_risk += life - spent
                break
            spent, at_risk, step = spent + sum(pieces), at_risk + sum(pieces), step + 1
            if len(pieces) == 2:
                saved, at_risk = step, 0.0
        if has_failed or life < spent + run.finish_s:
            clock, failures = clock + life, failures + 1
            lost += at_risk if has_failed else life - spent
            continue
        return Outcome(clock + spent + run.finish_s, failures, lost, clock + spent + run.finish_s)


def test_a_training_by_hand() -> None:
    # 7 to start, 25 steps of 2, checkpoints after steps 10, 20 and 25, 1 to finish.
    assert simulate_training(TRAINING, lives()).wall_s == 7 + 50 + 9 + 1
    # 40 s: 7 to start, 23 for ten steps and their checkpoint, and five steps (10 s) that are lost.
    outcome = simulate_training(TRAINING, lives(40.0))
    assert (outcome.failures, outcome.lost_s) == (1, 10.0)
    assert outcome.wall_s == 40 + 7 + 15 * 2 + 2 * 3 + 1
    # A failure during a checkpoint costs the steps before it; one during a start costs only time.
    assert simulate_training(TRAINING, lives(29.0)).lost_s == 22.0
    assert simulate_training(TRAINING, lives(6.0)).lost_s == 0.0


def test_jumps_from_failure_to_failure_agree_with_a_loop_over_steps() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        run = TrainingRun(
            steps=int(rng.integers(1, 60)),
            step_s=float(rng.uniform(0.1, 3)),
            checkpoint_every_steps=int(rng.integers(1, 25)),
            checkpoint_s=float(rng.uniform(0.1, 4)),
            start_s=float(rng.uniform(0, 10)),
            finish_s=float(rng.uniform(0, 2)),
        )
        times = list(rng.exponential(40, 30))
        found, expected = simulate_training(run, lives(*times)), step_by_step(run, lives(*times))
        assert found.failures == expected.failures
        assert (found.wall_s, found.lost_s) == pytest.approx((expected.wall_s, expected.lost_s))


@pytest.mark.parametrize("mtbf_s", [200.0, 1_000.0, 20_000.0])
def test_the_mean_of_trainings_is_dalys(mtbf_s: float) -> None:
    run = TrainingRun(steps=1000, step_s=1.0, checkpoint_every_steps=50, checkpoint_s=5.0, start_s=30.0)
    found = mean_training(run, ranks=1, mtbf_s=mtbf_s, repeats=1000)
    assert found.wall_s == pytest.approx(expected_training_s(run, mtbf_s), rel=0.02)
    # Eight devices fail eight times as often as one.
    assert mean_training(run, ranks=8, mtbf_s=8 * mtbf_s, repeats=1000) == found


def test_youngs_interval_loses_least() -> None:
    run = TrainingRun(steps=20_000, step_s=1.0, checkpoint_every_steps=1, checkpoint_s=8.0, start_s=60.0)
    best = round(best_interval_s(run.checkpoint_s, 5_000.0))
    times = {
        every: expected_training_s(replace(run, checkpoint_every_steps=every), 5_000.0)
        for every in range(20, 2000, 20)
    }
    assert abs(min(times, key=lambda every: times[every]) - best) <= 0.05 * best
    assert best_interval_s(checkpoint_s=100.0, mtbf_s=50.0) == 50.0


def export(run: ExportRun, *of_workers: Lifetimes) -> Outcome:
    workers = of_workers or (lives(),) * run.workers
    return simulate_export(run, lambda worker: workers[worker], np.random.default_rng(0))


def test_an_export_by_hand() -> None:
    assert export(EXPORT).wall_s == 5 + 2 * 11 + 2
    # Three shards on two workers take two rounds as well; seven workers take one.
    assert export(replace(EXPORT, shards=3)).wall_s == 5 + 2 * 11 + 2
    assert export(replace(EXPORT, workers=7)).wall_s == 5 + 11 + 2
    assert export(EXPORT).busy_s == 4 * 10


def test_a_dead_workers_shard_is_taken_over_once_its_lease_has_expired() -> None:
    # The second worker dies at 12, six seconds into its first shard, and is back at 17. Both look for shards until 39;
    # the lost one is free between 40 and 50 s after the death, and then takes 11 s.
    outcome = export(EXPORT, lives(), lives(12.0))
    assert (outcome.failures, outcome.lost_s, outcome.busy_s) == (1, 6.0, 46.0)
    assert 12 + 40 + 11 <= outcome.wall_s - EXPORT.finish_s <= 12 + 50 + EXPORT.poll_s / 2 + 11
    # Where others see the death at once, as on one host, nobody waits for a lease: the first worker labels three shards
    # in a row, and the second one, back at 17, the fourth.
    assert export(replace(EXPORT, lease_s=0.0), lives(), lives(12.0)).wall_s == 5 + 3 * 11 + 2


def test_a_worker_that_dies_while_it_starts_or_waits_loses_no_shard() -> None:
    alone = replace(EXPORT, workers=1)
    outcome = export(alone, lives(3.0))
    assert (outcome.failures, outcome.lost_s, outcome.wall_s) == (1, 0.0, 3 + 5 + 4 * 11 + 2)
    one_shard = replace(EXPORT, shards=1)
    assert export(one_shard, lives(), lives(7.0)).lost_s == 0.0


def test_an_export_by_one_worker_is_a_training_with_a_checkpoint_after_each_shard() -> None:
    run = ExportRun(workers=1, shards=40, shard_s=50, claim_s=5, start_s=30, lease_s=0, poll_s=0)
    like = TrainingRun(steps=40, step_s=50, checkpoint_every_steps=1, checkpoint_s=5, start_s=30)
    found = mean_export(run, mtbf_s=300, repeats=400)
    assert found.wall_s == pytest.approx(expected_training_s(like, 300), rel=0.02)


def test_every_shard_is_published_once_whatever_fails() -> None:
    rng = np.random.default_rng(7)
    for workers, lease_s in itertools.product((1, 3, 16), (0.0, 5.0, 100.0)):
        run = replace(EXPORT, workers=workers, shards=50, lease_s=lease_s)
        outcome = simulate_export(run, lambda _: random_lifetimes(60.0, rng), rng)
        assert outcome.failures > 0
        assert outcome.busy_s - outcome.lost_s == pytest.approx(50 * run.shard_s)
        assert outcome.wall_s > 50 * run.shard_s / workers


def test_equal_seeds_give_equal_outcomes_and_a_hopeless_run_has_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert mean_export(EXPORT, mtbf_s=30, repeats=5) == mean_export(EXPORT, mtbf_s=30, repeats=5)
    assert mean_export(EXPORT, mtbf_s=30, repeats=5) != mean_export(EXPORT, mtbf_s=30, repeats=5, seed=1)
    monkeypatch.setattr(simulation, "MAX_FAILURES", 50)
    assert mean_training(TRAINING, ranks=1, mtbf_s=0.1, repeats=2).wall_s == math.inf
    assert mean_export(EXPORT, mtbf_s=0.1, repeats=2).wall_s == math.inf


def test_lifetimes_are_exponential_and_infinite_where_nothing_fails() -> None:
    drawn: Iterator[float] = random_lifetimes(8.0, np.random.default_rng(0))
    sample = np.array(list(itertools.islice(drawn, 20_000)))
    assert sample.mean() == pytest.approx(8.0, rel=0.03)
    assert (sample > 8.0).mean() == pytest.approx(math.exp(-1), abs=0.01)
    assert next(random_lifetimes(math.inf, np.random.default_rng(0))) == math.inf


def test_leases_are_renewed_as_the_export_renews_them() -> None:
    assert simulation.RENEWALS_PER_LEASE == claims._RENEWALS_PER_LEASE
