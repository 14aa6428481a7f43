"""Cross-fit soft labels: train K teachers, each on all training dialogues but one fold's, have each label its own fold.

One command runs the K trainings and exports one after another (each on all devices that the launcher gives it) and
merges them into one label directory. The same command resumes: what is complete is skipped, a training goes on from
its checkpoint.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from kdecs.artifact import Kind, file_lock, is_complete
from kdecs.config import CONFIG_NAME, Config, config_hash, write_config
from kdecs.errors import DependencyError, KdecsError, Stopped
from kdecs.process import run_entry, say_skipped, stage_config
from kdecs.soft_labels.derive.config import CrossFitConfig
from kdecs.soft_labels.derive.write import claim_output
from kdecs.soft_labels.verify import whole_labels

ROOT = Path(__file__).resolve().parent
EXAMPLES = """\
  python launch/cross_fit.py --config launch/configs/cross_fit/llama-7b.yaml
  python launch/cross_fit.py --config launch/configs/cross_fit/tiny.yaml --set num_folds=3
  python launch/cross_fit.py --config launch/configs/cross_fit/llama-7b.yaml \\
      --set 'launcher=[deepspeed, --no_local_rank, --num_gpus, "8"]'
"""


@dataclass
class Stages:
    """Runs one stage at a time as a child of its own; a stop signal is passed on to it."""

    config: CrossFitConfig
    child: subprocess.Popen[bytes] | None = field(default=None)
    is_stopped: bool = False

    def run(self, title: str, script: str, stage: Config, output: Path, kind: Kind) -> None:
        """Run a stage's script, unless its output is complete.

        Raises KdecsError where it failed, Stopped after a signal.
        """
        if _is_done(stage, output, kind):
            print(f"{self.config.name}: {title}: complete, skipped", flush=True)
            return
        self.raise_if_stopped()
        folder = output.parent / f"{output.name}-config"
        write_config(stage, folder)
        command = [*(self.config.launcher or [sys.executable]), str(ROOT / script)]
        if shutil.which(command[0]) is None:
            raise DependencyError(f"launcher {command[0]}: no such command; install it or set launcher: []")
        print(f"{self.config.name}: {title}", flush=True)
        # A group of its own: `deepspeed` does not pass a signal on to its ranks.
        self.child = subprocess.Popen(
            [*command, "--config", str(folder / CONFIG_NAME)],
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        if self.is_stopped:  # a signal that came before there was a child to pass it on to
            self._pass_on()
        code = self.child.wait()
        self.raise_if_stopped()
        if code != 0:
            raise KdecsError(
                f"{self.config.name}: {title} failed (exit code {code}, its own message stands above); "
                "run the same command again to go on from there"
            )

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Pass SIGTERM on: the stage writes its checkpoint and ends."""
        del number, frame
        self.is_stopped = True
        self._pass_on()

    def _pass_on(self) -> None:
        if self.child is not None and self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended, and its wait has not returned yet
                os.killpg(self.child.pid, signal.SIGTERM)

    def raise_if_stopped(self) -> None:
        """Raise Stopped once a signal came."""
        if self.is_stopped:
            raise Stopped(f"{self.config.name}: stopped; run the same command again to go on")


def main() -> None:
    config = stage_config(CrossFitConfig, str(__doc__), EXAMPLES)
    if whole_labels(config.output, config_hash(config), show_progress=True):
        say_skipped(f"soft labels {config.name}: complete at {config.output}, skipped")
        return
    claim_output(config, config.output)
    stages = Stages(config)
    signal.signal(signal.SIGTERM, stages.stop)
    signal.signal(signal.SIGINT, stages.stop)
    with file_lock(config.work_directory / ".lock", blocking=False) as held:
        if not held:
            raise KdecsError(f"{config.work_directory}: another cross-fitting works here; wait for it")
        run_folds(config, stages)
        finish(config)


def run_folds(config: CrossFitConfig, stages: Stages) -> None:
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
        stages.run(f"teacher of {of}", "train_teacher.py", teacher, teacher.output, "teacher")
        export = config.export_config(fold)
        stages.run(f"soft labels of {of}", "export_soft_labels.py", export, export.output, "soft-labels")
    stages.raise_if_stopped()


def finish(config: CrossFitConfig) -> None:
    from kdecs.soft_labels.derive.cross_fit import merge_folds
    from kdecs.soft_labels.inspect.show import describe

    manifest = merge_folds(config)
    corpora = [config.corpus.train, config.corpus.valid]
    gold = describe(config.output, corpora, cache_dir=config.work_directory / "joined")["gold"]
    held_out, valid = (gold[str(path)]["agreement"]["macro_f1"] for path in corpora)
    print(
        f"soft labels {config.name}: {sum(manifest.details['num_pairs'].values()):,} pairs in "
        f"{len(manifest.files)} shards of {config.num_folds} teachers; agreement with gold: held-out train macro F1 "
        f"{held_out:.2f}, valid {valid:.2f}; written to {config.output}",
        flush=True,
    )


def _is_done(stage: Config, output: Path, kind: Kind) -> bool:
    """Whether a stage's output is complete; of labels every byte is read, since their own command can mend them."""
    if kind == "soft-labels":
        return whole_labels(output, config_hash(stage), show_progress=True) is not None
    return is_complete(output, kind, config_hash(stage))


def _die_with_parent() -> None:
    """In the child: ask the kernel for SIGTERM when this process is killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    run_entry(main)
