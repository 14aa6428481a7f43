"""A student in PyTorch and its exports to ONNX: speed, latency, size, start-up, memory and macro F1, side by side.

Six ways to run the same weights: PyTorch, ONNX float32 and ONNX int8, each in the layouts pair and tree. Each runs in
a separate process, so that no PyTorch is loaded while an export is measured. The processes take turns, and all times
are processor seconds of one thread, which other work on the machine changes little.

The record compares int8 trees with PyTorch pair by pair. Without `--pair` and `--tree` the students have MiniLM-L6's
shape and random weights, and no F1: what they predict is noise, and costs the same.

    python benchmarks/student_onnx.py
    python benchmarks/student_onnx.py --pair runs/student-pair --tree runs/student-tree --f1
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import corpus_split, write_record

from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import Dialogue

LATENCY_TURNS = 10
FORMATS = ("torch", "onnx", "int8")


def ten_utterances(dialogues: tuple[Dialogue, ...], count: int) -> list[Dialogue]:
    """The first ten utterances of the dialogues that have as many."""
    long = [d for d in dialogues if len(d.utterances) >= LATENCY_TURNS]
    return [replace(d, utterances=d.utterances[:LATENCY_TURNS]) for d in long[:count]]


def measure_here(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one engine costs, measured in this process, which has loaded nothing for another."""
    began, wall = time.process_time(), time.perf_counter()
    from kdecs.student.predict.predictor import Student

    student = Student.from_pretrained(directory)
    found: dict[str, Any] = {
        "start_s": time.process_time() - began,
        "start_wall_s": time.perf_counter() - wall,
    }
    corpus = read_corpus(corpus_split("valid")[0])
    student.predict(corpus.dialogues[:1])  # first calls allocate
    began = time.process_time()
    student.predict(corpus.dialogues[: arguments.dialogues])
    found["dialogues_per_s"] = arguments.dialogues / (time.process_time() - began)
    latencies = []
    for dialogue in ten_utterances(corpus.dialogues, arguments.latencies):
        began = time.process_time()
        student.predict([dialogue])
        latencies.append(1000 * (time.process_time() - began))
    found["latencies_ms"] = latencies
    found["memory_mib"] = peak_memory_mib()
    if arguments.f1:
        from kdecs.evaluation.metrics import evaluate

        found["macro_f1"] = evaluate(corpus, student.predict_pairs(corpus), universe="fold1")["macro_f1"]
    return found


def peak_memory_mib() -> float:
    """The most memory that this program has held; `getrusage` would also count the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024


def make_students(directory: Path) -> dict[str, Path]:
    """Untrained students of MiniLM-L6's shape in both layouts."""
    from _student_parts import some_dialogues
    from student_predict import make_student

    from kdecs.artifact import write_manifest
    from kdecs.config import COMMITTED, load_config, write_config
    from kdecs.models import load_tokenizer
    from kdecs.student.config import StudentConfig
    from kdecs.student.model import save_student

    text = some_dialogues(corpus_split("train")[0], directory, 60)
    students = {}
    for layout in ("pair", "tree"):
        student = make_student(directory / layout, text, layout)
        output = students[layout] = directory / f"student-{layout}"
        tokenizer = load_tokenizer(directory / layout / "base")
        save_student(output, student.scorer.model, tokenizer, student.card)
        write_config(load_config(StudentConfig, COMMITTED / "student" / "tiny.yaml"), output)
        files = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
        write_manifest(output, "student", config_hash="0" * 64, inputs={}, files=files)
    return students


def export(student: Path, output: Path, *, is_int8: bool, is_trained: bool) -> Path:
    """Export a student as its command does. What that measures of int8 means nothing without training: one dialogue."""
    from _student_parts import some_dialogues

    from kdecs.student.onnx.export import OnnxExport, export_student

    corpus_file = None if is_trained else some_dialogues(corpus_split("valid")[0], output.parent, 1)
    config = OnnxExport(student=student, output=output, precision="int8" if is_int8 else "float32")
    return export_student(config, corpus_file=corpus_file, force=True)


def size_mb(directory: Path) -> float:
    """The files that prediction reads, in megabytes."""
    names = ("model", "heads.safetensors", "model.onnx", "tokenizer.json", "student.json", "onnx.json")
    files = [p for name in names for p in [directory / name, *(directory / name).glob("*")] if p.is_file()]
    return sum(path.stat().st_size for path in files) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, help="a trained student of the layout pair")
    parser.add_argument("--tree", type=Path, help="a trained student of the layout tree")
    parser.add_argument("--dialogues", type=int, default=6)
    parser.add_argument("--latencies", type=int, default=20, help="dialogues whose latency is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--f1", action="store_true", help="also macro F1 on the validation split")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_here(arguments.measure, arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        students = {"pair": arguments.pair, "tree": arguments.tree}
        is_trained = None not in students.values()
        if not is_trained:
            students = make_students(directory)
        places: dict[str, Path] = {}
        for layout, student in students.items():
            places[f"torch {layout}"] = student
            for name in FORMATS[1:]:
                places[f"{name} {layout}"] = export(
                    student, directory / f"{layout}-{name}", is_int8=name == "int8", is_trained=is_trained
                )
        options = [f"--dialogues={arguments.dialogues}", f"--latencies={arguments.latencies}"]
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
        for number in range(arguments.rounds):
            for name, place in places.items():
                command = [sys.executable, __file__, f"--measure={place}", *options]
                command += ["--f1"] if arguments.f1 and number == 0 else []
                done = subprocess.run(
                    command,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
        table = {name: summary(found) | {"size_mb": size_mb(places[name])} for name, found in rounds.items()}
    for name, row in table.items():
        print(name, json.dumps(row))
    ratios = [
        ours["dialogues_per_s"] / theirs["dialogues_per_s"]
        for ours, theirs in zip(rounds["int8 tree"], rounds["torch pair"], strict=True)
    ]
    write_record(
        "student_onnx_vs_torch_pair",
        unit="dialogues per processor second",
        ours=table["int8 tree"]["dialogues_per_s"],
        baseline=table["torch pair"]["dialogues_per_s"],
        ratio=statistics.median(ratios),
        baseline_name="PyTorch pair by pair, MiniLM-L6's shape",
        corpus=corpus_split("valid")[1],
        dtype="int8",
        target=6,
        details={"ratios": ratios, "dialogues": arguments.dialogues, "threads": 1, "table": table},
    )


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds, latencies over all of them."""
    latencies = sorted(value for found in rounds for value in found["latencies_ms"])
    row = {
        key: statistics.median(found[key] for found in rounds)
        for key in ("dialogues_per_s", "start_s", "start_wall_s", "memory_mib")
    }
    row["latency_p50_ms"] = statistics.median(latencies)
    row["latency_p95_ms"] = latencies[int(0.95 * (len(latencies) - 1))]
    if "macro_f1" in rounds[0]:
        row["macro_f1"] = rounds[0]["macro_f1"]
    return row


if __name__ == "__main__":
    main()
