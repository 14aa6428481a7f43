"""A trainer without a model: seconds instead of hours, with the files and the behaviour of the real one.

The score rises by epoch and depends on alpha, temperature, seed and teacher. FAKE_TRAINER, a JSON object,
sets `epoch_s` and, by seed, `refuse`, `raise`, `kill_once` (kill -9 after the first epoch) or `kill`.
"""

import json
import os
import signal
import time

from kdecs.artifact import write_json, write_manifest
from kdecs.config import config_hash, write_config
from kdecs.errors import Stopped, TrainingError


def score_of(config, epoch):
    bend = 8 * (config.distillation.alpha - 0.6) ** 2 + 0.1 * (config.distillation.temperature - 2) ** 2
    teacher = 2.0 if "llama" in str(config.distillation.labels) else 0.0
    return 60 - bend + teacher + 0.3 * config.optimization.seed + 2 * epoch


def train(config, on_epoch, stop):
    behaviour = json.loads(os.environ.get("FAKE_TRAINER", "{}"))
    seed, output = config.optimization.seed, config.output
    write_config(config, output)
    checkpoint, metrics = output / "checkpoint.json", output / "metrics.jsonl"
    points = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    print(
        f"seed {seed}: from epoch {len(points)} with {os.environ.get('OMP_NUM_THREADS')} threads", flush=True
    )
    if seed in behaviour.get("refuse", []):
        raise TrainingError(f"{output}: the loss is not finite\nat step 3")
    for epoch in range(len(points) + 1, config.optimization.epochs + 1):
        ends = time.monotonic() + behaviour.get("epoch_s", 0.0)
        while time.monotonic() < ends:
            time.sleep(0.02)
            if stop.requested:
                raise Stopped(f"{output}: stopped, state saved")
        macro = score_of(config, epoch)
        points.append(
            {
                "epoch": epoch,
                "step": 10 * epoch,
                "time": time.time(),
                "train_loss": 2.0 / epoch,
                "macro_f1": macro,
                "positive_f1": macro - 15,
                "negative_f1": macro + 15,
                "exact_match": macro - 30,
                "emotion_accuracy": macro - 10,
                "utterance_macro_f1": macro + 1,
            }
        )
        metrics.write_text("".join(json.dumps(point) + "\n" for point in points))
        write_json(checkpoint, points)
        on_epoch(points[-1])
        if seed in behaviour.get("raise", []):
            raise RuntimeError("a fault of ours")
        if seed in behaviour.get("kill", []) or (seed in behaviour.get("kill_once", []) and epoch == 1):
            os.kill(os.getpid(), signal.SIGKILL)
    (output / "weights.bin").write_bytes(os.urandom(16))
    write_manifest(
        output,
        "student",
        config_hash=config_hash(config),
        inputs={},
        files=["config.json", "metrics.jsonl", "weights.bin"],
        details={"epochs": len(points)},
    )
    checkpoint.unlink()
    return output
