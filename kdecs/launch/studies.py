"""Run the paper's studies at small scale on the models of a finished demo: a sweep, selection and report each.

The search spaces are those of the paper; teachers, base, corpus and tracking are the demo's. Fewer seeds, values and
epochs make it fit on a laptop. Once a study's student is selected, the chosen seed of every setting is scored on test
for the tables. Complete trials are skipped, so the same command resumes after a stop.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from kdecs.config import COMMITTED, load_config, parse_config, read_yaml
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.splits import CorpusConfig, training_split
from kdecs.errors import CorpusError, Stopped
from kdecs.process import StopSignal, quick_imports, run_entry
from kdecs.student.config import StudentBatches
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.space import STEPS_KEY

EXAMPLES = """examples:
  python -m kdecs.launch.studies --demo runs/demo --output runs/studies
  python -m kdecs.launch.studies --demo runs/demo --output runs/studies --only ablation --seeds 3
"""
STUDIES = ("main", "ecpe", "ablation", "data_share", "teacher_scale", "given_emotions")
SMALL = {
    "distillation.alpha": [0.3, 0.6],
    "distillation.temperature": [1.0, 2.0],
    "distillation.hard_share": [0.2, 0.6, 1.0],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--demo", type=Path, required=True, metavar="DIR", help="a finished demo's run directory"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="gets one sweep directory per study"
    )
    parser.add_argument("--only", choices=STUDIES, action="append", help="run only this study; repeatable")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds of each setting (default 2)")
    parser.add_argument(
        "--epochs", type=int, default=2, metavar="N", help="epochs of each training (default 2)"
    )
    parser.add_argument(
        "--share", type=float, metavar="S", help="share of the training dialogues (default: the demo's)"
    )
    arguments = parser.parse_args()
    with quick_imports():
        from kdecs.sweep.driver import refuse_equal_emotions, run_sweep
        from kdecs.sweep.report.page import write_report
        from kdecs.sweep.search import Search
        from kdecs.sweep.selection.choose import print_selection, select_student
        from kdecs.sweep.selection.on_test import score_settings

    stop = StopSignal()
    stop.install()
    demo = load_config(SweepConfig, arguments.demo.absolute() / "sweep" / "config.json")
    finished: dict[str, Path] = {}
    for study in arguments.only or STUDIES:
        config = small_config(study, demo, arguments)
        try:
            refuse_equal_emotions(Search(config))
        except CorpusError as refusal:
            if arguments.only:
                raise
            print(f"study {study} is left out: {refusal}", flush=True)
            continue
        sweep = finished[study] = run_sweep(config, stop=stop)
        stop.raise_if_requested(f"stopped after study {study}; run the same command again to resume")
        print_selection(sweep, select_student(sweep))
        score_settings(sweep)
        print(f"study {study}: {write_report(sweep)}", flush=True)
        if study == "ecpe" and "main" in finished:  # the other half of Table 4
            print(f"study main: {write_report(finished['main'], [sweep])}", flush=True)
    if stop.requested:
        raise Stopped("studies stopped; run the same command again to resume")


def small_config(study: str, demo: SweepConfig, arguments: argparse.Namespace) -> SweepConfig:
    """A study's space with the demo's models and fewer values."""
    values = read_yaml(COMMITTED / "spaces" / f"{study}.yaml")  # not a file of that name in this directory
    student: dict[str, Any] = {**demo.student, "distillation": values["student"].get("distillation", {})}
    if "task" in values["student"]:
        student["task"] = values["student"]["task"]
    if "emotions" in values["student"]["corpus"]:
        student["corpus"] = {**student["corpus"], "emotions": values["student"]["corpus"]["emotions"]}
    student["optimization"] = {**student.get("optimization", {}), "epochs": arguments.epochs}
    # One cache for all studies: they read the same corpus.
    student["cache"] = str(arguments.output.absolute() / "cache")
    if arguments.share is not None:
        student["corpus"] = {**student["corpus"], "train_share": arguments.share}
    teachers = {name: str(teacher.labels) for name, teacher in demo.teachers.items()}
    space = values["space"]
    if "teacher" in space:
        space["teacher"] = {"grid": list(teachers)}
    else:  # a space without the key may have one teacher only
        first = next(iter(teachers))
        teachers = {first: teachers[first]}
    for key, few in SMALL.items():
        if key in space:
            space[key] = {"grid": few}
    if STEPS_KEY in space:  # as many as the epochs of the whole split have
        space[STEPS_KEY] = {"grid": [None, steps_of_epochs(student, arguments.epochs)]}
    space["optimization.seed"] = {"grid": list(range(arguments.seeds))}
    changed = {
        "output": str(arguments.output.absolute() / study),
        "teachers": teachers,
        "student": student,
        "space": space,
        "cpus_per_trial": 1,
        "gpus_per_trial": 0,
        "max_concurrent_trials": demo.max_concurrent_trials,
        "tracking": {**demo.tracking.model_dump(), "experiment": "kdecs-studies"},
    }
    return parse_config(SweepConfig, {**values, **changed}, source=f"study {study}")


def steps_of_epochs(student: dict[str, Any], epochs: int) -> int:
    """The steps of so many epochs over all training pairs of a student's config."""
    corpus = parse_config(CorpusConfig, student["corpus"], source="corpus of the demo")
    num_pairs = sum(len(pairs_of(dialogue, "fold1+neutral")) for dialogue in training_split(corpus))
    batch = student.get("batches", {}).get("global_batch_pairs", StudentBatches().global_batch_pairs)
    return epochs * math.ceil(num_pairs / batch)


if __name__ == "__main__":
    run_entry(main)
