"""A trainer without a model: seconds instead of hours, with the files and the behaviour of the real one.

The score rises by epoch and depends on alpha, temperature, seed and teacher. FAKE_TRAINER, a JSON object,
sets `epoch_s`, `refuse_alpha`, `raise_early` and, by seed, `refuse`, `raise`, `kill_once` (kill -9 after the first
epoch), `kill` (after every epoch), `kill_early` (before any), `raise_between` (after every epoch's checkpoint, before
its line is in `metrics.jsonl`).
"""

import json
import os
import signal
import time

import torch

from kdecs.artifact import atomic_path, write_manifest, write_text
from kdecs.config import config_hash, write_config
from kdecs.errors import Stopped, TrainingError
from kdecs.sweep.config import num_epochs


def score_of(config, epoch):
    if config.kind != "student":
        return 70 + 0.3 * config.optimization.seed + 2 * epoch  # better than any student
    bend = 8 * (config.distillation.alpha - 0.6) ** 2 + 0.1 * (config.distillation.temperature - 2) ** 2
    teacher = 2.0 if "llama" in str(config.distillation.labels) else 0.0
    mode = {"kd": 0.0, "joint": -2.0, "cls": -3.0, "span_only": -6.0}[config.distillation.mode]
    share = -4 * (1 - config.distillation.hard_share)
    return 60 - bend + teacher + mode + share + 0.3 * config.optimization.seed + 2 * epoch


def read_checkpoint(path):
    return torch.load(path, weights_only=True)["progress"]["history"] if path.exists() else []


def write_checkpoint(path, digest, points):
    with atomic_path(path) as temporary:
        torch.save({"config_hash": digest, "progress": {"history": points}}, temporary)


def write_points(path, points, config):
    lines = points
    if (
        config.kind == "generative"
    ):  # it also writes lines between its validations, which are not whole epochs
        lines = [
            {**shown, "epoch": (point["epoch"] - late) / 4}
            for point in points
            for late, shown in ((0.5, {"time": point["time"], "train_loss": 1.0}), (0, point))
        ]
    write_text(path, "".join(json.dumps(point) + "\n" for point in lines))


def train(config, on_epoch, stop):
    behaviour = json.loads(os.environ.get("FAKE_TRAINER", "{}"))
    seed, output = config.optimization.seed, config.output
    write_config(config, output)
    checkpoint, metrics, digest = output / "checkpoint.pt", output / "metrics.jsonl", config_hash(config)
    points = read_checkpoint(checkpoint)
    print(
        f"seed {seed}: from epoch {len(points)} with {os.environ.get('OMP_NUM_THREADS')} threads", flush=True
    )
    alpha = config.distillation.alpha if config.kind == "student" else None
    if seed in behaviour.get("refuse", []) or alpha == behaviour.get("refuse_alpha", -1):
        raise TrainingError(f"{output}: the loss is not finite\nat step 3")
    if behaviour.get("raise_early"):
        raise RuntimeError("a fault before the first epoch")
    if seed in behaviour.get("kill_early", []):
        os.kill(os.getpid(), signal.SIGKILL)
    write_points(metrics, points, config)
    for epoch in range(len(points) + 1, num_epochs(config) + 1):
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
        write_checkpoint(checkpoint, digest, points)
        if seed in behaviour.get("raise_between", []):
            raise RuntimeError("a fault before the epoch's line")
        write_points(metrics, points, config)
        on_epoch(points[-1])
        if seed in behaviour.get("raise", []):
            raise RuntimeError("a fault of ours")
        if seed in behaviour.get("kill", []) or (seed in behaviour.get("kill_once", []) and epoch == 1):
            os.kill(os.getpid(), signal.SIGKILL)
    (output / "weights.bin").write_bytes(os.urandom(16))
    write_manifest(
        output,
        config.kind,
        config_hash=digest,
        inputs={},
        files=["config.json", "metrics.jsonl", "weights.bin"],
        details={"epochs": len(points)},
    )
    checkpoint.unlink()
    return output
