"""Cross-fit soft labels: train K teachers, each on all training dialogues except one fold, which it then labels.

One command runs the K trainings and exports, one after another, each on all devices that the launcher gives it, and
merges the labels into one directory. The same command resumes: complete stages are skipped, and a training continues
from its checkpoint.
"""

import shutil
from pathlib import Path

from kdecs.artifact import Kind, file_lock, is_complete
from kdecs.config import CONFIG_NAME, Config, config_hash, files_of, write_config
from kdecs.errors import DependencyError, KdecsError
from kdecs.process import StopSignal, module_command, run_child, run_entry, say_skipped, stage_config
from kdecs.soft_labels.derive.config import CrossFitConfig
from kdecs.soft_labels.derive.write import check_label_output
from kdecs.soft_labels.verify import verified_labels

EXAMPLES = """\
  python -m kdecs.launch.cross_fit --config llama-7b
  python -m kdecs.launch.cross_fit --config tiny --set num_folds=3
  python -m kdecs.launch.cross_fit --config llama-7b --set 'launcher=[deepspeed, --num_gpus, "8"]'
"""


def main() -> None:
    config = stage_config(CrossFitConfig, "cross_fit", str(__doc__), EXAMPLES)
    if verified_labels(config.output, config_hash(config), show_progress=True):
        say_skipped(f"soft labels {config.name}: complete at {config.output}, skipped")
        return
    check_label_output(config, config.output)
    stop = StopSignal()
    stop.install()
    with file_lock(config.work_directory / ".lock", blocking=False) as held:
        if not held:
            raise KdecsError(
                f"{config.work_directory}: another cross-fitting uses this directory; wait until it has ended"
            )
        run_folds(config, stop)
        stop.raise_if_requested(_stopped(config))
        finish(config)


def run_folds(config: CrossFitConfig, stop: StopSignal) -> None:
    """Train each fold's teacher and have it label that fold, one stage after another."""
    from kdecs.soft_labels.derive.cross_fit import write_folds

    sizes = write_folds(config)
    print(
        f"{config.name}: {sum(sizes.values())} training dialogues in {config.num_folds} folds of "
        f"{min(sizes.values())} to {max(sizes.values())}, in {config.work_directory}",
        flush=True,
    )
    for fold in range(config.num_folds):
        of = f"fold {fold + 1} of {config.num_folds}"
        teacher = config.teacher_config(fold)
        run_stage(config, f"teacher of {of}", "train_teacher", teacher, teacher.output, "teacher", stop)
        export = config.export_config(fold)
        title = f"soft labels of {of}"
        run_stage(config, title, "export_soft_labels", export, export.output, "soft-labels", stop)


def run_stage(
    config: CrossFitConfig, title: str, entry: str, stage: Config, output: Path, kind: Kind, stop: StopSignal
) -> None:
    """Run an entry of kdecs.launch as a child, unless its output is complete. Raises KdecsError, or Stopped."""
    if is_done(stage, output, kind):
        print(f"{config.name}: {title}: complete, skipped", flush=True)
        return
    stop.raise_if_requested(_stopped(config))
    # Beside the output, which belongs to the stage alone: it writes its own config.json there.
    folder = output.parent / f"{output.name}-config"
    write_config(stage, folder)
    command = module_command(config.launcher, f"kdecs.launch.{entry}")
    if shutil.which(command[0]) is None:
        raise DependencyError(f"launcher {command[0]}: no such command; install it or set launcher: []")
    print(f"{config.name}: {title}", flush=True)
    code = run_child([*command, "--config", str(folder / CONFIG_NAME)], stop)
    stop.raise_if_requested(_stopped(config))
    if code != 0:
        raise KdecsError(
            f"{config.name}: {title} failed with exit code {code}, see its message above; "
            "run the same command again to resume"
        )


def is_done(stage: Config, output: Path, kind: Kind) -> bool:
    """True if a stage's output is complete. Labels are read byte by byte, since their own command repairs damage."""
    if kind == "soft-labels":
        return verified_labels(output, config_hash(stage), show_progress=True) is not None
    return is_complete(output, kind, config_hash(stage))


def _stopped(config: CrossFitConfig) -> str:
    return f"{config.name}: stopped; run the same command again to resume"


def finish(config: CrossFitConfig) -> None:
    """Merge the folds' labels, and print how far held-out and validation labels agree with gold."""
    from kdecs.corpus.schema import NO_TABLE
    from kdecs.corpus.splits import emotion_table
    from kdecs.soft_labels.derive.cross_fit import merge_folds
    from kdecs.soft_labels.inspect.show import describe

    manifest = merge_folds(config)
    corpora = [*files_of(config.corpus.train), config.corpus.valid]
    table = emotion_table(config.corpus) or NO_TABLE
    gold = describe(config.output, corpora, cache_dir=config.work_directory / "joined", table=table)["gold"]
    *held_out, valid = (f"{gold[str(path)]['agreement']['macro_f1']:.2f}" for path in corpora)
    print(
        f"soft labels {config.name}: {sum(manifest.details['num_pairs'].values()):,} pairs in "
        f"{len(manifest.files)} shards of {config.num_folds} teachers; agreement with gold: held-out train macro F1 "
        f"{', '.join(held_out)}, valid {valid}; written to {config.output}",
        flush=True,
    )


if __name__ == "__main__":
    run_entry(main)
