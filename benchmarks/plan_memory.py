"""The plan's peak against the peak of real trainings: ZeRO stages 0 to 3 on one and two ranks, on the CPU.

    python benchmarks/plan_memory.py                    # all rows, a few minutes
    python benchmarks/plan_memory.py --rows zero3-2     # rows whose name begins so

A row trains three steps of a LLaMA architecture with random weights through kdecs' own engine, and the same with a very
small network. The difference of their resident peaks is the part that depends on the model; the plan's difference is
compared with it. What is measured is the process: glibc is told to use one arena and to give freed blocks back at once
(MALLOC_*), else its caches would be measured too. Baseline: the measured peak. Ratio: the worst row, 1 is exact.
Exits with 1 where the plan of any row is more than 15% beside its measured peak.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from _plan_memory_worker import synthetic_prompts  # noqa: E402

MIB = 2**20
TOLERANCE = 0.15
STARTS = 2
TOKENS = 512
BIG = {"vocab_size": 32768, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8}
TINY = {"vocab_size": 1024, "hidden_size": 36, "intermediate_size": 96, "num_hidden_layers": 3}
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Row:
    """One training that is planned and measured."""

    stage: int
    ranks: int
    dtype: str = "float32"
    checkpointing: bool = False
    batching: str = "tree"
    is_full: bool = False

    @property
    def prompts(self) -> int:
        """Few where each is computed whole."""
        return 16 if self.batching == "tree" else 4

    @property
    def name(self) -> str:
        marks = [f"zero{self.stage}-{self.ranks}", self.dtype, self.batching]
        marks += ["checkpointing"] * self.checkpointing + ["full"] * self.is_full
        return "-".join(marks)


ROWS = [
    *(Row(stage, ranks) for stage in range(4) for ranks in (1, 2)),
    Row(2, 2, checkpointing=True),
    Row(2, 2, dtype="bfloat16"),
    Row(2, 1, batching="pairs"),
    *(Row(stage, 2, is_full=True) for stage in (0, 2, 3)),
]


def make_model(directory: Path, shape: dict[str, int]) -> None:
    """A LLaMA directory with random weights and a tokenizer of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kdecs.config import parse_config
    from kdecs.corpus.reading import bundled_sample, read_corpus
    from kdecs.demo.base_model import train_tokenizer
    from kdecs.demo.config import BaseModelConfig

    corpus = bundled_sample("valid")
    values = {
        "name": "x",
        "output": "x",
        "corpus": {"train": str(corpus), "valid": str(corpus)},
        "architecture": "llama",
        "vocabulary_size": 800,
        "max_positions": 8192,
    }
    texts = [u.text for dialogue in read_corpus(corpus).dialogues for u in dialogue.utterances]
    tokenizer = train_tokenizer(texts, parse_config(BaseModelConfig, values, source="benchmark"))
    config = LlamaConfig(
        **shape,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def measured_peak(row: Row, model: Path, scratch: Path) -> int:
    """Bytes of the highest resident set of any rank, while it trains.

    A training that ended badly is started once more, and a line says so: a rank was seen to abort once ("terminate
    called without an active exception"), and not again, for a reason outside Python.
    """
    config = {
        "name": "plan",
        "output": str(scratch / "teacher"),
        "corpus": {"train": "none.json", "valid": "none.json"},
        "model": {"family": "causal", "base": str(model)},
        "zero": {
            "stage": row.stage,
            "dtype": row.dtype,
            "activation_checkpointing": row.checkpointing,
        },
        "batches": {"batching": row.batching, "micro_batch_tokens": TOKENS},
        **({"lora": None} if row.is_full else {}),
    }
    (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
    worker = [sys.executable, str(HERE / "_plan_memory_worker.py"), "--config", str(scratch / "config.json")]
    worker += [
        "--ranks",
        str(row.ranks),
        "--tokens",
        str(TOKENS),
        "--prompts",
        str(row.prompts),
        "--output",
        str(scratch / "memory"),
    ]
    environment = {**os.environ, **ALLOCATOR, "DS_ACCELERATOR": "cpu", "KDECS_DEVICE": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    for start in range(1, STARTS + 1):
        for old in scratch.glob("memory.*"):
            old.unlink()
        returncode, shown = _run(worker, environment)
        files = list(scratch.glob("memory.*"))
        if returncode == 0 and len(files) == row.ranks:
            return max(json.loads(file.read_text(encoding="utf-8"))["training_peak"] for file in files)
        if start < STARTS:
            print(f"{row.name}: ended with {returncode}, is started again: {shown[-300:]}", flush=True)
    raise RuntimeError(f"{row.name}: {shown[-3000:]}")


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output; no rank outlives this call."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        shown, _ = process.communicate(timeout=570)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, shown


def planned_peak(row: Row, model: Path) -> Any:
    """The plan's PeakMemory for the same training."""
    from transformers import AutoConfig

    from kdecs.teacher.config import LoraConfig
    from kdecs.teacher.network import DTYPES, meta_network
    from kdecs.teacher.plan.activations import ActivationTracer, Shape
    from kdecs.teacher.plan.memory import PERSISTENCE_THRESHOLD, ZeroChoice, peak_memory, state_bytes
    from kdecs.teacher.plan.shapes import count_parameters
    from kdecs.teacher.tree.prefix_tree import pack

    config = AutoConfig.from_pretrained(model)
    lora = None if row.is_full else LoraConfig()
    prompts = synthetic_prompts(TOKENS, row.prompts)
    if row.batching == "tree":
        tree = pack([prompt.tokens for prompt in prompts])
        shape = Shape(1, tree.num_tokens, row.prompts, tree)
    else:
        shape = Shape(row.prompts, max(len(prompt.tokens) for prompt in prompts), row.prompts)
    tracer = ActivationTracer(config, lora, dtype=DTYPES[row.dtype], attention="blocks")
    activations = tracer.memory(shape, checkpointing=row.checkpointing)
    counts = count_parameters(meta_network(config, lora), persistence_threshold=PERSISTENCE_THRESHOLD)
    states = state_bytes(counts, ZeroChoice(row.stage, row.ranks, row.dtype), is_gpu=False)
    return peak_memory(states, activations)


def compare(row: Row, big: Path, tiny: Path, scratch: Path, floors: dict[Row, int]) -> dict[str, Any]:
    """Planned and measured part of the peak that depends on the model, in MiB, and their ratio.

    `floors` keeps the very small network's peaks: a row's dtype and batching hardly change them.
    """
    plain = Row(row.stage, row.ranks)
    if plain not in floors:
        floors[plain] = measured_peak(plain, tiny, scratch)
    measured = measured_peak(row, big, scratch) - floors[plain]
    plan = planned_peak(row, big)
    planned = plan.total - planned_peak(plain, tiny).total
    return {
        "row": row.name,
        "dtype": row.dtype,
        "planned_mib": planned / MIB,
        "measured_mib": measured / MIB,
        "planned_over_measured": planned / measured,
        "parts_mib": {name: value / MIB for name, value in vars(plan).items() if value},
    }


def run_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Measure rows one after another and print each."""
    results = []
    floors: dict[Row, int] = {}
    with tempfile.TemporaryDirectory(prefix="plan-") as directory:
        scratch = Path(directory)
        make_model(scratch / "big", BIG)
        make_model(scratch / "tiny", TINY)
        for row in rows:
            result = compare(row, scratch / "big", scratch / "tiny", scratch, floors)
            results.append(result)
            print(
                f"{row.name:36} planned {result['planned_mib']:7.1f} MiB, measured "
                f"{result['measured_mib']:7.1f} MiB, ratio {result['planned_over_measured']:.3f}",
                flush=True,
            )
    return results


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running row is cleaned up
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[""], help="beginnings of names; default: all")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if any(row.name.startswith(begin) for begin in arguments.rows)]
    if not rows:
        raise SystemExit(f"no such rows; there are {', '.join(row.name for row in ROWS)}")
    results = run_rows(rows)
    if len(rows) == len(ROWS):
        write(results)
    beyond = [f"{r['row']} ({r['planned_over_measured']:.3f})" for r in results if is_beyond(r)]
    if beyond:
        raise SystemExit(f"plan_memory: planned over measured beyond {TOLERANCE:.0%}: {', '.join(beyond)}")


def is_beyond(result: dict[str, Any]) -> bool:
    """Whether a row's plan is too far from what was measured (a measured part of nothing too)."""
    return not abs(result["planned_over_measured"] - 1) <= TOLERANCE


def write(results: list[dict[str, Any]]) -> None:
    """The record of all rows, whose figures are those of the worst."""
    from record import write_record

    worst = max(results, key=lambda r: max(r["planned_over_measured"], 1 / r["planned_over_measured"]))
    write_record(
        "plan_memory",
        unit="MiB",
        ours=worst["planned_mib"],
        baseline=worst["measured_mib"],
        baseline_name=f"measured peak, worst of {len(results)} rows: {worst['row']}",
        corpus="synthetic tree of 512 tokens",
        dtype=worst["dtype"],
        target=1 + TOLERANCE,
        details={"rows": results, "model": BIG, "allocator": ALLOCATOR},
    )


if __name__ == "__main__":
    main()
