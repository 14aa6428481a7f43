"""Two gloo ranks train the student that one rank trains."""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import RobertaForMaskedLM

from kdecs.errors import Stopped
from kdecs.process import StopSignal
from kdecs.runtime import Runtime, process_group
from kdecs.student.config import StudentConfig
from kdecs.student.training import train_student

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def _train(rank: int, world_size: int, port: int, config: StudentConfig, stop: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    runtime = Runtime(rank, rank, world_size, torch.device("cpu"))
    signal = StopSignal(requested=stop and rank == 1)
    try:
        with process_group(runtime):
            train_student(config, runtime, stop=signal)
    except Stopped:
        os._exit(Stopped.exit_code)
    sys.stdout.flush()
    os._exit(0)  # as kdecs.process.leave ends a rank


def _launch(config: StudentConfig, *, world_size: int = 2, stop: bool = False) -> list[int | None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_train, args=(rank, world_size, port, config, stop))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=600)
    return [rank.exitcode for rank in ranks]


@pytest.fixture
def base_without_dropout(base: Path, tmp_path: Path) -> Path:
    """Ranks draw masks of their own, so only without dropout are the losses the same."""
    directory = tmp_path / "plain_base"
    model = RobertaForMaskedLM.from_pretrained(
        base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((base / name).read_bytes())
    return directory


def test_two_ranks_train_what_one_trains_also_after_a_stop(make_config, runtime, base_without_dropout):
    groups = {
        "model": {"base": str(base_without_dropout), "span_head": "pointer", "max_prompt_tokens": 256},
        "batches": {
            "global_batch_pairs": 7
        },  # the last batch holds one pair: a rank's share is padding alone
        "optimization": {"learning_rate": 1e-3, "epochs": 2},
    }
    alone = train_student(make_config("alone", **groups), runtime)
    config = make_config("together", **groups)
    assert _launch(config, stop=True) == [Stopped.exit_code] * 2
    assert (config.output / "checkpoint.pt").is_file()
    assert _launch(config) == [0, 0]
    for file in ("model/model.safetensors", "heads.safetensors"):
        expected, found = load_file(alone / file), load_file(config.output / file)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)


def test_losses_of_an_epoch_that_two_ranks_were_stopped_in_are_those_of_a_whole_one(make_config):
    """Stopped at step 20 of 33, where ranks look at one another: both have sums of their own then."""
    groups = {
        "batches": {"global_batch_pairs": 3},
        "optimization": {"learning_rate": 1e-3, "epochs": 1},
    }
    whole, stopped = make_config("whole", **groups), make_config("stopped", **groups)
    assert _launch(whole) == [0, 0]
    assert _launch(stopped, stop=True) == [Stopped.exit_code] * 2
    assert not (stopped.output / "metrics.jsonl").read_text()
    assert _launch(stopped) == [0, 0]
    expected, found = (json.loads((c.output / "metrics.jsonl").read_text()) for c in (whole, stopped))
    losses = [key for key in expected if key.endswith("_loss")]
    assert len(losses) == 4
    assert {key: found[key] for key in losses} == pytest.approx({key: expected[key] for key in losses})


@pytest.mark.parametrize(
    ("mode", "given", "heads"),
    [
        ("cls", "fine", {"classifier.weight", "priors.cause", "span.start.weight"}),
        ("cls", "none", {"classifier.weight", "priors.cause", "priors.emotion"}),
        ("span_only", "none", {"priors.span", "priors.first_start", "priors.emotion"}),
    ],
)
def test_two_ranks_train_a_mode_that_has_not_every_output(
    make_config, runtime, base_without_dropout, mode, given, heads
):
    groups = {
        "model": {
            "base": str(base_without_dropout),
            "span_head": "pointer",
            "given_emotions": given,
            "priors": "training",
        },
        "distillation": {"mode": mode},
        "optimization": {"learning_rate": 1e-3, "epochs": 1},
    }
    alone = train_student(make_config("alone", **groups), runtime)
    config = make_config("together", **groups)
    assert _launch(config) == [0, 0]
    expected, found = (load_file(place / "heads.safetensors") for place in (alone, config.output))
    assert set(expected) >= heads
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
