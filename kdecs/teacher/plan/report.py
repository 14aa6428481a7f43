"""What `kdecs plan` and a dry run print: a table of layouts, the parts of a peak, config lines, or JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kdecs.tables import figures_table, terminal
from kdecs.teacher.plan.memory import GIB, Limits
from kdecs.teacher.plan.search import Layout

HOUR_S = 3600.0


def layout_table(layouts: Sequence[Layout], limits: Limits, best: Layout | None, epochs: int) -> Table:
    """A row per layout; `best` stands out, those that do not fit are dimmed."""
    title = f"Layouts: a GPU's peak in GiB, time of {epochs} epochs"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0), title=title)
    for name in ("ZeRO", "offload", "ckpt"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "states", "activ.", "buffers", "peak", "pairs/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for layout in layouts:
        memory = layout.memory
        states = memory.weights + memory.adapters + memory.gradients + memory.optimizer
        fits = limits.allow(memory)
        verdict = "too big" if not fits else "fastest" if layout is best else "fits"
        table.add_row(
            str(layout.choice.stage),
            offload_name(layout),
            "yes" if layout.checkpointing else "no",
            str(layout.micro_batch_tokens),
            f"{states / GIB:.1f}",
            f"{memory.activations / GIB:.1f}",
            f"{(memory.buffers + memory.gathered) / GIB:.1f}",
            f"{memory.total / GIB:.1f}",
            f"{layout.work.pairs / layout.time.total_s:.1f}",
            duration(epochs * layout.time.total_s),
            verdict,
            style="bold" if layout is best else "" if fits else "dim",
        )
    return table


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, with at least two digits."""
    for unit, size in (("h", HOUR_S), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def offload_name(layout: Layout) -> str:
    """What is offloaded to main memory: nothing, the optimizer's states, or the parameters too."""
    if layout.choice.offload_parameters:
        return "all"
    return "states" if layout.choice.offload_optimizer else "-"


def best_budgets(layouts: Sequence[Layout], limits: Limits) -> list[Layout]:
    """One row per stage, offload and checkpointing: the fastest budget that fits, or the leanest if none does.

    `layouts` are sorted by speed; the rows come in order of stage.
    """
    groups: dict[tuple[Any, ...], list[Layout]] = {}
    for layout in layouts:
        choice = layout.choice
        key = (choice.stage, choice.offload_optimizer, choice.offload_parameters, layout.checkpointing)
        groups.setdefault(key, []).append(layout)
    rows = []
    for _, group in sorted(groups.items(), key=lambda entry: entry[0]):
        fitting = [layout for layout in group if limits.allow(layout.memory)]
        rows.append(fitting[0] if fitting else min(group, key=lambda layout: layout.memory.total))
    return rows


def memory_table(layout: Layout) -> Table:
    """The parts of one layout's peak."""
    table = figures_table("Peak of a rank, GiB", "part", "GiB")
    for name, value in asdict(layout.memory).items():
        # Parts that this layout does not have would only lengthen the table.
        if value:
            table.add_row(_PART_NAMES[name], f"{value / GIB:.2f}")
    table.add_section()
    table.add_row("peak on the device", f"{layout.memory.total / GIB:.2f}", style="bold")
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
    "host": "in main memory, not on the device",
}


def yaml_lines(layout: Layout) -> str:
    """The layout as lines of a teacher's YAML."""
    groups: dict[str, list[str]] = {}
    for key, value in layout.settings.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, []).append(f"  {name}: {_plain(value)}")
    return "\n".join("\n".join([f"{group}:", *lines]) for group, lines in groups.items())


def set_options(layout: Layout) -> str:
    """The layout as options of the launch script."""
    return " ".join(f"--set {key}={_plain(value)}" for key, value in layout.settings.items())


def as_record(layout: Layout, limits: Limits) -> dict[str, Any]:
    """One layout for JSON: settings, memory in GiB, seconds of an epoch."""
    return {
        "settings": layout.settings,
        "gpus": layout.choice.ranks,
        "fits": limits.allow(layout.memory),
        "memory": layout.memory.as_dict(),
        "epoch": {
            **asdict(layout.time),
            "total_s": layout.time.total_s,
            "pairs_per_second": layout.work.pairs / layout.time.total_s,
            **asdict(layout.work),
        },
    }


def make_console() -> Console:
    """A console that never wraps lines, so that people can copy them."""
    return terminal(soft_wrap=True, highlight=False)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
