"""The whole pipeline with small models: corpus, teachers, soft labels, sweep, selection, report, prediction.

Every stage is the command that a cluster runs, as a child process; its whole output is kept under
OUTPUT/logs. A stage that is complete (by manifest and config hash) is skipped.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import psutil

from kdecs.artifact import Kind, file_lock, is_complete
from kdecs.config import Config, config_hash, load_config
from kdecs.errors import CorpusError, KdecsError, Stopped
from kdecs.process import run_entry

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "launch" / "configs" / "demo"
SAMPLE = ROOT / "kdecs" / "corpus" / "sample"
RECCON_FILES = {split: f"dailydialog_{split}.json" for split in ("train", "valid", "test")}
TEACHERS = {"llama-tiny": "llama", "roberta-tiny": "roberta"}
RANKS = 2
# Models this small are trained on two CPU ranks everywhere, whatever GPUs there are.
ON_CPU = {"KDECS_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
RUN_VARIABLE = "KDECS_DEMO_RUN"  # marks every process that a demo starts, with its run directory

# Shares of RECCON's training dialogues, so that the stages end within twenty minutes on two cores; the
# validation and test splits are used whole.
RECCON_BASE_SHARE = 0.3
RECCON_TEACHER_SHARE = 0.2
RECCON_STUDENT_SHARE = 0.1

_SHOWN = re.compile(
    r"^(base model|teacher|prompts|soft labels|student|sweep|selection|report|predict|kdecs: )"
)
_ERROR = re.compile(r"^kdecs: error: ")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BAR = re.compile(r"\d+%\|")


@dataclass
class Command:
    """One child process: what it runs, and the artifact that tells whether it is done already."""

    title: str
    arguments: list[str]
    artifact: tuple[Path, Kind, Config] | None = None
    show_all: bool = False
    is_launcher: bool = False

    def is_done(self) -> bool:
        """Whether its artifact is complete with this very config."""
        if self.artifact is None:
            return False
        directory, kind, config = self.artifact
        return is_complete(directory, kind, config_hash(config))


@dataclass
class Child:
    """A started process and the end of the pipe (or terminal) that its output comes from."""

    process: subprocess.Popen[bytes]
    reader: int
    is_launcher: bool

    def terminate(self) -> None:
        """SIGTERM; for a launcher to its whole group, since `deepspeed` does not pass it on to its ranks."""
        if self.process.poll() is not None:
            return
        if self.is_launcher:
            os.killpg(self.process.pid, signal.SIGTERM)
        else:
            self.process.send_signal(signal.SIGTERM)


@dataclass
class Demo:
    """The children of this run and how their output is shown."""

    output: Path
    children: list[Child] = field(default_factory=list)
    stopped: bool = False

    def run(self, *commands: Command) -> None:
        """Run commands side by side; raises the first one's refusal as one line, after all have ended."""
        waiting = []
        for command in commands:
            if command.is_done():
                print(f"  {command.title}: complete, skipped", flush=True)
                continue
            waiting.append((command, self._start(command)))
        # A thread for each: a child whose output nobody reads stands still once the pipe is full.
        with ThreadPoolExecutor(max_workers=max(1, len(waiting))) as readers:
            ended = list(readers.map(lambda started: self._wait(*started), waiting))
        faults = [fault for fault in ended if fault]
        if self.stopped:
            raise Stopped("demo stopped; run the same command again to go on")
        if faults:
            raise KdecsError(faults[0])

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Pass SIGTERM on; the children write their checkpoints and end."""
        del number, frame
        self.stopped = True
        for child in self.children:
            child.terminate()

    def _log(self, command: Command) -> Path:
        return self.output / "logs" / f"{re.sub('[^a-z0-9]+', '-', command.title.lower()).strip('-')}.log"

    def _start(self, command: Command) -> Child:
        if self.stopped:
            raise Stopped("demo stopped; run the same command again to go on")
        # On a terminal the child gets one too, of the same size: progress bars and colours as if started by hand.
        reader, writer = pty.openpty() if sys.stderr.isatty() else os.pipe()
        if sys.stderr.isatty():
            termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stderr.fileno()))
        process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ON_CPU, RUN_VARIABLE: str(self.output)},
            start_new_session=command.is_launcher,
            preexec_fn=_die_with_parent,
        )
        os.close(writer)
        child = Child(process, reader, command.is_launcher)
        self.children.append(child)
        return child

    def _wait(self, command: Command, child: Child) -> str | None:
        log = self._log(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        last_error = None
        on_terminal = sys.stderr.isatty()
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command.arguments)}\n".encode())
            for line in _segments(child, file):
                plain = _ANSI.sub("", line)
                if _ERROR.match(plain):
                    last_error = _ERROR.sub("", plain)
                elif _BAR.search(plain):
                    if on_terminal:
                        width = shutil.get_terminal_size().columns
                        print(f"\r\x1b[2K  {plain[: width - 3]}", end="", file=sys.stderr, flush=True)
                elif command.show_all or _SHOWN.match(plain):
                    clear = "\r\x1b[2K" if on_terminal else ""
                    print(f"{clear}  {line}", flush=True)
        code = child.process.wait()
        if on_terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
        if code == 0:
            return None
        return f"{command.title}: {last_error or f'exit code {code}'} (log: {log})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="run directory")
    parser.add_argument(
        "--reccon", type=Path, metavar="DIR", help="RECCON's files instead of the bundled sample"
    )
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    demo = Demo(output)
    signal.signal(signal.SIGTERM, demo.stop)
    signal.signal(signal.SIGINT, demo.stop)
    started = time.monotonic()
    with file_lock(output / ".lock", blocking=False) as held:
        if not held:
            raise KdecsError(f"{output}: another demo runs here; wait for it, or choose another RUN=dir")
        _end_leftovers(output)
        _run_stages(demo, _corpus_files(arguments.reccon), arguments.reccon is not None)
    print(f"\ndone in {time.monotonic() - started:.0f} s")
    print(f"report:     {output / 'sweep' / 'report' / 'index.html'}")
    print(f"MLflow UI:  make ui RUN={_shortest(output)}")


def _run_stages(demo: Demo, files: dict[str, Path], is_reccon: bool) -> None:
    output = demo.output
    corpus = [f"corpus.{split}={path}" for split, path in files.items()]
    _headline("1/6 corpus")
    paths = [str(path) for path in files.values()]
    demo.run(Command("corpus verify", ["kdecs", "corpus", "verify", *paths], show_all=True))
    demo.run(Command("corpus stats", ["kdecs", "corpus", "stats", *paths], show_all=True))
    _headline("2/6 teachers: tiny bases, then LoRA under DeepSpeed ZeRO on two ranks")
    demo.run(*(_base(output, name, corpus, is_reccon) for name in TEACHERS.values()))
    for name in TEACHERS:
        demo.run(_teacher(output, name, corpus, is_reccon))
    _headline("3/6 soft labels: sharded export on two ranks")
    for name in TEACHERS:
        demo.run(_export(output, name, corpus, is_reccon))
    _headline("4/6 sweep: students over seeds, α, τ and teacher, two at a time")
    sweep = output / "sweep"
    demo.run(Command("sweep", _sweep(output, corpus, is_reccon)))
    _headline("5/6 selection on validation, test once, report")
    python = [sys.executable]
    demo.run(Command("selection", [*python, "tune/select_student.py", "--sweep", str(sweep)], show_all=True))
    demo.run(Command("report", ["kdecs", "report", str(sweep)]))
    _headline("6/6 prediction on unlabelled dialogues")
    winner = json.loads((sweep / "selection.json").read_text(encoding="utf-8"))["winner"]["directory"]
    predictions = output / "predictions.jsonl"
    predict = [
        "kdecs",
        "predict",
        "--student",
        str(sweep / winner),
        "--input",
        str(SAMPLE / "unlabelled.json"),
    ]
    demo.run(Command("predict", [*predict, "--output", str(predictions)], show_all=True))


def _base(output: Path, architecture: str, corpus: Sequence[str], is_reccon: bool) -> Command:
    from kdecs.demo.config import BaseModelConfig

    directory = output / "base" / architecture
    overrides = [f"output={directory}", *(item for item in corpus if not item.startswith("corpus.test"))]
    if is_reccon:
        overrides.append(f"corpus.train_share={RECCON_BASE_SHARE}")
    file = CONFIGS / f"base_{architecture}.yaml"
    config = load_config(BaseModelConfig, file, overrides)
    arguments = [sys.executable, "launch/pretrain_base.py", "--config", str(file), *_set(overrides)]
    return Command(f"base model {architecture}", arguments, (directory, "base-model", config))


def _teacher(output: Path, name: str, corpus: Sequence[str], is_reccon: bool) -> Command:
    from kdecs.teacher.config import TeacherConfig

    directory = output / "teachers" / name
    overrides = [
        f"output={directory}",
        f"model.base={output / 'base' / TEACHERS[name]}",
        *(item for item in corpus if not item.startswith("corpus.test")),
    ]
    if is_reccon:
        overrides.append(f"corpus.train_share={RECCON_TEACHER_SHARE}")
    file = CONFIGS / f"teacher_{TEACHERS[name]}.yaml"
    config = load_config(TeacherConfig, file, overrides)
    arguments = [*_launcher(), "launch/train_teacher.py", "--config", str(file), *_set(overrides)]
    return Command(f"teacher {name}", arguments, (directory, "teacher", config), is_launcher=True)


def _export(output: Path, name: str, corpus: Sequence[str], is_reccon: bool) -> Command:
    from kdecs.soft_labels.config import ExportConfig

    directory = output / "labels" / name
    overrides = [f"output={directory}", f"teacher={output / 'teachers' / name}", *corpus]
    if is_reccon:
        overrides.append(f"corpus.train_share={RECCON_STUDENT_SHARE}")
    file = CONFIGS / "export.yaml"
    config = load_config(ExportConfig, file, overrides)
    arguments = [*_launcher(), "launch/export_soft_labels.py", "--config", str(file), *_set(overrides)]
    return Command(f"soft labels {name}", arguments, (directory, "soft-labels", config), is_launcher=True)


def _sweep(output: Path, corpus: Sequence[str], is_reccon: bool) -> list[str]:
    overrides = [
        f"output={output / 'sweep'}",
        f"student.cache={output / 'cache'}",
        f"student.model.base={output / 'base' / 'roberta'}",
        *(f"teachers.{name}={output / 'labels' / name}" for name in TEACHERS),
        *(f"student.{item}" for item in corpus),
        f"tracking.uri=sqlite:///{output / 'mlflow.db'}",
    ]
    if is_reccon:
        overrides.append(f"student.corpus.train_share={RECCON_STUDENT_SHARE}")
    return [sys.executable, "tune/sweep.py", "tune/spaces/demo.yaml", *_set(overrides)]


def _launcher() -> list[str]:
    # Without GPUs the launcher cannot count devices: it is told how many ranks to start.
    with socket.socket() as probe:  # the launcher's default port may be taken by another job of this machine
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ["deepspeed", "--num_accelerators", str(RANKS), "--no_local_rank", "--master_port", str(port)]


def _set(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _corpus_files(reccon: Path | None) -> dict[str, Path]:
    if reccon is None:
        return {split: SAMPLE / f"{split}.json" for split in RECCON_FILES}
    files = {split: reccon.resolve() / name for split, name in RECCON_FILES.items()}
    for path in files.values():
        if not path.is_file():
            raise CorpusError(
                f"{path}: no such file; RECCON= names a directory with {', '.join(RECCON_FILES.values())} "
                "(kdecs corpus fetch DIR downloads them)"
            )
    return files


def _segments(child: Child, log: BinaryIO) -> Iterator[str]:
    """Lines and progress-bar updates of a child's output, all of it copied to the log as it comes."""
    rest = b""
    while block := _read(child.reader):
        log.write(block)
        log.flush()
        *whole, rest = re.split(rb"[\r\n]+", rest + block)
        yield from (part.decode(errors="replace").rstrip() for part in whole if part.strip())
    if rest.strip():
        yield rest.decode(errors="replace").rstrip()
    os.close(child.reader)


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError as error:
        if error.errno == errno.EIO:  # how a terminal says that its other end is closed
            return b""
        raise


def _end_leftovers(output: Path) -> None:
    """End what a killed demo left running on this run directory: ranks write their checkpoint and go."""
    leftovers = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUN_VARIABLE) == str(output):
                process.terminate()
                leftovers.append(process)
    if leftovers:
        print(f"ending {len(leftovers)} processes that a killed demo left behind …", flush=True)
        _, alive = psutil.wait_procs(leftovers, timeout=60)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=10)


def _die_with_parent() -> None:
    """In the child: ask the kernel for SIGTERM when the demo dies (what it starts is found by RUN_VARIABLE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGTERM)


def _headline(text: str) -> None:
    print(f"\n{text}", flush=True)


def _shortest(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    run_entry(main)
