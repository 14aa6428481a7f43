"""The epoch loop over a toy task: exact resume after any stop, kills between any two writes, ranks, finite steps."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support import Bomb, Killed, StopAfter, flip_bit, leave_temporary

from kdecs.config import BudgetedOptimization, Optimization
from kdecs.errors import ArtifactError, Stopped, TrainingError
from kdecs.runtime import Runtime
from kdecs.training import checkpoint, loop
from kdecs.training.checkpoint import TrainState, install_best, remove_checkpoint, restore_metrics
from kdecs.training.loop import (
    EpochLoop,
    LoopSettings,
    adamw,
    epoch_batches,
    group_share,
    grouped_batches,
    learning_rate_at,
    rank_share,
    step_seed,
)

RUNTIME = Runtime(0, 0, 1, torch.device("cpu"))
EPOCHS = 3
STEPS = 3  # per epoch: 10 rows in batches of 4
NAMES = ("weights.pt", "card.json")


class Regression:
    """A linear model with dropout on ten rows; an epoch scores what `scores` say, or else better the lower its loss."""

    criterion = "macro_f1"

    def __init__(self, scores: dict[int, float] | None = None) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
        self.optimizer = adamw(self.model, Optimization(learning_rate=0.1, weight_decay=0.01))
        self.no_sums = torch.zeros(1, dtype=torch.float64)
        self.inputs, self.gold = torch.randn(10, 4), torch.randn(10)
        self.scores = scores or {}
        self.poisoned_step = 0
        self.seen: list[list[torch.Tensor]] = []

    def loss(self, rows_B, weights_B, count):
        self.seen.append([parameter.detach().clone() for parameter in self.model.parameters()])
        found = self.model(self.inputs[rows_B]).squeeze(1)
        loss = (((found - self.gold[rows_B]) ** 2) * torch.from_numpy(weights_B)).sum() / count
        if len(self.seen) == self.poisoned_step:
            loss = loss * float("nan")
        return loss, loss.detach().double().reshape(1) * count

    def validate(self, state: TrainState, num_rows: int):
        epoch = state.epoch + 1
        loss = state.sums.item() / num_rows
        return {
            "epoch": epoch,
            "time": 0.0,
            "train_loss": loss,
            "macro_f1": self.scores.get(epoch, 1 / (1 + loss)),
        }

    def save(self, folder: Path) -> None:
        torch.save(self.model.state_dict(), folder / "weights.pt")
        (folder / "card.json").write_text("{}")

    def line(self, metrics) -> str:
        return f"epoch {metrics['epoch']}"


def settings(output: Path, config_hash: str = "0" * 64, **changes) -> LoopSettings:
    output.mkdir(exist_ok=True)
    values = {"optimization": BudgetedOptimization(learning_rate=0.1, epochs=EPOCHS), **changes}
    lengths = np.arange(10)
    return LoopSettings(output, config_hash, lengths, lengths, 4, 2, **values)


def train(output: Path, task: Regression | None = None, stop=None, **changes) -> list[dict[str, float]]:
    """What a stage does: the loop, then the best epoch's files in their places."""
    made = EpochLoop(task or Regression(), settings(output, **changes), RUNTIME, stop or StopAfter())
    made.run("10 pairs")
    install_best(output, made.state.best_epoch, NAMES)
    remove_checkpoint(output)
    return made.state.history


def product(output: Path) -> dict[str, torch.Tensor]:
    assert {path.name for path in output.iterdir()} == {*NAMES, "metrics.jsonl"}
    return torch.load(output / "weights.pt", weights_only=True)


def assert_same(output: Path, other: Path) -> None:
    first, second = product(output), product(other)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (output / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A training that nothing interrupted."""
    output = tmp_path_factory.mktemp("loop") / "whole"
    history = train(output)
    assert [metrics["epoch"] for metrics in history] == [1, 2, 3]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    return output


@pytest.mark.parametrize("looks", range(EPOCHS * (STEPS + 1) - 1))
def test_a_training_stopped_at_any_look_ends_as_one_that_was_not(whole, tmp_path, looks, capsys):
    with pytest.raises(Stopped, match="state saved; run the same command again"):
        train(tmp_path / "stopped", stop=StopAfter(looks))
    train(tmp_path / "stopped")
    assert "resumed at step" in capsys.readouterr().out
    assert_same(tmp_path / "stopped", whole)


def test_the_zeros_that_sums_start_from_stay_zeros(tmp_path):
    task = Regression()
    train(tmp_path / "run", task)
    assert not task.no_sums.any()


WRITES = ("save_best", "save_checkpoint", "keep_best", "write_metrics")


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", WRITES)
def test_a_kill_between_any_two_writes_costs_at_most_an_epoch(
    whole, tmp_path, monkeypatch, write, after, epoch
):
    """A line that a reader has seen stays, too: a repeated epoch would have another speed and time."""
    output, calls = tmp_path / "killed", iter(range(99))
    first = epoch + (write in ("keep_best", "write_metrics"))  # these are called at the start as well
    real = getattr(loop, write)

    def killing(*arguments):
        is_last = next(calls) == first
        if is_last and not after:
            raise Killed
        real(*arguments)
        if is_last:
            raise Killed

    scores = {1: 1.0, 2: 2.0, 3: 3.0}
    with monkeypatch.context() as patch:
        patch.setattr(loop, write, killing)
        with pytest.raises(Killed):
            train(output, Regression(scores))
    metrics = output / "metrics.jsonl"
    seen = metrics.read_text() if metrics.exists() else ""
    train(output, Regression(scores))
    assert metrics.read_text().startswith(seen)
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == [1, 2, 3]
    assert all(torch.equal(tensor, product(whole)[name]) for name, tensor in product(output).items())


def test_a_best_epoch_that_no_checkpoint_names_is_forgotten(tmp_path, monkeypatch):
    """Epoch 2 was the best until a kill; trained again, as on a GPU not bit for bit, it is not."""
    output, first = tmp_path / "killed", Regression({1: 1.0, 2: 2.0})

    def killing(output, config_hash, state, *rest):
        if state.epoch == 2:
            raise Killed
        checkpoint.save_checkpoint(output, config_hash, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", killing)
        with pytest.raises(Killed):
            train(output, first)
    assert {path.name for path in output.glob("best-*")} == {"best-1", "best-2"}
    train(output, Regression({2: 0.5, 3: 0.5}))
    after_epoch_1 = first.seen[STEPS]
    found = product(output)
    assert torch.equal(found["1.weight"], after_epoch_1[0])
    assert torch.equal(found["1.bias"], after_epoch_1[1])


@pytest.mark.parametrize("moved", range(len(NAMES)))
def test_a_kill_while_the_best_epoch_moves_to_its_place_is_taken_up(whole, tmp_path, monkeypatch, moved):
    output, counts, replace = tmp_path / "killed", iter(range(9)), os.replace

    def killing(source, target):
        if Path(source).parent.name.startswith("best-") and next(counts) == moved:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killing)
        with pytest.raises(Killed):
            train(output)
    train(output)
    assert_same(output, whole)


def test_a_best_epoch_that_was_removed_by_hand_is_one_clear_line(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", Regression({1: 1.0}), stop=StopAfter(STEPS + 1))
    for path in (tmp_path / "stopped/best-1").iterdir():
        path.unlink()
    with pytest.raises(ArtifactError, match=r"best-1/weights\.pt: missing, but the checkpoint names it"):
        train(tmp_path / "stopped", Regression({1: 1.0}))


def test_a_checkpoint_of_another_config_or_damaged_is_one_clear_line(tmp_path):
    output = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(output, stop=StopAfter(1))
    with pytest.raises(ArtifactError, match="unfinished training of another config"):
        train(output, config_hash="1" * 64)
    path = output / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "progress": {"unheard": 1}}, path)
    with pytest.raises(ArtifactError, match="written by another version of kdecs"):
        train(output)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ArtifactError, match=r"checkpoint\.pt: not a readable checkpoint"):
        train(output)
    mark = tmp_path / "ran"
    for value in (state | {"sums": Bomb(mark)}, Bomb(mark)):
        torch.save(value, path)
        with pytest.raises(ArtifactError, match=r"checkpoint\.pt: not a readable checkpoint"):
            train(output)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ArtifactError, match=r"checkpoint\.pt: not a readable checkpoint"):
        train(output)
    assert not mark.exists()


def test_a_changed_checkpoint_is_refused(tmp_path):
    """torch reads a file with flipped bytes without a word."""
    output = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(output, Regression({1: 1.0}), stop=StopAfter(STEPS + 2))
    path = output / "checkpoint.pt"
    weights = torch.load(path, weights_only=True)["model"]["1.weight"].numpy().tobytes()
    before = path.read_bytes()
    flip_bit(path, before.index(weights))
    with pytest.raises(
        ArtifactError, match=r"checkpoint\.pt: sha256 of its values .* expected .* is damaged; remove"
    ):
        train(output)
    values = torch.load(path, weights_only=True)
    for changed in (
        {"progress": values["progress"] | {"best_macro_f1": 0.5}},
        {"optimizer": values["optimizer"] | {"param_groups": values["optimizer"]["param_groups"][::-1]}},
        {"model": dict(reversed(values["model"].items()))},
    ):
        torch.save(values | changed, path)
        with pytest.raises(ArtifactError, match="sha256 of its values"):
            train(output)
    path.write_bytes(before)
    train(output, Regression({1: 1.0}))


def test_a_changed_file_of_the_best_epoch_is_not_installed(tmp_path, monkeypatch):
    output = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(output, Regression({1: 1.0}), stop=StopAfter(STEPS + 2))
    for name in NAMES:
        path = output / "best-1" / name
        before = flip_bit(path)
        with pytest.raises(
            ArtifactError, match=f"best-1/{name}: sha256 .* is damaged; remove {output} to start"
        ):
            train(output, Regression({1: 1.0}))
        path.write_bytes(before)

    def flip_at_the_end(task, metrics):
        if metrics["epoch"] == EPOCHS:
            flip_bit(output / "best-1" / "weights.pt")
        return "epoch"

    with monkeypatch.context() as patch:
        patch.setattr(Regression, "line", flip_at_the_end)
        with pytest.raises(ArtifactError, match=r"best-1/weights\.pt: sha256"):
            train(output, Regression({1: 1.0}))
    assert not (output / "weights.pt").exists()
    # Installed by a start that was killed before it removed the checkpoint, and changed after that.
    flip_bit(output / "best-1" / "weights.pt")
    install_best(output, 1, NAMES)
    flip_bit(output / "weights.pt")
    with pytest.raises(ArtifactError, match=r"stopped/weights\.pt: sha256"):
        train(output, Regression({1: 1.0}))


def test_a_file_that_somebody_adds_to_the_best_epoch_is_not_installed(tmp_path):
    with_folder = Regression({1: 1.0})
    with_folder.save = lambda folder: (folder / "model").mkdir() or (folder / "model/weights").write_text("1")
    output = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(output, with_folder, stop=StopAfter(STEPS + 2))
    (output / "best-1/model/evil.py").write_text("")
    with pytest.raises(ArtifactError, match=r"best-1/model/evil\.py: the checkpoint does not name this file"):
        train(output, with_folder)


def test_epochs_that_only_the_checkpoint_holds_are_restored(tmp_path, monkeypatch):
    output = tmp_path / "killed"
    monkeypatch.setattr(
        loop, "write_metrics", lambda output, history: checkpoint.write_metrics(output, history[:-1])
    )
    with pytest.raises(Stopped):
        train(output, stop=StopAfter(2 * STEPS + 2))
    metrics = output / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 1
    restore_metrics(output, "1" * 64)
    assert len(metrics.read_text().splitlines()) == 1, "a checkpoint of another config is left alone"
    restore_metrics(output, "0" * 64)
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == [1, 2]
    (output / "checkpoint.pt").write_bytes(b"no checkpoint")
    restore_metrics(output, "0" * 64)


@pytest.mark.parametrize(("check_every", "near"), [(1, 2), (20, 3)])
def test_a_step_that_is_not_finite_is_not_taken_nor_any_after_it(tmp_path, check_every, near):
    """On several ranks and on GPUs losses are looked at every 20 steps only, and at the end of an epoch."""
    task = Regression()
    task.poisoned_step = 2
    made = EpochLoop(task, settings(tmp_path / "poisoned"), RUNTIME, StopAfter())
    made.steps.check_every = check_every
    with pytest.raises(
        TrainingError, match=rf"not finite near step {near}; lower optimization\.learning_rate"
    ):
        made.run("10 pairs")
    after_step_1 = task.seen[1]
    assert not torch.equal(after_step_1[0], task.seen[0][0])
    for found, expected in zip(task.model.parameters(), after_step_1, strict=True):
        assert torch.equal(found, expected)
    assert {path.name for path in made.settings.output.iterdir()} == {"metrics.jsonl"}, "nothing was saved"


def test_patience_counts_epochs_since_the_best(tmp_path):
    assert len(train(tmp_path / "a", Regression({1: 1.0, 2: 1.0, 3: 9.0}), patience_epochs=1)) == 2
    assert len(train(tmp_path / "b", Regression({1: 1.0, 2: 1.0, 3: 9.0}), patience_epochs=2)) == 3


def lengths(num_rows: int = 500) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 400, size=num_rows)


def test_an_epoch_holds_every_row_once_in_batches_of_like_length():
    rows = np.arange(3, 500)
    num_tokens = lengths()
    batches = epoch_batches(num_tokens, rows, batch_size=16, bucket_batches=10, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == rows.tolist()
    assert sorted(map(len, batches))[1:] == [16] * (len(batches) - 1)
    padded = sum(len(batch) * num_tokens[batch].max() for batch in batches)
    assert padded < 1.25 * num_tokens[rows].sum()


def test_batches_depend_on_seed_and_epoch_alone():
    def batches(seed: int, epoch: int) -> list[list[int]]:
        made = epoch_batches(
            lengths(), np.arange(500), batch_size=16, bucket_batches=5, seed=seed, epoch=epoch
        )
        return [batch.tolist() for batch in made]

    assert batches(0, 3) == batches(0, 3)
    assert batches(0, 3) != batches(0, 4)
    assert batches(0, 3) != batches(1, 3)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_of_ranks_cover_the_batch_once_and_are_of_one_size(num_rows: int, world_size: int):
    rows = np.arange(100, 100 + num_rows)
    shares = [rank_share(rows, rank, world_size) for rank in range(world_size)]
    counted = np.concatenate([share[weights > 0] for share, weights in shares])
    assert sorted(counted) == rows.tolist()
    assert len({len(share) for share, _ in shares}) == 1
    assert all(len(share) == len(weights) for share, weights in shares)


@pytest.mark.parametrize(("num_groups", "batch_size"), [(1, 16), (3, 1), (40, 16), (700, 16), (700, 3)])
def test_batches_of_groups_hold_each_group_once_and_about_equally_many_rows(num_groups, batch_size):
    generator = np.random.default_rng(num_groups)
    sizes = generator.integers(1, 12, size=num_groups)
    num_batches = min(-(-int(sizes.sum()) // batch_size), num_groups)
    batches = grouped_batches(sizes, num_batches=num_batches, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_groups))
    assert len(batches) == num_batches and all(len(batch) for batch in batches)
    if batch_size == 16:
        rows = np.array([sizes[batch].sum() for batch in batches])
        assert (abs(rows - sizes.sum() / num_batches) <= sizes.max()).all()
    if num_groups > 100 and batch_size > 3:
        spread = np.mean([np.ptp(sizes[batch]) for batch in batches])
        assert spread > 0.3 * np.ptp(sizes), (
            "a batch mixes small groups, which have labels of another kind, with large"
        )
        others = grouped_batches(sizes, num_batches=num_batches, seed=1, epoch=1)
        assert not all(np.array_equal(a, b) for a, b in zip(batches, others, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_of_groups_are_whole_and_a_rank_without_any_reaches_the_collectives(world_size):
    groups = [np.arange(start, start + size) for start, size in ((0, 5), (5, 1), (6, 7), (13, 2))]
    shares = [group_share(groups, rank, world_size) for rank in range(world_size)]
    counted = [
        int(row) for rows, weights in shares for row, weight in zip(rows, weights, strict=True) if weight
    ]
    assert sorted(counted) == list(range(15))
    assert all(len(rows) for rows, _ in shares)
    for group in groups:
        assert (
            sum(bool(set(group.tolist()) & set(rows[weights > 0].tolist())) for rows, weights in shares) == 1
        )
    if world_size <= 3:
        assert max(len(rows) for rows, _ in shares) <= 15 / world_size + 4


def budget(steps: int, every: int | None = None) -> dict[str, BudgetedOptimization]:
    return {
        "optimization": BudgetedOptimization(
            learning_rate=0.1, epochs=None, steps=steps, validate_every_steps=every
        )
    }


def test_steps_of_whole_passes_are_the_same_training(tmp_path, whole):
    """As many steps as three epochs, with a validation after each pass."""
    train(tmp_path / "steps", **budget(EPOCHS * STEPS, STEPS))
    assert_same(whole, tmp_path / "steps")


def test_a_budget_of_steps_validates_amid_passes_and_ends_at_the_last_step(tmp_path):
    """Eight steps with a validation every three: 3, 3, 2 steps over passes of three batches, without a gap."""
    made = settings(tmp_path / "plain", **budget(8, 4))
    batches = [[rows.tolist() for rows in batch] for epoch in range(2) for batch in made.epoch_batches(epoch)]
    passes = settings(tmp_path / "plain")
    expected = [
        [rows.tolist() for rows in batch] for epoch in range(3) for batch in passes.epoch_batches(epoch)
    ]
    assert batches == expected[:8] and [len(made.epoch_batches(epoch)) for epoch in range(2)] == [4, 4]
    history = train(tmp_path / "whole", **budget(8, 3))
    assert [metrics["epoch"] for metrics in history] == [1, 2, 3]
    # Stopped amid and after epochs, and resumed: the same weights and lines.
    for looks in (0, 3, 4, 8):
        output = tmp_path / f"stopped{looks}"
        with pytest.raises(Stopped):
            train(output, stop=StopAfter(looks), **budget(8, 3))
        train(output, **budget(8, 3))
        assert_same(tmp_path / "whole", output)
    # By default there are ten validations; fewer steps have one each.
    assert [BudgetedOptimization(steps=n).num_epochs for n in (3, 10, 95, 1000)] == [3, 10, 10, 10]
    assert settings(tmp_path / "plain", **budget(1000)).epoch_steps == 100


def test_patience_counts_the_validations_of_a_budget_of_steps(tmp_path):
    task = Regression({1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2, 5: 0.95})
    history = train(tmp_path / "out", task, patience_epochs=2, **budget(40, 2))
    assert len(history) == 4 and len(task.seen) == 8


def test_learning_rate_rises_then_falls_to_zero():
    optimization = Optimization(learning_rate=1.0, warmup_share=0.2)
    rates = [learning_rate_at(step, 10, optimization) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == pytest.approx([(10 - step) / 8 for step in range(2, 11)])
    assert learning_rate_at(0, 10, Optimization(learning_rate=1.0, warmup_share=0.0)) == 1.0
    constant = Optimization(learning_rate=1.0, warmup_share=0.2, schedule="constant")
    assert [learning_rate_at(step, 10, constant) for step in range(10)] == [0.5, *[1.0] * 9]


def test_dropout_seeds_differ_by_step_and_rank():
    seeds = {step_seed(0, step, rank) for step in range(20) for rank in range(4)}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_heads_have_a_rate_of_their_own_and_vectors_no_decay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = adamw(
        model,
        Optimization(learning_rate=1.0, weight_decay=0.1),
        heads=[model[1]],
        head_rate_factor=3.0,
    )
    found = {
        id(parameter): (group["rate_factor"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = [(1.0, 0.1), (1.0, 0.0), (3.0, 0.1), (3.0, 0.0)]
    assert [found[id(parameter)] for parameter in model.parameters()] == expected


def test_a_finished_training_keeps_nothing_of_a_checkpoint_that_a_kill_cut_short(tmp_path):
    leave_temporary(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes(b"whole")
    (tmp_path / ".notes.tmp").touch()
    remove_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".notes.tmp"]
