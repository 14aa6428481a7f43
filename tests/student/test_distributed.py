"""Two gloo ranks train the student that one rank trains."""

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import free_port
from transformers import RobertaForMaskedLM

from kdecs.errors import Stopped
from kdecs.process import StopSignal
from kdecs.runtime import Runtime, process_group
from kdecs.student.config import StudentConfig
from kdecs.student.training import train_student

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def serve_rank(rank: int, port: int, orders: Connection) -> None:
    """What a rank's process does: it trains each config that it is sent, and answers how that ended."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    runtime = Runtime(rank, rank, 2, torch.device("cpu"))
    with process_group(runtime):
        while (order := orders.recv()) is not None:
            config, stop = order
            try:
                train_student(config, runtime, stop=StopSignal(requested=stop and rank == 1))
                orders.send("trained")
            except Stopped:
                orders.send("stopped")
    sys.stdout.flush()
    os._exit(0)  # as kdecs.process.leave ends a rank


@pytest.fixture(scope="module")
def train_on_two_ranks() -> Iterator[Callable[..., list[str]]]:
    """A function that trains a config on two gloo ranks, of which one may be signalled: how that ended on each.

    The two processes serve all tests of the module: their start takes longer than the trainings.
    """
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=serve_rank, args=(rank, port, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for rank, (_, theirs) in zip(ranks, pipes, strict=True):
        rank.start()
        theirs.close()  # so that a rank that dies is the end of its pipe

    def train(config: StudentConfig, *, stop: bool = False) -> list[str]:
        for ours, _ in pipes:
            ours.send((config, stop))
        assert all(ours.poll(600) for ours, _ in pipes), "a rank gives no answer"
        return [ours.recv() for ours, _ in pipes]

    yield train
    for rank, (ours, _) in zip(ranks, pipes, strict=True):
        with contextlib.suppress(OSError):  # of a rank that is dead, which a test has said by then
            ours.send(None)
        rank.join(timeout=60)
        rank.kill()


@pytest.fixture
def base_without_dropout(base: Path, tmp_path: Path) -> Path:
    """Each rank draws different dropout masks, so the losses are equal only without dropout."""
    directory = tmp_path / "plain_base"
    model = RobertaForMaskedLM.from_pretrained(
        base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((base / name).read_bytes())
    return directory


@pytest.mark.parametrize("layout", ["pair", "tree"])
def test_two_ranks_train_what_one_trains_also_after_a_stop(
    make_config, runtime, base_without_dropout, train_on_two_ranks, layout
):
    groups = {
        "model": {"base": str(base_without_dropout), "span_head": "pointer", "max_prompt_tokens": 256}
        | {"layout": layout},
        "batches": {
            "global_batch_pairs": 7
        },  # the last batch holds one pair: a rank's share is padding alone
        "optimization": {"learning_rate": 1e-3, "epochs": 2},
    }
    alone = train_student(make_config("alone", **groups), runtime)
    config = make_config("together", **groups)
    assert train_on_two_ranks(config, stop=True) == ["stopped"] * 2
    assert (config.output / "checkpoint.pt").is_file()
    assert train_on_two_ranks(config) == ["trained"] * 2
    for file in ("model/model.safetensors", "heads.safetensors"):
        expected, found = load_file(alone / file), load_file(config.output / file)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)


def test_losses_of_an_epoch_that_two_ranks_were_stopped_in_are_those_of_a_whole_one(
    make_config, train_on_two_ranks
):
    """Stopped at step 20 of 33, where ranks look at one another: both have sums of their own then."""
    groups = {
        "batches": {"global_batch_pairs": 3},
        "optimization": {"learning_rate": 1e-3, "epochs": 1},
    }
    whole, stopped = make_config("whole", **groups), make_config("stopped", **groups)
    assert train_on_two_ranks(whole) == ["trained"] * 2
    assert train_on_two_ranks(stopped, stop=True) == ["stopped"] * 2
    assert not (stopped.output / "metrics.jsonl").read_text()
    assert train_on_two_ranks(stopped) == ["trained"] * 2
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
    make_config, runtime, base_without_dropout, train_on_two_ranks, mode, given, heads
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
    assert train_on_two_ranks(config) == ["trained"] * 2
    expected, found = (load_file(place / "heads.safetensors") for place in (alone, config.output))
    assert set(expected) >= heads
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
