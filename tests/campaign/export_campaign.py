"""What the campaigns over the export share: one config, ways to run it, and what its end must look like."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

from fake_teacher import FakeScorer, files_of, make_config, worker
from stand_in import run_command

from kdecs.artifact import has_valid_checksum, read_manifest, verify_artifact
from kdecs.corpus.reading import bundled_sample
from kdecs.process import StopSignal
from kdecs.soft_labels.export import export_shards

Record = Callable[[str, dict[str, float | int | str]], None]
# Half of the sample keeps a run short; five shards leave room for faults between them.
CORPUS = {"train": bundled_sample("test"), "valid": bundled_sample("valid"), "test": None}
SETTINGS = {"corpus": CORPUS, "allow_other_corpus": True, "num_shards": 5, "lease_s": 1.0}


def run(teacher: Path, output: Path, *, on_batch: Callable[[], None] | None = None) -> None:
    """The export, in this process, to its end."""
    scorer = FakeScorer(teacher, on_batch=on_batch)
    export_shards(make_config(teacher, output, **SETTINGS), scorer, worker(), StopSignal(), poll_s=0.02)


def rerun(teacher: Path, output: Path) -> None:
    """The command itself, which looks for itself whether anything is to be done."""
    assert run_command(make_config(teacher, output, **SETTINGS), output.parent) == 0


def fork(target: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)  # type: ignore[arg-type]
    process.start()
    return process


def run_slowly(teacher: Path, output: Path, batch_s: float) -> None:
    run(teacher, output, on_batch=lambda: time.sleep(batch_s))


def litter(output: Path) -> list[Path]:
    """What killed workers left: hidden files, leases, unfinished plans."""
    work = output / ".work"
    hidden = [path for path in output.rglob(".*") if path != work]
    plans = [path for path in work.glob("plan*") if path.name != "plan"]
    return hidden + plans + list((work / "leases").iterdir())


def assert_same(output: Path, quiet: Path) -> None:
    assert files_of(output) == files_of(quiet)
    assert verify_artifact(output) == []
    assert has_valid_checksum(read_manifest(output))
    assert litter(output) == []
