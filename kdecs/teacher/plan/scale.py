"""`kdecs plan --scale`: a teacher's training and its export over millions of pairs and up to a thousand GPUs.

The fastest layout that fits (`kdecs.teacher.plan.search`) gives the time of a step and of labelling a pair; the
simulation (`kdecs.teacher.plan.simulation`) adds failures, for several checkpoint intervals and shard sizes. Beside it
stands what each part of kdecs that sees all pairs in one place would need at this size, from measured figures.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import Field
from rich.table import Table

from kdecs.config import Config, load_config
from kdecs.errors import ConfigError
from kdecs.tables import figures_table
from kdecs.teacher.plan import report
from kdecs.teacher.plan.memory import GIB
from kdecs.teacher.plan.planning import LayoutPlan, PlanRequest, make_plan
from kdecs.teacher.plan.search import Layout
from kdecs.teacher.plan.shapes import DTYPE_BYTES
from kdecs.teacher.plan.simulation import (
    ExportRun,
    Outcome,
    TrainingRun,
    best_interval_s,
    mean_export,
    mean_training,
)

# Measured on this code: benchmarks/results/scale_limits.json, and soft_label_bytes.json for a label. A test compares
# them. Bytes are those of one process, seconds those of one core.
LABEL_BYTES = 29.46
JOINED_BYTES = 40.0
JOIN_BYTES = 94.8
PLAN_BYTES = 16.3
PLAN_SECONDS = 2.82e-6
PREPARE_BYTES = 1463.0
PREPARE_SECONDS = 3.54e-4
TRIAL_SECONDS = 0.0798
CLAIM_CALLS = 20
"""What a worker asks the file system for one look at a shard: to make, read, lock and remove the claim, and to find,
open and read the shard and its record. strace counts 40 system calls, half of which the kernel answers by itself."""

WANTED_SHARD_S = 600.0
MAX_SHARDS = 100_000
"""As in `kdecs.soft_labels.export`, which this package may not import."""
TOLERABLE_SHARE = 0.1
"""What one process does while all GPUs wait may take this share of the time that they work."""
_EVENTS = 200_000  # that all repeats of one simulation may take, about a second
_REPEATS = 100


class ScaleAssumptions(Config):
    """What a plan at scale assumes besides `Assumptions`."""

    price_per_gpu_hour: float | None = Field(
        default=None, ge=0, description="in any currency; null: no price"
    )
    # Llama 3 (Dubey et al. 2024): 419 unexpected interruptions of 16,384 GPUs in 54 days, 50,700 hours for each GPU.
    mtbf_hours: float = Field(
        default=50_000, gt=0, description="hours that a GPU runs, on average, before it fails"
    )
    start_s: float = Field(
        default=300,
        ge=0,
        description="seconds from a failure until the work goes on: queue, imports, weights",
    )
    storage_gb_s: float = Field(
        default=2, gt=0, description="GB/s of the shared storage, for all nodes together"
    )
    storage_calls_s: float = Field(
        default=10_000, gt=0, description="calls per second that the shared file system answers"
    )
    checkpoint_s: float | None = Field(
        default=None, gt=0, description="seconds of a checkpoint; null: by storage_gb_s"
    )
    num_shards: int | None = Field(
        default=None, ge=1, le=MAX_SHARDS, description="of the export; null: ten minutes each"
    )
    lease_s: float = Field(default=60, ge=0, description="of the export's claims")
    node_memory_gib: float = Field(default=512, gt=0, description="main memory of a node")
    gpus_per_node: int = Field(default=8, ge=1)
    trial_minutes: float = Field(default=30, gt=0, description="of one student on one GPU, in a sweep")


@dataclass(frozen=True)
class Row:
    """One setting of a stage and what the simulation says of it.

    `failures` is the number to expect in so many GPU hours; `lost_gpu_hours` counts work that has to be done again.
    """

    setting: int
    seconds_each: float
    wall_s: float
    failures: float
    lost_gpu_hours: float
    gpu_hours: float
    price: float | None


@dataclass(frozen=True)
class Demand:
    """What one part of kdecs would take at this size, and how much there is of it (`limit_is` says of what).

    The load grows with the pairs or with the GPUs, to the given power; the other of the two does not change it.
    """

    part: str
    need: float
    limit: float
    unit: str
    limit_is: str
    grows_with: Literal["pairs", "GPUs"]
    power: int
    remedy: str

    @property
    def load(self) -> float:
        """The need as a share of the limit; above 1 the part breaks, or holds up everything else."""
        return self.need / self.limit

    def breaks_above(self, *, pairs: float, gpus: int) -> float:
        """The pairs, or the GPUs, at which the load reaches 1."""
        return (pairs if self.grows_with == "pairs" else gpus) / self.load ** (1 / self.power)


@dataclass(frozen=True)
class ScalePlan:
    """A plan of layouts and what its best layout means at scale."""

    layouts: LayoutPlan
    best: Layout
    scale: ScaleAssumptions
    pairs: float
    checkpoint_bytes: float
    young_daly_steps: int
    training: list[Row]
    export: list[Row]
    demands: list[Demand]

    @property
    def storage_bytes(self) -> dict[str, float]:
        """Bytes on the shared storage, and on each node that trains students."""
        config = self.layouts.planner.training.config
        return {
            "soft labels": LABEL_BYTES * self.pairs,
            "joined labels, on each node of a sweep": JOINED_BYTES * self.pairs,
            "a training's checkpoints": self.checkpoint_bytes * (config.keep_last + 1),
        }

    @property
    def traffic_bytes(self) -> dict[str, float]:
        """Bytes that pass the network."""
        planner = self.layouts.planner
        epochs = planner.training.config.optimization.epochs
        per_gpu = self.best.time.communication_s * planner.training.speed.link_bytes_per_s * epochs
        return {
            "gradients and weights, per GPU": per_gpu,
            "labels read back, all workers": LABEL_BYTES * self.pairs * self.best.choice.ranks,
        }

    def show(self) -> None:
        """Print everything as tables."""
        console = report.make_console()
        training = self.layouts.planner.training
        ranks, epochs = self.best.choice.ranks, training.config.optimization.epochs
        console.print(
            f"{training.architecture.name}, {self.pairs:,.0f} pairs, {ranks:,} × "
            f"{self.layouts.assumptions['GPU']}: ZeRO-{self.best.choice.stage}, "
            f"{self.best.micro_batch_tokens:,} tokens per micro-batch, {epochs} epochs"
        )
        priced = self.scale.price_per_gpu_hour is not None
        stages = (
            ("Training, by checkpoint_every_steps", "steps", "between", self.training),
            ("Export, by num_shards", "shards", "per shard", self.export),
        )
        for title, first, each, rows in stages:
            console.print(_table(title, first, each, rows, priced=priced))
        console.print(
            f"Young and Daly's interval for checkpoints: {self.young_daly_steps:,} steps. A failure comes every "
            f"{_time(self.scale.mtbf_hours * report.HOUR_S / ranks)} on {ranks:,} GPUs."
        )
        for title, amounts in (("Storage", self.storage_bytes), ("Network", self.traffic_bytes)):
            console.print(f"{title}: " + "; ".join(f"{name} {_size(n)}" for name, n in amounts.items()))
        console.print(_demand_table(self.demands, pairs=self.pairs, gpus=ranks))
        console.print(self.what_breaks_first())
        assumed = {**self.layouts.assumptions, **self.scale.model_dump(exclude_none=True)}
        console.print("Assumed: " + ", ".join(f"{name} {value}" for name, value in assumed.items()))

    def what_breaks_first(self) -> str:
        """One sentence: the part that needs the largest share of what there is."""
        first = self.demands[0]
        needed, limit = (_amount(value, first.unit) for value in (first.need, first.limit))
        figures = f"{needed} of the {limit} {first.limit_is}"
        if first.load <= 1:
            return f"Nothing breaks at this size; the nearest limit is {first.part}: {figures}."
        return f"First to break: {first.part}: {figures}. {first.remedy}"

    def as_record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "plan": {key: value for key, value in self.layouts.as_record().items() if key != "candidates"},
            "pairs": self.pairs,
            "gpus": self.best.choice.ranks,
            "scale_assumptions": self.scale.model_dump(),
            "young_daly_steps": self.young_daly_steps,
            "training": [_finite(asdict(row)) for row in self.training],
            "export": [_finite(asdict(row)) for row in self.export],
            "storage_bytes": self.storage_bytes,
            "traffic_bytes": self.traffic_bytes,
            "demands": [
                {
                    **asdict(demand),
                    "load": demand.load,
                    "breaks_above": demand.breaks_above(pairs=self.pairs, gpus=self.best.choice.ranks),
                }
                for demand in self.demands
            ],
            "what_breaks_first": self.what_breaks_first(),
        }


def plan_at_scale(request: PlanRequest) -> ScalePlan:
    """Plan the layouts, then simulate training and export with the fastest one that fits.

    Raises ConfigError, CorpusError or ModelError, one line; ConfigError where no layout fits.
    """
    names = ScaleAssumptions.model_fields
    ours = [s for s in request.settings if s.partition("=")[0] in names]
    scale = load_config(ScaleAssumptions, None, ours)
    others = [s for s in request.settings if s not in ours]
    layouts = make_plan(replace(request, settings=others))
    best = layouts.best
    if best is None:
        raise ConfigError(layouts.what_would_fit())
    planner = layouts.planner
    config, ranks, pairs = planner.training.config, best.choice.ranks, best.work.pairs

    # Trained weights in the training's dtype, their fp32 master and the two moments of AdamW.
    checkpoint_bytes = planner.counts.trained * (DTYPE_BYTES[config.zero.dtype] + 12.0)
    checkpoint_s = scale.checkpoint_s or checkpoint_bytes / (scale.storage_gb_s * 1e9)
    mtbf_s = scale.mtbf_hours * report.HOUR_S
    steps = max(1, round(best.work.steps * config.optimization.epochs))
    step_s = best.time.total_s / best.work.steps
    best_steps = min(steps, max(1, round(best_interval_s(checkpoint_s, mtbf_s / ranks) / step_s)))
    intervals = sorted(
        {min(steps, n) for n in (config.checkpoint_every_steps, best_steps, 10 * best_steps)}
        | {max(1, best_steps // 10)}
    )
    training = []
    for every in intervals:
        run = TrainingRun(steps, step_s, every, checkpoint_s, scale.start_s)
        outcome = mean_training(run, ranks=ranks, mtbf_s=mtbf_s, repeats=_REPEATS)
        # The simulation counts a second once for all ranks, which all wait while one restarts.
        outcome = replace(outcome, lost_s=ranks * outcome.lost_s)
        training.append(_row(every, every * step_s, ranks * every * step_s / 2, outcome, ranks, scale))

    label_s = planner.labelling_s()
    claim_s = CLAIM_CALLS / scale.storage_calls_s
    fitting = min(MAX_SHARDS, max(ranks, math.ceil(label_s / WANTED_SHARD_S)))
    wanted = scale.num_shards or fitting
    export = []
    for shards in sorted({wanted, max(ranks, wanted // 10), min(MAX_SHARDS, wanted * 10)}):
        shard_s = label_s / shards
        finish_s = LABEL_BYTES * pairs / (scale.storage_gb_s * 1e9)
        labelling = ExportRun(
            ranks, shards, shard_s, claim_s, scale.start_s, scale.lease_s, finish_s=finish_s
        )
        repeats = max(1, min(_REPEATS, _EVENTS // (2 * shards)))
        outcome = mean_export(labelling, mtbf_s=mtbf_s, repeats=repeats)
        export.append(_row(shards, shard_s, shard_s / 2, outcome, ranks, scale))

    # Both as if nothing failed, since that is when the GPUs work.
    seconds = {"training": steps * step_s, "labelling": label_s / ranks}
    return ScalePlan(
        layouts,
        best,
        scale,
        pairs,
        checkpoint_bytes,
        best_steps,
        training,
        export,
        _demands(layouts, best, scale, wanted, seconds),
    )


def _row(
    setting: int,
    seconds_each: float,
    typical_loss_s: float,
    outcome: Outcome,
    ranks: int,
    scale: ScaleAssumptions,
) -> Row:
    gpu_hours = outcome.wall_s * ranks / report.HOUR_S
    price = None if scale.price_per_gpu_hour is None else gpu_hours * scale.price_per_gpu_hour
    failures = gpu_hours / scale.mtbf_hours
    # Failures so rare that the simulation met none lose half of what is at stake, on average.
    loss_s = outcome.lost_s / outcome.failures if outcome.failures else typical_loss_s
    lost = failures * loss_s / report.HOUR_S if math.isfinite(gpu_hours) else math.inf
    return Row(setting, seconds_each, outcome.wall_s, failures, lost, gpu_hours, price)


def _demands(
    layouts: LayoutPlan, best: Layout, scale: ScaleAssumptions, shards: int, seconds: dict[str, float]
) -> list[Demand]:
    """Every part that sees all pairs in one place, the most loaded first."""
    config, ranks, pairs = layouts.planner.training.config, best.choice.ranks, best.work.pairs
    gib, memory = GIB, scale.node_memory_gib
    per_node = min(ranks, scale.gpus_per_node)
    training_h, labelling_h = (TOLERABLE_SHARE * seconds[name] / report.HOUR_S for name in seconds)
    trees = best.work.units / best.work.steps
    found = [
        Demand(
            "the global batch",
            ranks,
            trees,
            "GPUs",
            f"that a step's {config.batches.global_batch_pairs} pairs can occupy",
            "GPUs",
            1,
            f"Set batches.global_batch_pairs to {config.batches.global_batch_pairs * math.ceil(ranks / trees):,}, "
            "which is another training.",
        ),
        Demand(
            "a training's prompts in memory",
            per_node * PREPARE_BYTES * pairs / gib,
            memory,
            "GiB",
            "of a node, on which every rank holds all",
            "pairs",
            1,
            "Train on a part of the corpus (corpus.train_share).",
        ),
        Demand(
            "encoding before the first step",
            PREPARE_SECONDS * pairs / report.HOUR_S,
            training_h,
            "h",
            f"that are {TOLERABLE_SHARE:.0%} of the training",
            "GPUs",
            1,
            "Train on a part of the corpus (corpus.train_share).",
        ),
        Demand(
            "a plan of shards in memory",
            PLAN_BYTES * pairs / gib,
            memory,
            "GiB",
            "of a node",
            "pairs",
            1,
            "Export the corpus in parts, each with its own output.",
        ),
        Demand(
            "planning while all workers wait",
            PLAN_SECONDS * pairs / report.HOUR_S,
            labelling_h,
            "h",
            f"that are {TOLERABLE_SHARE:.0%} of the labelling",
            "GPUs",
            1,
            "Export the corpus in parts, each with its own output.",
        ),
        Demand(
            "claims of shards",
            ranks * shards * CLAIM_CALLS / scale.storage_calls_s / report.HOUR_S,
            labelling_h,
            "h",
            f"that are {TOLERABLE_SHARE:.0%} of the labelling",
            "GPUs",
            2,
            "Choose fewer shards (num_shards), or export the corpus in parts.",
        ),
        Demand(
            "shards read back by all workers",
            ranks * LABEL_BYTES * pairs / (scale.storage_gb_s * 1e9) / report.HOUR_S,
            labelling_h,
            "h",
            f"that are {TOLERABLE_SHARE:.0%} of the labelling",
            "GPUs",
            2,
            "Export the corpus in parts, each with fewer workers.",
        ),
        Demand(
            "joining labels in memory",
            JOIN_BYTES * pairs / gib,
            memory,
            "GiB",
            "of a node",
            "pairs",
            1,
            "Export the corpus in parts and train students on one of them.",
        ),
        Demand(
            "one MLflow on SQLite",
            ranks * 60 / scale.trial_minutes * TRIAL_SECONDS,
            3600.0,
            "s",
            "of each hour of a sweep on all GPUs",
            "GPUs",
            1,
            "Run a server on PostgreSQL (cluster/mlflow/serve.sh), or split the sweep.",
        ),
    ]
    return sorted(found, key=lambda demand: -demand.load)


def _table(title: str, first: str, each: str, rows: list[Row], *, priced: bool) -> Table:
    columns = [each, "time", "failures", "lost GPU h", "GPU h", *(["price"] if priced else [])]
    table = figures_table(title, first, *columns, tight=True)
    for row in rows:
        amounts = [
            row.failures,
            row.lost_gpu_hours,
            row.gpu_hours,
            *([] if row.price is None else [row.price]),
        ]
        times = (_time(row.seconds_each), _time(row.wall_s))
        table.add_row(f"{row.setting:,}", *times, *map(_figure, amounts))
    return table


def _demand_table(demands: list[Demand], *, pairs: float, gpus: int) -> Table:
    title = "What kdecs itself needs at this size"
    table = figures_table(title, "part", "needs", "of", "load", "breaks above", tight=True)
    for demand in demands:
        above = f"{_figure(demand.breaks_above(pairs=pairs, gpus=gpus))} {demand.grows_with}"
        figures = (_amount(demand.need, demand.unit), _amount(demand.limit, demand.unit))
        table.add_row(
            demand.part, *figures, _figure(demand.load), above, style="bold" if demand.load > 1 else ""
        )
    return table


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null stands for the time of a work that never ends."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}


def _amount(value: float, unit: str) -> str:
    if unit == "h":
        return _time(value * report.HOUR_S)
    return f"{_figure(value)} {unit}"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "never"
    days = seconds / (24 * report.HOUR_S)
    return f"{days:,.1f} days" if days >= 2 else report.duration(seconds)


def _figure(value: float) -> str:
    """Three digits: < 0.001, 0.0123, 1.23, 123, 12,300, 1.23e+09."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if value < 1e-3:
        return "< 0.001"
    if value >= 1e7:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def _size(num_bytes: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{_figure(num_bytes / size)} {unit}"
    return f"{_figure(num_bytes / 2**10)} KiB"
