"""One student after another in one process, each in a thread of its own as a Ray worker runs its trials."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from kdecs.config import write_config

NUM_TRAININGS = 3
TRAINER = """
import os, sys, threading
from pathlib import Path
import psutil
import kdecs.student.training
from kdecs.config import load_config
from kdecs.runtime import start_runtime
from kdecs.student.config import StudentConfig
from kdecs.student.training import train_student

config = load_config(StudentConfig, Path(sys.argv[1]))
if sys.argv[3] == "keep":
    kdecs.student.training.return_freed_memory = lambda: None
runtime = start_runtime(device="cpu", threads=1)
# Ray's workers have dozens of threads: all of glibc's arenas are taken, and the next thread gets the next one.
ended = threading.Event()
for _ in range(8 * os.cpu_count() + 8):
    threading.Thread(target=lambda: (bytearray(10_000), ended.wait()), daemon=True).start()
for number in range(int(sys.argv[2])):
    one = config.model_copy(update={"output": config.output / str(number)})
    thread = threading.Thread(target=train_student, args=(one, runtime))
    thread.start()
    thread.join()
    assert (one.output / "manifest.json").is_file()
    print("MiB", psutil.Process().memory_info().rss >> 20, flush=True)
"""


def used_after_each(student, output, how):
    """MiB of the process after each training; `keep`: freed memory is not given back."""
    output.mkdir()
    write_config(student.model_copy(update={"output": output}), output)
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, str(output / "config.json"), str(NUM_TRAININGS), how],
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("MiB")]
    assert len(used) == NUM_TRAININGS
    return used


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_training_leaves_no_memory_to_the_next(make_config, base, corpus_files, tmp_path):
    """Beside the same trainings in a process that keeps what the steps had allocated."""
    wide = tmp_path / "wide"
    tokenizer = AutoTokenizer.from_pretrained(base)
    shape = json.loads((base / "config.json").read_text())
    config = RobertaConfig(**{**shape, "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 1024})
    RobertaForMaskedLM(config).save_pretrained(wide)
    tokenizer.save_pretrained(wide)
    student = make_config(
        model={"base": str(wide), "span_head": "pointer", "max_prompt_tokens": 256},
        distillation={"mode": "joint"},
        optimization={"epochs": 1},
    )
    kept, returned = (used_after_each(student, tmp_path / how, how) for how in ("keep", "return"))
    assert max(returned) - returned[0] < (max(kept) - returned[0]) / 3, (returned, kept)
