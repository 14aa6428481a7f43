"""Export a teacher's soft labels: raw answer-word logits of every pair of every split, in checked shards.

Start one worker per device: with plain python, torchrun or the deepspeed launcher, or as independent jobs on one
output directory. The workers divide the shards among themselves. The same command resumes after any stop, and repairs
a finished directory by labelling damaged shards again.
"""

import functools
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from tqdm import tqdm

from kdecs.artifact import read_manifest
from kdecs.config import config_hash
from kdecs.process import StopSignal, is_main_rank, quick_imports, run_entry, say_skipped, stage_config
from kdecs.soft_labels.claims import check_export_output, check_teacher_corpus, remove_temporaries
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.export import ExportResult, Progress, export_shards, is_finished
from kdecs.tracking.datasets import corpus_datasets
from kdecs.tracking.record import RunRecord, has_identity
from kdecs.tracking.stage import stage_identity, stage_record, stage_upload

if TYPE_CHECKING:
    from kdecs.runtime import Runtime

EXAMPLES = """\
  deepspeed --module kdecs.launch.export_soft_labels --config llama-7b
  deepspeed --module kdecs.launch.export_soft_labels --config llama-13b-zero3
  python -m kdecs.launch.export_soft_labels --config demo/export --set num_shards=16   # one worker
"""


class ExportBar:
    """A progress bar over pairs on rank 0, and a line for each shard that this worker finishes."""

    def __init__(self, is_main: bool) -> None:
        self._bar: tqdm = tqdm(unit="pair", desc="soft labels", disable=None if is_main else True)

    def __call__(self, progress: Progress) -> None:
        self._bar.total = progress.pairs_total
        # The count falls where a shard is lost to another worker; the bar stays where it was until it is made up for.
        self._bar.update(max(0, progress.pairs_done - self._bar.n))
        if progress.line:
            tqdm.write(f"soft labels: {progress.line}", file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


def export_record(config: ExportConfig) -> RunRecord:
    """What MLflow shows of a finished export, below the training of its teacher if that is in MLflow, too."""
    details = read_manifest(config.output, "soft-labels").details
    record = stage_record(
        config,
        "export",
        output=config.output,
        name=f"labels of {config.output.name}",
        config_hash=config_hash(config),
        datasets=corpus_datasets(config.corpus, universe=config.universe, has_test=True),
        points=[],
    )
    if has_identity(config.teacher):
        record.parent = stage_identity("teacher", config.teacher)
    # How well the exported labels agree with gold is what a teacher, a student and a baseline score at utterance level.
    agreement = details["agreement"]["valid"]
    record.scores = {f"utterance_{key}": value for key, value in agreement.items()}
    record.scores |= {f"{split}_pairs": float(number) for split, number in details["num_pairs"].items()}
    return record


def summary(config: ExportConfig, result: ExportResult) -> str:
    details = result.manifest.details
    num_pairs = sum(details["num_pairs"].values())
    agreement = details["agreement"]["valid"]
    macro_f1 = f"{agreement['macro_f1']:.2f}" if agreement else "none, it has no pairs with gold"
    rate = (
        f"{result.pairs_per_second:,.1f} pairs per second" if result.num_new_pairs else "all labelled before"
    )
    return (
        f"soft labels {config.output.name}: {num_pairs:,} pairs in {len(result.manifest.files)} shards, {rate}; "
        f"agreement with gold on valid: macro F1 {macro_f1}; written to {config.output}"
    )


def main() -> None:
    config = stage_config(ExportConfig, "export", str(__doc__), EXAMPLES)
    if is_finished(config, show_progress=is_main_rank()):
        remove_temporaries(config.output, config.lease_s)
        say_skipped(f"soft labels {config.output.name}: complete at {config.output}, skipped")
        return
    # The export checks this too, but only after minutes of loading the teacher.
    check_teacher_corpus(config, read_manifest(config.teacher, "teacher"))
    check_export_output(config.output, config_hash(config))
    # Torch takes seconds to import, which a finished or refused export need not wait for.
    with quick_imports():
        from kdecs.runtime import process_group, start_runtime, warn_of_emulation

    stop = StopSignal()
    stop.install()
    runtime = start_runtime(threads=config.threads_per_worker)
    warn_of_emulation(runtime, config.dtype, "dtype")
    record = functools.partial(export_record, config)
    upload = stage_upload(config.tracking, config.output, record, is_main=runtime.is_main)
    with upload, closing(ExportBar(runtime.is_main)) as bar:
        if config.engine == "zero3":
            with process_group(runtime, single=True, lost_rank_s=config.lost_rank_s):
                result = export_partitioned(config, runtime, stop, bar)
        else:
            result = export_replica(config, runtime, stop, bar)
    if runtime.is_main:
        print(summary(config, result), flush=True)


def export_replica(
    config: ExportConfig, runtime: "Runtime", stop: StopSignal, bar: ExportBar
) -> ExportResult:
    """Label with a complete copy of the teacher on this rank's device. Each rank is a worker."""
    with quick_imports():
        from kdecs.teacher.scoring import TeacherScorer

    scorer = TeacherScorer.load(
        config.teacher,
        runtime=runtime,
        dtype=config.dtype,
        micro_batch_tokens=config.micro_batch_tokens,
        base=config.base,
    )
    if config.top_k:
        scorer.check_top_k(config.top_k)
    return export_shards(config, scorer, runtime, stop, report=bar)


def export_partitioned(
    config: ExportConfig, runtime: "Runtime", stop: StopSignal, bar: ExportBar
) -> ExportResult:
    """Label with a teacher whose parameters are partitioned over the ranks, which compute in step."""
    with quick_imports():
        from kdecs.teacher.scoring import load_partitioned

    scorer, lockstep = load_partitioned(
        config.teacher,
        runtime=runtime,
        stop=stop,
        dtype=config.dtype,
        micro_batch_tokens=config.micro_batch_tokens,
        base=config.base,
        persistence_threshold=config.persistence_threshold,
    )
    if config.top_k:
        scorer.check_top_k(config.top_k)
    with lockstep.together():
        return export_shards(config, scorer, runtime, stop, waiting=lockstep, report=bar)


if __name__ == "__main__":
    run_entry(main)
