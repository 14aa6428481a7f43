"""A simulation of trainings and exports on devices that fail: how long they take, and what failures cost.

Times are seconds. A simulation jumps from event to event and draws every moment of failure from a seeded generator, so
equal seeds give equal outcomes.

    failures    each device fails at random, on average once per `mtbf_s` of running (an exponential law); a start that
                follows a failure takes `start_s`, and a device may fail again while it starts
    training    all ranks move in step, so the failure of one ends the launch. The next launch goes on from the last
                complete checkpoint; steps since then, and a checkpoint that was being written, are lost
    export      each worker claims a free shard, labels and publishes it. A worker that fails loses its shard: the
                claim is free `lease_s` after its last renewal (the export renews five times per lease), and any worker
                takes the shard over. Workers that find nothing free look again every `poll_s`
    end         `finish_s` after the last step, or the last shard, the manifest is written

Left out: steps and shards that take longer than others, failures that hit several devices at once (a node, a switch,
the shared storage), waiting for a scheduler, traffic that slows other traffic, and everything else that is not failing.
`benchmarks/scale_simulator.py` compares the simulation with real runs that are killed.
"""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

RENEWALS_PER_LEASE = 5
"""As in `kdecs.soft_labels.claims`, which this package may not import."""
MAX_FAILURES = 100_000
"""A work that fails more often than this has no end worth waiting for; its time is infinite."""

Lifetimes = Iterator[float]
"""Seconds from each start of a launch or a worker to its failure."""


@dataclass(frozen=True)
class TrainingRun:
    """A training of `steps` steps by ranks that move together."""

    steps: int
    step_s: float
    checkpoint_every_steps: int
    checkpoint_s: float
    start_s: float
    finish_s: float = 0.0


@dataclass(frozen=True)
class ExportRun:
    """An export of equal shards by workers that share nothing but the directory.

    `lease_s` is 0 if the others see at once that a worker is gone, as on one host.
    """

    workers: int
    shards: int
    shard_s: float
    claim_s: float
    start_s: float
    lease_s: float
    poll_s: float = 0.5
    finish_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a run took. `lost_s` is labelling or stepping that had to be done again, `busy_s` all but waiting.

    Both add the seconds of all workers of an export, and count those of a training once for all its ranks.
    """

    wall_s: float
    failures: float
    lost_s: float
    busy_s: float


def random_lifetimes(mtbf_s: float, rng: np.random.Generator) -> Lifetimes:
    """Exponential lifetimes with this mean; devices of an infinite one never fail."""
    while True:
        yield float(rng.exponential(mtbf_s)) if math.isfinite(mtbf_s) else math.inf


def simulate_training(run: TrainingRun, lifetimes: Lifetimes) -> Outcome:
    """One course of a training whose launches live as long as `lifetimes` says."""
    every = run.checkpoint_every_steps
    interval_s = every * run.step_s + run.checkpoint_s
    clock = lost = 0.0
    saved = failures = 0  # `saved`: steps of the last complete checkpoint
    while failures <= MAX_FAILURES:
        left = run.steps - saved
        # The last checkpoint follows the last step, whether or not its interval is full.
        work_s = left * run.step_s + math.ceil(left / every) * run.checkpoint_s
        needed = run.start_s + work_s + run.finish_s
        life = next(lifetimes)
        if life >= needed:
            return Outcome(clock + needed, failures, lost, clock + needed)
        clock += life
        failures += 1
        worked = max(0.0, life - run.start_s)
        if worked >= work_s:  # it failed while it finished
            saved, safe_s = run.steps, work_s
        else:
            intervals = int(worked / interval_s)
            saved, safe_s = saved + intervals * every, intervals * interval_s
        lost += worked - safe_s
    return Outcome(math.inf, failures, math.inf, math.inf)


def simulate_export(
    run: ExportRun, lifetimes: Callable[[int], Lifetimes], rng: np.random.Generator
) -> Outcome:
    """One course of an export; `lifetimes` gives each worker's, and `rng` when a lease was last renewed."""
    lives = [lifetimes(worker) for worker in range(run.workers)]
    dies_at = [next(life) for life in lives]
    events: list[tuple[float, int, str, int]] = [(run.start_s, n, "looks", n) for n in range(run.workers)]
    number = run.workers  # tells events of one moment apart
    free, published, failures = run.shards, 0, 0
    waiting: list[int] = []
    lost = busy = clock = 0.0

    def happens(at: float, what: str, worker: int) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (at, number, what, worker))

    while published < run.shards:
        if failures > MAX_FAILURES:
            return Outcome(math.inf, failures, math.inf, math.inf)
        clock, _, what, worker = heapq.heappop(events)
        if what == "freed":
            free += 1
            if waiting:
                happens(clock + run.poll_s / 2, "looks", waiting.pop())
            continue
        if what == "published":
            published += 1
        ready = clock
        while dies_at[worker] <= clock:  # while it started or waited, so that no shard is lost
            failures += 1
            ready = max(clock, dies_at[worker] + run.start_s)
            dies_at[worker] += next(lives[worker])
        if ready > clock:
            happens(ready, "looks", worker)
        elif not free:
            waiting.append(worker)
        else:
            free -= 1
            ends = clock + run.claim_s + run.shard_s
            if dies_at[worker] > ends:
                busy += run.shard_s
                happens(ends, "published", worker)
                continue
            died = dies_at[worker]
            failures += 1
            labelled = max(0.0, died - clock - run.claim_s)
            lost, busy = lost + labelled, busy + labelled
            silent = rng.uniform(0.0, run.lease_s / RENEWALS_PER_LEASE)
            happens(died + max(0.0, run.lease_s - silent), "freed", worker)
            dies_at[worker] = died + next(lives[worker])
            happens(died + run.start_s, "looks", worker)
    return Outcome(clock + run.finish_s, failures, lost, busy)


def mean_training(run: TrainingRun, *, ranks: int, mtbf_s: float, repeats: int, seed: int = 0) -> Outcome:
    """The mean of several simulated courses, each with other failures."""
    rng = np.random.default_rng(seed)
    # The first failure of any of `ranks` devices comes that much sooner.
    return _mean([simulate_training(run, random_lifetimes(mtbf_s / ranks, rng)) for _ in range(repeats)])


def mean_export(run: ExportRun, *, mtbf_s: float, repeats: int, seed: int = 0) -> Outcome:
    """The mean of several simulated courses, each with other failures."""
    rng = np.random.default_rng(seed)
    return _mean([simulate_export(run, lambda _: random_lifetimes(mtbf_s, rng), rng) for _ in range(repeats)])


def _mean(outcomes: list[Outcome]) -> Outcome:
    names = ("wall_s", "failures", "lost_s", "busy_s")
    return replace(outcomes[0], **{name: fmean(getattr(o, name) for o in outcomes) for name in names})


def expected_training_s(run: TrainingRun, mtbf_s: float) -> float:
    """The expected time by Daly (2006), Eq. 13, where `mtbf_s` is that of the whole launch:

        T = M · exp(R / M) · (exp((τ + C) / M) - 1) · (work / τ)

    for intervals of τ seconds, checkpoints of C and restarts of R. The first start is added.
    """
    work_s, interval_s = run.steps * run.step_s, run.checkpoint_every_steps * run.step_s
    start = mtbf_s * math.expm1(run.start_s / mtbf_s)
    one = mtbf_s * math.exp(run.start_s / mtbf_s) * math.expm1((interval_s + run.checkpoint_s) / mtbf_s)
    return start + one * work_s / interval_s


def best_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints that lose least, by Young (1974) with Daly's correction: √(2CM) - C.

    A checkpoint that takes as long as the launch lives leaves nothing better than M itself (Daly 2006, Eq. 20).
    """
    if checkpoint_s >= mtbf_s / 2:
        return mtbf_s
    return math.sqrt(2 * checkpoint_s * mtbf_s) - checkpoint_s
