"""What `kdecs plan` and a dry run show: parts of a peak, a table of layouts, the config lines, or JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kdecs.tables import figures_table
from kdecs.teacher.plan.memory import GIB, Limits
from kdecs.teacher.plan.search import Candidate

HOUR_S = 3600.0


def layout_table(
    candidates: Sequence[Candidate], limits: Limits, best: Candidate | None, epochs: int
) -> Table:
    """One row a layout."""
    title = f"Layouts: a GPU's peak in GiB, time of {epochs} epochs"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0), title=title)
    for name in ("ZeRO", "offload", "ckpt"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "states", "activ.", "buffers", "peak", "pairs/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for candidate in candidates:
        memory = candidate.memory
        states = memory.weights + memory.adapters + memory.gradients + memory.optimizer
        fits = limits.allow(memory)
        verdict = "too big" if not fits else "fastest" if candidate is best else "fits"
        table.add_row(
            str(candidate.choice.stage),
            offload_name(candidate),
            "yes" if candidate.checkpointing else "no",
            str(candidate.micro_batch_tokens),
            f"{states / GIB:.1f}",
            f"{memory.activations / GIB:.1f}",
            f"{(memory.buffers + memory.gathered) / GIB:.1f}",
            f"{memory.total / GIB:.1f}",
            f"{candidate.work.pairs / candidate.time.total_s:.1f}",
            duration(epochs * candidate.time.total_s),
            verdict,
            style="bold" if candidate is best else "" if fits else "dim",
        )
    return table


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, two digits at least."""
    for unit, size in (("h", HOUR_S), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def offload_name(candidate: Candidate) -> str:
    """What lies in main memory: nothing, the optimizer's states, or the parameters too."""
    if candidate.choice.offload_parameters:
        return "all"
    return "states" if candidate.choice.offload_optimizer else "-"


def memory_table(candidate: Candidate) -> Table:
    """The parts of one layout's peak."""
    table = figures_table("Peak of a rank, GiB", "part", "GiB")
    for name, value in asdict(candidate.memory).items():
        if value:
            table.add_row(_PART_NAMES[name], f"{value / GIB:.2f}")
    table.add_section()
    table.add_row("peak on the device", f"{candidate.memory.total / GIB:.2f}", style="bold")
    return table


_PART_NAMES = {
    "weights": "frozen weights",
    "adapters": "trained weights",
    "gradients": "gradients",
    "optimizer": "master weights and Adam moments",
    "activations": "activations of a full micro-batch",
    "buffers": "reduce buckets",
    "gathered": "parameters gathered by ZeRO-3",
    "step": "temporaries of the step (instead of activations and buffers)",
    "reserve": "driver, libraries and fragments",
    "host": "beside it, in main memory",
}


def yaml_lines(candidate: Candidate) -> str:
    """The layout as it stands in a teacher's YAML."""
    groups: dict[str, list[str]] = {}
    for key, value in candidate.settings.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, []).append(f"  {name}: {_plain(value)}")
    return "\n".join("\n".join([f"{group}:", *lines]) for group, lines in groups.items())


def set_options(candidate: Candidate) -> str:
    """The layout as options of the launch script."""
    return " ".join(f"--set {key}={_plain(value)}" for key, value in candidate.settings.items())


def as_record(candidate: Candidate, limits: Limits) -> dict[str, Any]:
    """One layout for JSON: settings, memory in GiB, seconds of an epoch."""
    return {
        "settings": candidate.settings,
        "gpus": candidate.choice.ranks,
        "fits": limits.allow(candidate.memory),
        "memory": candidate.memory.as_dict(),
        "epoch": {
            **asdict(candidate.time),
            "total_s": candidate.time.total_s,
            "pairs_per_second": candidate.work.pairs / candidate.time.total_s,
            **asdict(candidate.work),
        },
    }


def make_console() -> Console:
    """A console that does not break what people copy."""
    return Console(soft_wrap=True, highlight=False)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
