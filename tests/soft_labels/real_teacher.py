"""A tiny real teacher (two layers, LoRA trained for a few steps), and the real export command on it."""

from pathlib import Path

import yaml
from support import ForkedPython, start_forked

from kdecs.corpus.reading import bundled_sample

ROOT = Path(__file__).resolve().parents[2]
CORPUS = {"train": bundled_sample("valid"), "valid": bundled_sample("test")}


def make_real_teacher(directory: Path) -> Path:
    """A finished teacher directory of the small half of the sample."""
    import torch

    from kdecs.config import parse_config
    from kdecs.demo.base_model import train_base_model
    from kdecs.demo.config import BaseModelConfig
    from kdecs.process import StopSignal
    from kdecs.runtime import Runtime, process_group
    from kdecs.teacher.config import TeacherConfig
    from kdecs.teacher.training import train_teacher

    torch.set_num_threads(1)
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    corpus = {split: str(path) for split, path in CORPUS.items()}
    base = {
        "name": "base", "output": str(directory / "base"), "corpus": corpus, "architecture": "llama",
        "vocabulary_size": 800, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_positions": 1024,
        "max_steps": 3, "batch_size": 4, "sequence_tokens": 64,
    }  # fmt: skip
    train_base_model(parse_config(BaseModelConfig, base, source="test"), runtime, StopSignal())
    teacher = {
        "name": "teacher", "output": str(directory / "teacher"), "corpus": corpus | {"train_share": 0.3},
        "model": {"family": "causal", "base": str(directory / "base")},
        "batches": {"max_prompt_tokens": 1000},
        "optimization": {"epochs": 1, "learning_rate": 0.01},
    }  # fmt: skip
    with process_group(runtime, single=True):
        train_teacher(parse_config(TeacherConfig, teacher, source="test"), runtime, StopSignal())
    return directory / "teacher"


def write_config(path: Path, teacher: Path, output: Path, **changes: object) -> Path:
    """A config of the real export."""
    values: dict[str, object] = {
        "teacher": str(teacher),
        "output": str(output),
        "corpus": {split: str(corpus) for split, corpus in CORPUS.items()},
        "num_shards": 4,
        "micro_batch_tokens": 512,
    }
    path.write_text(yaml.safe_dump(values | changes))
    return path


def start_export(config: Path, *, rank: int = 0, world_size: int = 1, port: int = 0) -> ForkedPython:
    """The export command as a launcher starts a rank of it, in a forked process."""
    return start_forked(
        "launch/export_soft_labels.py",
        *("--config", config),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
