"""A plan at scale: its figures follow from its parts, and the measured ones are those of the records."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdecs.errors import ConfigError
from kdecs.soft_labels import export
from kdecs.soft_labels.config import ExportConfig
from kdecs.teacher.plan import scale, search, simulation
from kdecs.teacher.plan.activations import Activations, ActivationTracer
from kdecs.teacher.plan.planning import PlanRequest
from kdecs.teacher.plan.scale import ScalePlan, plan_at_scale

BUDGET = "batches.micro_batch_tokens=4096"


@pytest.fixture(scope="module", autouse=True)
def quick_plans(planned_once: None) -> Iterator[None]:
    """How much memory a network's traces find is no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationTracer, "memory", lambda *_, **__: Activations(10**9, 10**8, 1000))
        patch.setattr(scale, "_EVENTS", 20_000)
        yield


def make(corpus: Path, *settings: str, gpus: int = 16) -> ScalePlan:
    return plan_at_scale(
        PlanRequest("smollm2-135m", gpus=gpus, gpu="a100-40g", corpus=corpus, settings=[BUDGET, *settings])
    )


@pytest.fixture(scope="module")
def hundred_million(few_dialogues: Path) -> ScalePlan:
    return make(few_dialogues, "pairs=1e8", "price_per_gpu_hour=2.5")


def demand(plan: ScalePlan, part: str) -> scale.Demand:
    return next(each for each in plan.demands if part in each.part)


def test_times_follow_from_the_layout(hundred_million: ScalePlan) -> None:
    plan, best = hundred_million, hundred_million.best
    epochs = plan.layouts.planner.training.config.optimization.epochs
    assert plan.pairs == pytest.approx(1e8)
    assert all(row.wall_s > epochs * best.time.total_s for row in plan.training)
    labelling = plan.layouts.planner.labelling_s()
    assert labelling / 16 < best.time.compute_s
    assert all(row.wall_s > labelling / 16 for row in plan.export)
    for row in (*plan.training, *plan.export):
        assert row.gpu_hours == pytest.approx(16 * row.wall_s / 3600)
        assert row.price == pytest.approx(2.5 * row.gpu_hours)
        assert row.failures == pytest.approx(row.gpu_hours / 50_000)


def test_longer_intervals_and_larger_shards_lose_more(few_dialogues: Path) -> None:
    plan = make(few_dialogues, "pairs=1e8", "mtbf_hours=50", "start_s=60")
    for rows in (plan.training, plan.export):
        each = sorted(rows, key=lambda row: row.seconds_each)
        assert [row.lost_gpu_hours for row in each] == sorted(row.lost_gpu_hours for row in each)
        assert each[0].lost_gpu_hours < each[-1].lost_gpu_hours
    best = next(row for row in plan.training if row.setting == plan.young_daly_steps)
    assert best.wall_s == min(row.wall_s for row in plan.training)


def test_what_is_lost_is_half_of_what_was_at_stake(hundred_million: ScalePlan, few_dialogues: Path) -> None:
    # The same is said where failures are too rare to be met in a simulation and where they are not.
    often = make(few_dialogues, "pairs=1e8", "mtbf_hours=500")
    for plan in (hundred_million, often):
        for row in plan.export:
            assert row.lost_gpu_hours / row.failures == pytest.approx(row.seconds_each / 2 / 3600, rel=0.25)


@pytest.mark.parametrize("part", ["prompts in memory", "joining labels"])
def test_a_part_breaks_where_it_says(part: str, hundred_million: ScalePlan, few_dialogues: Path) -> None:
    above = demand(hundred_million, part).breaks_above(pairs=1e8, gpus=16)
    assert demand(make(few_dialogues, f"pairs={round(above)}"), part).load == pytest.approx(1, rel=1e-3)


def test_the_first_to_break_is_named_with_its_numbers_and_a_way_out(few_dialogues: Path) -> None:
    # 64 GPUs share 64 pairs in trees of at most 32, and one claim or plan in a tenth of a short labelling.
    plan = make(few_dialogues, "pairs=1000000", gpus=64)
    first = plan.demands[0]
    assert first.load == max(each.load for each in plan.demands) > 1
    assert plan.what_breaks_first().startswith(f"First to break: {first.part}: ")
    assert plan.what_breaks_first().endswith(first.remedy)
    batch = demand(plan, "global batch")
    assert (batch.need, round(batch.breaks_above(pairs=1e6, gpus=64), 6)) == (64, round(batch.limit, 6))
    wanted = batch.remedy.partition("global_batch_pairs to ")[2].partition(", which")[0].replace(",", "")
    wider = make(few_dialogues, "pairs=1000000", f"batches.global_batch_pairs={wanted}", gpus=64)
    assert demand(wider, "global batch").load < 1.5
    # One GPU labels for long enough that nothing matters.
    small = make(few_dialogues, "pairs=1000000", "mfu=0.01", gpus=1)
    assert small.what_breaks_first().startswith("Nothing breaks at this size; the nearest limit is ")


def test_more_workers_read_and_claim_more(hundred_million: ScalePlan, few_dialogues: Path) -> None:
    settings = ("pairs=1e8", "num_shards=5000")
    few, many = make(few_dialogues, *settings, gpus=16), make(few_dialogues, *settings, gpus=64)
    for part in ("read back", "claims"):
        # Four times the workers do four times as much, in a quarter of the time.
        assert demand(many, part).load == pytest.approx(16 * demand(few, part).load, rel=1e-6)
    assert demand(many, "planning while").load == pytest.approx(
        4 * demand(few, "planning while").load, rel=1e-6
    )


def test_measured_figures_are_those_of_the_records(root: Path) -> None:
    results = root / "benchmarks" / "results"
    limits = json.loads((results / "scale_limits.json").read_text())["details"]
    labels = json.loads((results / "soft_label_bytes.json").read_text())["ours"]
    slopes = limits["slopes"]
    measured = {
        "LABEL_BYTES": labels,
        "JOINED_BYTES": limits["joined_bytes_a_pair"],
        "JOIN_BYTES": slopes["join"]["bytes_a_pair"],
        "PLAN_BYTES": slopes["plan"]["bytes_a_pair"],
        "PLAN_SECONDS": slopes["plan"]["seconds_a_pair"],
        "PREPARE_BYTES": slopes["prepare"]["bytes_a_pair"],
        "PREPARE_SECONDS": slopes["prepare"]["seconds_a_pair"],
        "TRIAL_SECONDS": limits["mlflow_trial_seconds"],
    }
    for name, value in measured.items():
        assert getattr(scale, name) == pytest.approx(value, rel=0.03), name


def test_a_work_that_never_ends_is_said_to_be_so(
    few_dialogues: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "MAX_FAILURES", 100)
    plan = make(few_dialogues, "pairs=1000000", "mtbf_hours=0.001", "start_s=600")
    assert all(row.wall_s == math.inf for row in plan.training)
    record = json.loads(json.dumps(plan.as_record(), allow_nan=False))
    assert [row["wall_s"] for row in record["training"]] == [None] * len(plan.training)


def test_nothing_fits(few_dialogues: Path) -> None:
    with pytest.raises(ConfigError, match="nothing fits"):
        plan_at_scale(
            PlanRequest("smollm2-135m", gpu_memory_gib=0.5, corpus=few_dialogues, settings=[BUDGET])
        )


def test_shards_and_leases_are_those_of_the_export() -> None:
    assert (scale.WANTED_SHARD_S, scale.MAX_SHARDS) == (export.WANTED_SHARD_S, export.MAX_SHARDS)
    defaults = ExportConfig.model_fields
    assert defaults["micro_batch_tokens"].default == search.EXPORT_MICRO_BATCH_TOKENS
    assert defaults["lease_s"].default == scale.ScaleAssumptions().lease_s
