"""`launch/train_teacher.py` for real: gloo ranks under the deepspeed launcher, every ZeRO stage, other world sizes."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import ROOT, child_environment, flip_bit, free_port, run_forked_ranks
from transformers import AutoModelForCausalLM

from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import ArtifactError
from kdecs.runtime import Runtime, seed_everything
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.data import TeacherData, prepare_data, share_among_ranks
from kdecs.teacher.families import Family, make_family
from kdecs.teacher.network import TeacherNetwork, add_lora, connective_loss, trainable_parameters
from kdecs.teacher.scoring import TeacherScorer
from kdecs.training.loop import learning_rate_at

LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--no_local_rank"]
LAUNCHER += ["--master_port", str(free_port())]
MANY = "tests/teacher/many_starts.py"
TRAIN = "launch/train_teacher.py"


def config_values(base: Path, output: Path, family: str = "causal", stage: int = 2) -> dict:
    """About 24 steps over the sample's validation split, one validation at the end."""
    return {
        "name": "test",
        "output": str(output),
        "corpus": {"train": str(bundled_sample("valid")), "valid": str(bundled_sample("valid"))},
        "model": {"family": family, "base": str(base)},
        "lora": {"rank": 4},
        "zero": {"stage": stage, "dtype": "float32"},
        "batches": {"global_batch_pairs": 11, "micro_batch_tokens": 256, "max_prompt_tokens": 400},
        "optimization": {"learning_rate": 0.001, "epochs": 1},
        "log_every_steps": 1,
        "threads_per_rank": 1,
    }


def write_values(values: dict, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{Path(values['output']).name}-{values['zero']['stage']}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_launched(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*LAUNCHER, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env=child_environment(**environment),
    )


def run(values: dict, directory: Path, num_ranks: int = 1) -> subprocess.CompletedProcess:
    return run_forked_ranks(TRAIN, "--config", write_values(values, directory), num_ranks=num_ranks)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def product(output: Path) -> dict[str, torch.Tensor]:
    """Weights of a finished teacher, named as its network names them."""
    if (output / "model").is_dir():
        return load_file(output / "model" / "model.safetensors")
    return load_file(output / "adapter_model.safetensors")


def plan_of(values: dict) -> tuple[TeacherConfig, Family, TeacherData]:
    config = parse_config(TeacherConfig, values, source="test")
    family = make_family(
        config.model, max_prompt_tokens=config.batches.max_prompt_tokens, emotions_shown="coarse"
    )
    use_tree = config.batches.batching != "pairs" and family.can_share_prefixes
    return config, family, prepare_data(config, family, use_tree=use_tree, world_size=1, show_progress=False)


def plain_torch(values: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The oracle: the same steps in one process, without DeepSpeed, prompt by prompt: losses and last weights."""
    config, family, data = plan_of(values)
    seed_everything(config.optimization.seed)
    base = family.load_network(config.model.base, dtype=torch.float32)
    tuned = add_lora(base, config.lora, family.lora_task) if config.lora else base
    network = TeacherNetwork(family, tuned, use_tree=False, device=torch.device("cpu"))
    parameters = trainable_parameters(network)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    series = []
    for step, batch in enumerate(data.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, len(data.steps), config.optimization)
        indices = [n for unit in batch for n in unit.pairs]
        gold_P = torch.tensor([data.train.pairs[n].is_cause for n in indices])
        logits_PA = network([data.train.prompts[n] for n in indices])
        loss = connective_loss(logits_PA, gold_P)
        places = [(unit.pairs, data.train.pairs[n].target) for unit in batch for n in unit.pairs]
        for _, group in groupby(range(len(indices)), key=places.__getitem__):
            rows = list(group)
            chances_PA = logits_PA[rows].softmax(-1)
            odds_P = chances_PA[:, :4].sum(-1) / chances_PA[:, 4]
            if config.target_loss_weight and gold_P[rows].any():
                loss = loss - config.target_loss_weight * (odds_P / odds_P.sum()).log()[gold_P[rows]].mean()
        loss = loss / len(indices)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        series.append(float(loss.detach()))
    trained = {name: p.detach() for name, p in tuned.named_parameters() if p.requires_grad}
    return series, {name.replace(".default", ""): tensor for name, tensor in trained.items()}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all weights, as a share of theirs."""
    assert set(ours) == set(theirs)
    difference = sum(float((ours[name] - theirs[name]).norm() ** 2) for name in ours) ** 0.5
    return difference / sum(float(tensor.norm() ** 2) for tensor in theirs.values()) ** 0.5


def base_with_one_bad_token(values: dict, directory: Path) -> tuple[Path, int]:
    """A base whose embedding of one token is infinite, and the first step whose batch holds it, on one rank alone."""
    _, _, data = plan_of({**values, "batches": {**values["batches"], "batching": "pairs"}})
    for number, batch in enumerate(data.steps[2:], start=2):
        seen = {t for early in data.steps[:number] for t in tokens_of(early, data)}
        shares = share_among_ranks(
            batch, world_size=2, micro_batch_tokens=values["batches"]["micro_batch_tokens"], padded=True
        )
        first, second = (
            {t for micro in share for n in micro.pairs for t in data.train.prompts[n].tokens.tolist()}
            for share in shares
        )
        if lonely := (first ^ second) - seen:
            break
    base = directory / "bad-base"
    shutil.copytree(values["model"]["base"], base)
    (base / "manifest.json").unlink()
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][min(lonely)] = torch.inf
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base, number + 1


def tokens_of(batch: list, data: TeacherData) -> set[int]:
    return {t for unit in batch for n in unit.pairs for t in data.train.prompts[n].tokens.tolist()}


@dataclass
class Launched:
    """What three starts wrote: two ranks under the launcher, one forked rank, two forked ranks."""

    directory: Path
    values: dict[str, dict]
    stdout: list[str]
    bad_step: int

    def output(self, name: str) -> Path:
        return self.directory / name


CHANGES = {
    "stage-0": {"zero.stage": 0},
    "stage-1": {"zero.stage": 1},
    "stage-2": {
        "zero.stage": 2,
        "corpus.train": str(bundled_sample("valid")),
    },  # the one that gets a signal below
    "stage-3": {"zero.stage": 3},
    "stage-2-checkpointing": {"zero.activation_checkpointing": True},
    "stage-1-offload": {"zero.stage": 1, "zero.offload_optimizer": True},
    "stage-2-offload": {"zero.stage": 2, "zero.offload_optimizer": True},
    "stage-3-offload": {"zero.stage": 3, "zero.offload_optimizer": True, "zero.offload_parameters": True},
    "full-1": {"zero.stage": 1, "lora": None},
    "full-3": {"zero.stage": 3, "lora": None},
    "masked-3": {"zero.stage": 3, "model.family": "masked"},
    "seq2seq-1": {"zero.stage": 1, "model.family": "seq2seq"},
    "hints-and-targets": {"zero.stage": 2, "gold_hint_share": 0.3, "target_loss_weight": 0.8},
}
WORLDS = {  # start: stage and steps under 2 ranks, then 1 rank, then 2 ranks to the end
    "worlds-2": ({"zero.stage": 2}, [(2, 4), (2, 8), (2, None)]),
    "worlds-full-3": ({"zero.stage": 3, "lora": None}, [(3, 4), (3, 8), (3, None)]),
    "worlds-and-stages": ({}, [(1, 4), (0, 8), (3, None)]),
}
HALF = {"zero.stage": 3, "zero.dtype": "bfloat16", "zero.activation_checkpointing": True}
"""As llama-13b.yaml trains: straight to the end, and stopped once on the way."""


def changed(values: dict, changes: dict, bases: Callable[[str], Path]) -> dict:
    values = json.loads(json.dumps(values))
    for key, value in changes.items():
        *parents, last = key.split(".")
        group = values
        for parent in parents:
            group = group[parent]
        group[last] = value
    values["model"]["base"] = str(bases(values["model"]["family"]))
    return values


@pytest.fixture(scope="module")
def launched(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """All runs of this module that end by themselves, in three starts."""
    directory = tmp_path_factory.mktemp("launched")
    default = config_values(bases("causal"), directory / "x")
    # Half of the sample's split gives a dozen steps, which say as much and take half of the time.
    dialogues = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    short = directory / "short.json"
    short.write_text(json.dumps(dict(list(dialogues.items())[: len(dialogues) // 2])))
    default["corpus"] = {"train": str(short), "valid": str(short)}
    every = CHANGES | {name: changes for name, (changes, _) in WORLDS.items()}
    every |= {"half": HALF, "half-stopped": HALF}
    values = {
        name: changed({**default, "output": str(directory / name)}, changes, bases)
        for name, changes in every.items()
    }
    bad_base, bad_step = base_with_one_bad_token(default, directory)
    bad = changed({**default, "output": str(directory / "bad")}, {"batches.batching": "pairs"}, bases)
    bad["model"]["base"] = str(bad_base)
    bad["checkpoint_every_steps"] = 1
    starts: list[list[str]] = [[str(write_values(values[name], directory / "yaml")) for name in CHANGES]]
    starts[0].append(str(write_values(bad, directory / "yaml")))
    half, stopped = (str(write_values(values[name], directory / "yaml")) for name in ("half", "half-stopped"))
    starts[0] += [half, f"{stopped}@4"]
    starts += [[], [stopped]]
    for name, (_, parts) in WORLDS.items():
        for number, (stage, steps) in enumerate(parts):
            part = {**values[name], "zero": {**values[name]["zero"], "stage": stage}}
            path = write_values(part, directory / f"yaml-{number}")
            starts[number].append(str(path) + (f"@{steps}" if steps else ""))
    stdout = []
    for number, arguments in enumerate(starts):
        if number:
            done = run_forked_ranks(MANY, *arguments, num_ranks=number)
        else:
            done = run_launched(MANY, *arguments, TORCH_EXTENSIONS_DIR=str(directory / "extensions"))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        stdout.append(done.stdout)
    return Launched(directory, values, stdout, bad_step)


@pytest.fixture(scope="module")
def oracle(launched: Launched) -> Callable[[str], tuple[list[float], dict[str, torch.Tensor]]]:
    """Plain torch's losses and weights for a run; runs that differ only in DeepSpeed's settings share one."""
    known: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = {}

    def of(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        values = launched.values[name]
        key = json.dumps([value for name, value in values.items() if name not in ("output", "zero")])
        if key not in known:
            known[key] = plain_torch(values)
        return known[key]

    return of


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", CHANGES)
def test_two_ranks_equal_one_plain_torch_process(
    name: str, launched: Launched, oracle: Callable[[str], tuple[list[float], dict[str, torch.Tensor]]]
) -> None:
    series, weights = oracle(name)
    ours = losses(launched.output(name))
    assert len(ours) >= 10
    error = float(np.max(np.abs(np.array(ours) / np.array(series) - 1)))
    apart = distance(product(launched.output(name)), weights)
    print(f"equality {name}: {len(ours)} steps, losses {error:.1e}, weights {apart:.1e}")
    assert error < 1e-5
    assert apart < 1e-3


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", WORLDS)
def test_other_ranks_and_stages_on_the_way_change_rounding_only(
    name: str, launched: Launched, oracle: Callable[[str], tuple[list[float], dict[str, torch.Tensor]]]
) -> None:
    for number in (1, 2):
        assert launched.stdout[number].count("resumed at step") == len(WORLDS) + (
            number == 2
        )  # and half-stopped
    straight = launched.output("full-3" if launched.values[name]["lora"] is None else "stage-1")
    ours = np.array(losses(launched.output(name)))
    error = float(np.max(np.abs(ours / np.array(losses(straight)) - 1)))
    apart = distance(product(launched.output(name)), product(straight))
    print(f"worlds {name}: losses {error:.1e}, weights {apart:.1e}")
    assert error < 1e-5
    assert apart < 1e-3
    assert distance(product(launched.output(name)), oracle(name)[1]) < 1e-3


@pytest.mark.slow
@pytest.mark.dist
def test_stage_3_leaves_no_rank_a_whole_parameter(launched: Launched) -> None:
    held = re.findall(r"HOLDS (\S+) stage (\d): (\d+) parameters$", launched.stdout[0], re.MULTILINE)
    partitioned = [int(number) for _, stage, number in held if stage == "3"]
    stages = [changes.get("zero.stage") for changes in CHANGES.values()]
    stages += [parts[0][0] for _, parts in WORLDS.values()] + [HALF["zero.stage"]] * 2
    assert len(partitioned) == 2 * stages.count(3)
    assert set(partitioned) == {0}
    assert all(int(number) > 10_000 for _, stage, number in held if stage != "3")


@pytest.mark.slow
@pytest.mark.dist
def test_bfloat16_under_stage_3_with_checkpointing_runs_and_resumes(launched: Launched) -> None:
    half, whole = (np.array(losses(launched.output(name))) for name in ("half", "stage-3"))
    error = float(np.max(np.abs(half / whole - 1)))
    print(f"bfloat16: losses {error:.1e}")
    assert 0 < error < 2e-2
    assert losses(launched.output("half-stopped")) == half.tolist()
    straight, resumed = (product(launched.output(name)) for name in ("half", "half-stopped"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert any(bool(tensor.any()) for name, tensor in straight.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.dist
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_step(launched: Launched) -> None:
    for rank in (0, 1):
        expected = (
            rf"RANK {rank} TrainingError: loss (nan|inf) at step {launched.bad_step}: training stopped before"
        )
        assert re.search(expected, launched.stdout[0], re.MULTILINE), launched.stdout[0][-3000:]
    output = launched.output("bad")
    assert len(losses(output)) == launched.bad_step - 1
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{launched.bad_step - 1}"]
    assert not (output / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_a_fully_tuned_model_opens_in_transformers_and_scores_the_same(
    launched: Launched, runtime: Runtime, some_pairs: list
) -> None:
    output = launched.output("full-3")
    scorer = TeacherScorer.load(output, runtime=runtime, dtype="float32", micro_batch_tokens=512)
    logits, _ = scorer.score(some_pairs[:4])
    network = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    before = AutoModelForCausalLM.from_pretrained(launched.values["full-3"]["model"]["base"]).state_dict()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    check_logits(logits, network, scorer.network.family, some_pairs[:4])


def check_logits(logits: np.ndarray, network: torch.nn.Module, family: Family, pairs: list) -> None:
    for row, pair in zip(logits, pairs, strict=True):
        ids = torch.from_numpy(family.encode(pair).tokens.astype(np.int64))[None]
        with torch.no_grad():
            expected_V = network(input_ids=ids).logits[0, -1]
        np.testing.assert_allclose(row, expected_V[family.answer_ids].numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def trained(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """A teacher trained by plain python in one process."""
    directory = tmp_path_factory.mktemp("teacher")
    shutil.copytree(bases("causal"), directory / "base")  # the tests below damage it
    values = config_values(directory / "base", directory / "out")
    done = run(values, directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return values, directory


@pytest.mark.slow
def test_product_opens_in_plain_peft_with_the_same_logits(
    trained: tuple[dict, Path], runtime: Runtime, some_pairs: list
) -> None:
    values, directory = trained
    scorer = TeacherScorer.load(directory / "out", runtime=runtime, dtype="float32", micro_batch_tokens=512)
    logits, log_rest = scorer.score(some_pairs[:4])
    family = scorer.network.family
    network = PeftModel.from_pretrained(
        family.load_network(values["model"]["base"], dtype=torch.float32), directory / "out"
    )
    check_logits(logits, network.eval(), family, some_pairs[:4])
    assert np.isfinite(log_rest).all()
    assert (log_rest <= 0).all()
    moved = [tensor for name, tensor in product(directory / "out").items() if "lora_B" in name]
    assert moved
    assert all(bool(tensor.any()) for tensor in moved)


@pytest.mark.slow
def test_second_start_skips_and_another_config_is_refused(trained: tuple[dict, Path]) -> None:
    values, directory = trained
    again = run(values, directory)
    assert again.returncode == 0
    assert "complete" in again.stdout
    assert "skipped" in again.stdout
    other = run({**values, "emotions_shown": "fine"}, directory)
    assert other.returncode == 1
    assert other.stderr.strip().splitlines()[-1].startswith("kdecs: error: ")
    assert "holds a finished teacher directory of another config" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_a_changed_base_is_refused(trained: tuple[dict, Path], runtime: Runtime) -> None:
    values, directory = trained
    manifest = Path(values["model"]["base"]) / "manifest.json"
    assert manifest.is_file()
    text = manifest.read_text()
    manifest.write_text(text.replace('"final_loss"', '"final_los"'))
    try:
        with pytest.raises(ArtifactError, match="was trained on a base with checksum"):
            TeacherScorer.load(directory / "out", runtime=runtime, dtype="float32", micro_batch_tokens=512)
    finally:
        manifest.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("of_base", [False, True])
def test_damaged_weights_are_refused(trained: tuple[dict, Path], runtime: Runtime, of_base: bool) -> None:
    values, directory = trained
    folder = Path(values["model"]["base"]) if of_base else directory / "out"
    weights = next(folder.glob("*.safetensors"))
    data = flip_bit(weights, -5)
    try:
        with pytest.raises(ArtifactError, match=rf"{weights.name}: sha256"):
            TeacherScorer.load(directory / "out", runtime=runtime, dtype="float32", micro_batch_tokens=512)
    finally:
        weights.write_bytes(data)


@pytest.mark.slow
@pytest.mark.dist
def test_nothing_is_compiled_and_no_shared_memory_is_left(launched: Launched) -> None:
    # DeepSpeed itself compiles a helper for minutes, which leaves 66 MiB per rank until the machine restarts.
    assert losses(launched.output("stage-2"))
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{LAUNCHER[-1]}_*"))
    assert not (launched.directory / "extensions").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_sigterm_leaves_a_checkpoint_that_goes_on_to_the_same_adapter(
    launched: Launched, tmp_path: Path
) -> None:
    values = {
        **launched.values["stage-2"],
        "output": str(tmp_path / "stopped"),
        "checkpoint_every_steps": 1000,
    }
    path = write_values(values, tmp_path)
    process = subprocess.Popen(
        [*LAUNCHER, TRAIN, "--config", str(path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=child_environment(),
    )
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    ranks: list[psutil.Process] = []  # found early: looking for them takes longer than some steps
    while not (len(ranks) == 2 and metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        if len(ranks) < 2:
            ranks = ranks_of(process.pid)
        time.sleep(0.005)
    for rank in ranks:  # as Slurm signals a step's processes; the launcher gives back what its ranks do
        rank.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    straight = launched.output("stage-2")
    # No checkpoint was due: the one that is there is of the step at which the signal came.
    (saved,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    state = json.loads((saved / "state.json").read_text())
    assert 3 <= state["progress"]["step"] < len(losses(straight))
    assert saved.name == f"step-{state['progress']['step']}"
    assert len(losses(tmp_path / "stopped")) == state["progress"]["step"]
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    resumed = run(values, tmp_path, num_ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"resumed at step {state['progress']['step']} of" in resumed.stdout + resumed.stderr
    assert losses(tmp_path / "stopped") == losses(straight)
    expected, found = product(straight), product(tmp_path / "stopped")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The ranks below a launcher, without what a rank may fork itself."""
    ranks = {
        child.pid: child for child in psutil.Process(launcher).children(recursive=True) if is_rank(child)
    }
    return [child for child in ranks.values() if parent_of(child) not in ranks]


def parent_of(process: psutil.Process) -> int | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None


def is_rank(process: psutil.Process) -> bool:
    """Whether it is the script itself, not a launcher that names it."""
    command: list[str] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        command = process.cmdline()
    launchers = {LAUNCHER[0], "deepspeed.launcher.launch"}
    return any(part.endswith(TRAIN) for part in command) and not launchers & set(command)
