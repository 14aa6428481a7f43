"""What every benchmark shares: alternating measurement, the record it writes, the corpus it runs over.

A figure is a ratio of two ways of doing the same job in one run: the rounds alternate between them, so that a noisy
machine slows both. A record goes to `benchmarks/results/NAME.json`, or `results/DEVICE/NAME.json` on an accelerator.
"""

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kdecs.artifact import write_text
from kdecs.corpus.reading import bundled_sample

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("kdecs", "torch", "transformers", "peft", "deepspeed", "ray", "mlflow", "pyarrow", "onnxruntime")


@dataclass(frozen=True)
class Rates:
    """Work per second of both sides, a value a round, taken alternately.

    `ours_cpu` and `baseline_cpu` are per second of this process's processor time, which leaves out what other programs
    take from the machine.
    """

    ours: list[float]
    baseline: list[float]
    ours_cpu: list[float]
    baseline_cpu: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours over the baseline's, round by round."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.baseline, strict=True)]

    @property
    def ratio(self) -> float:
        """The median round's ratio."""
        return statistics.median(self.ratios)

    @property
    def by_processor(self) -> "Rates":
        """The same rounds with processor seconds in the place of seconds."""
        return Rates(self.ours_cpu, self.baseline_cpu, self.ours_cpu, self.baseline_cpu)


def alternate(ours: Callable[[], float], baseline: Callable[[], float], *, rounds: int = 3) -> Rates:
    """Run both sides in turn. Each call does its job once and returns the units of work it did (pairs, rows)."""
    rates = Rates([], [], [], [])
    for number in range(rounds):
        order = ((ours, rates.ours, rates.ours_cpu), (baseline, rates.baseline, rates.baseline_cpu))
        for side, taken, taken_cpu in order if number % 2 == 0 else reversed(order):
            started, started_cpu = time.perf_counter(), time.process_time()
            amount = side()
            taken.append(amount / (time.perf_counter() - started))
            taken_cpu.append(amount / (time.process_time() - started_cpu))
    return rates


def alternate_steps(
    ours: Callable[[], Iterator[float]], baseline: Callable[[], Iterator[float]], *, rounds: int = 3
) -> Rates:
    """Run both sides in turn, step by step: a side yields the units of work of each step when it is done.

    A round is all steps of both sides. For long steps this is steadier than `alternate`: a machine whose speed changes
    from one minute to the next would be fast for one side and slow for the other.
    """
    rates = Rates([], [], [], [])
    for number in range(rounds):
        sides = (ours(), baseline())
        amounts, seconds, cpu_seconds = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        running = [number % 2, 1 - number % 2]  # who begins changes from round to round
        while running:
            for side in tuple(running):
                started, started_cpu = time.perf_counter(), time.process_time()
                amount = next(sides[side], None)
                if amount is None:
                    running.remove(side)
                    continue
                amounts[side] += amount
                seconds[side] += time.perf_counter() - started
                cpu_seconds[side] += time.process_time() - started_cpu
        for side, (taken, taken_cpu) in enumerate(
            ((rates.ours, rates.ours_cpu), (rates.baseline, rates.baseline_cpu))
        ):
            taken.append(amounts[side] / seconds[side])
            taken_cpu.append(amounts[side] / cpu_seconds[side])
    return rates


def corpus_split(split: str) -> tuple[Path, str]:
    """RECCON's file where it can be had (KDECS_RECCON or ../shared/reccon), else the bundled sample's; and its name."""
    reccon = Path(os.environ.get("KDECS_RECCON", ROOT.parent / "shared" / "reccon"))
    found = sorted(reccon.glob(f"*{split}*.json")) if reccon.is_dir() else []
    return (found[0], "reccon") if found else (bundled_sample(split), "sample")


def device_name() -> str:
    """The accelerator's name, or "" on a CPU."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def machine() -> str:
    """The processor and its cores in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))
        cpu = found.group(1).strip() if found else cpu
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores"


def write_record(
    name: str,
    *,
    unit: str,
    ours: float,
    baseline: float,
    baseline_name: str,
    corpus: str,
    dtype: str,
    ratio: float | None = None,
    target: float | None = None,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one record and print it in one line. `ratio` is ours/baseline unless given (less is better: say so)."""
    value = ours / baseline if ratio is None else ratio
    accelerator = device_name()
    record = {
        "name": name,
        "ratio": value,
        "target": target,
        "unit": unit,
        "ours": ours,
        "baseline": baseline,
        "baseline_name": baseline_name,
        "device": accelerator or machine(),
        "corpus": corpus,
        "dtype": dtype,
        "versions": _versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "details": details or {},
    }
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", accelerator.lower()).strip("-") if accelerator else RESULTS
    write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    goal = f", target {target:g}" if target is not None else ""
    print(
        f"{name}: {value:.2f}x{goal} ({ours:.4g} against {baseline:.4g} {unit} of {baseline_name}; {corpus}, {dtype})",
        flush=True,
    )
    return record


def write_rates(
    name: str,
    rates: Rates,
    *,
    work: str = "pairs",
    baseline_name: str,
    corpus: str,
    dtype: str = "float32",
    target: float | None = None,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the record of alternating rounds: both medians, and the median round's ratio.

    With one thread, seconds are those of the processor: on an idle machine they are the clock's, and on a shared one
    only they are what the job takes. With more threads they would count those that wait for one another, so the clock's
    are taken. The other ratio stands beside it in the details.
    """
    import torch

    threads = torch.get_num_threads()
    one_thread = threads == 1 and not device_name()
    timed = rates.by_processor if one_thread else rates
    return write_record(
        name,
        unit=f"{work} per processor second" if one_thread else f"{work}/s",
        ours=statistics.median(timed.ours),
        baseline=statistics.median(timed.baseline),
        ratio=timed.ratio,
        baseline_name=baseline_name,
        corpus=corpus,
        dtype=dtype,
        target=target,
        details={
            "timed_by": "processor seconds" if one_thread else "the clock",
            "threads": threads,
            "ratios": timed.ratios,
            "ratio_by_the_clock": rates.ratio,
            "ratio_of_cpu_seconds": rates.by_processor.ratio,
            **(details or {}),
        },
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
