"""A teacher's training in this process, one rank: checkpoints, crashes between writes, refusals, metrics, MLflow."""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from support import StopAfter, weights
from transformers import LlamaConfig

from kdecs.corpus.pairs import Pair
from kdecs.corpus.prompts import TeacherPrompt, teacher_prompt
from kdecs.errors import ArtifactError, ConfigError, DeviceError, Stopped
from kdecs.process import StopSignal
from kdecs.runtime import Runtime
from kdecs.teacher import checkpoint, engine, training
from kdecs.teacher import families as families_module
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.data import Unit, prepare_data, share_among_ranks
from kdecs.teacher.engine import check_device, deepspeed_config, join_deepspeed, start_engine
from kdecs.teacher.families import Family, language_model
from kdecs.teacher.metering import Meter, MetricsFile, network_flops, peak_flops
from kdecs.teacher.network import TeacherNetwork, check_config, meta_network
from kdecs.teacher.scoring import TeacherScorer
from kdecs.teacher.training import train_teacher
from kdecs.tracking.datasets import corpus_datasets


def train(config: TeacherConfig, runtime: Runtime, steps: int | None = None) -> None:
    train_teacher(config, runtime, StopAfter(steps))


def points(config: TeacherConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept_and_the_product_is_the_best(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None
) -> None:
    config = make_config(keep_last=2, checkpoint_every_steps=1)
    train(config, runtime)
    lines = points(config)
    validations = [line for line in lines if "valid_macro_f1" in line]
    assert len(validations) >= 4
    best = max(validations, key=lambda line: (line["valid_macro_f1"], -line["valid_loss"]))["step"]
    num_steps = lines[-1]["step"]
    folders = {path.name for path in (config.output / "checkpoints").iterdir()}
    # the best of the step before the last may be another one, which goes with its checkpoint
    assert {f"step-{num_steps}", f"step-{num_steps - 1}", f"step-{best}"} <= folders
    assert len(folders) <= 4
    kept = config.output / "checkpoints" / f"step-{best}" / "product"
    assert same(weights(kept), weights(config.output))
    manifest = json.loads((config.output / "manifest.json").read_text())
    assert manifest["details"]["best_step"] == best
    assert not any("checkpoints" in entry["path"] for entry in manifest["files"])
    states = list((config.output / "checkpoints").glob("*/mp_rank_00_model_states.pt"))
    for path in states:
        names = torch.load(path, map_location="cpu", weights_only=False)["module"]
        assert names
        assert all("lora_" in name for name in names)  # no frozen weights


@pytest.mark.slow
def test_a_crash_between_product_and_state_changes_nothing(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make_config("straight")
    train(straight, runtime)
    config = make_config("crashed")
    written = []
    real = checkpoint.write_json

    def crash_at_second(path: Path, value: object) -> None:
        written.append(path)
        if len(written) == 2:
            assert (path.parent / "product").is_dir()  # the new best is there, its state is not
            raise RuntimeError("crash")
        real(path, value)

    monkeypatch.setattr(checkpoint, "write_json", crash_at_second)
    with pytest.raises(RuntimeError, match="crash"):
        train(config, runtime)
    monkeypatch.undo()
    train(config, runtime)
    assert same(weights(config.output), weights(straight.output))
    assert [line["train_loss"] for line in points(config)] == [
        line["train_loss"] for line in points(straight)
    ]


@pytest.mark.slow
def test_a_training_with_hints_resumes_exactly_and_scores_without(
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
    some_pairs: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[bool | None] = []

    def prompt(*place: Any, shown_relation: bool | None, **options: Any) -> TeacherPrompt:
        shown.append(shown_relation)
        return teacher_prompt(*place, shown_relation=shown_relation, **options)

    monkeypatch.setattr(families_module, "teacher_prompt", prompt)
    straight = make_config("straight", gold_hint_share=0.5, optimization__epochs=1)
    train(straight, runtime)
    assert set(shown) == {None, True, False}
    stopped = make_config("stopped", gold_hint_share=0.5, optimization__epochs=1)
    with pytest.raises(Stopped):
        train(stopped, runtime, steps=2)
    train(stopped, runtime)
    assert same(weights(stopped.output), weights(straight.output))
    assert [line["train_loss"] for line in points(stopped)] == [
        line["train_loss"] for line in points(straight)
    ]
    plain = make_config("plain", optimization__epochs=1)
    train(plain, runtime)
    assert points(plain)[0]["train_loss"] != points(straight)[0]["train_loss"]
    # What a teacher is asked after its training has no hint, and its labels the lineage of any other's prompts.
    shown.clear()
    scorers = [
        TeacherScorer.load(config.output, runtime=runtime, dtype="float32", micro_batch_tokens=512)
        for config in (straight, plain)
    ]
    scorers[0].score(some_pairs)
    assert shown == [None] * len(some_pairs)
    assert scorers[0].lineage["prompt_template"] == scorers[1].lineage["prompt_template"]


@pytest.mark.parametrize("family", ["causal", "masked"])
def test_the_loss_of_a_step_has_the_targets_beside_the_pairs(
    family: str,
    make_config: Callable[..., TeacherConfig],
    families: Callable[..., Family],
    runtime: Runtime,
    group: None,
) -> None:
    """A first step's loss, over several micro-batches, against a loop over pairs and targets of prompts one by one."""
    changes: dict[str, Any] = {"optimization__epochs": 1, "validate_per_epoch": 1}
    changes |= {"target_loss_weight": 0.7, "batches__global_batch_pairs": 40}
    changes |= {"batches__micro_batch_tokens": 500}
    if family == "masked":
        changes["model"] = {"family": family, "base": make_config(family=family).model.base, "layout": "tree"}
    config = make_config("with", family, **changes)
    with pytest.raises(Stopped):
        train(config, runtime, steps=1)
    read_by = families(family, max_prompt_tokens=400)
    read_by.layout = "tree" if family == "masked" else "pair"
    data = prepare_data(config, read_by, use_tree=True, world_size=1, show_progress=False)
    assert data.train.num_split_targets == 0
    assert data.accumulation_steps > 1
    base = read_by.load_network(config.model.base, dtype=torch.float32).eval()
    network = TeacherNetwork(read_by, base, use_tree=False, device=runtime.device)
    total, num_pairs, of_target = 0.0, 0, defaultdict(list)
    for n in (n for unit in data.steps[0] for n in unit.pairs):
        pair = data.train.pairs[n]
        with torch.no_grad():
            chances = network([data.train.prompts[n]])[0].double().softmax(-1)
        causal, other = float(chances[:4].sum()), float(chances[4])
        total -= math.log(causal if pair.is_cause else other)
        num_pairs += 1
        of_target[pair.dialogue.id, pair.target].append((causal / other, pair.is_cause))
    num_with = 0
    for candidates in of_target.values():
        every = sum(odds for odds, _ in candidates)
        gold = [odds for odds, is_cause in candidates if is_cause]
        num_with += len(gold) > 0
        total -= 0.7 * sum(math.log(odds / every) for odds in gold) / max(1, len(gold))
    assert 1 < num_with < len(of_target)
    assert points(config)[0]["train_loss"] == pytest.approx(total / num_pairs, rel=1e-4)


@pytest.mark.slow
def test_a_teacher_of_targets_resumes_exactly_and_validates_on_pairs(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None
) -> None:
    straight = make_config("straight", target_loss_weight=1.0, optimization__epochs=1)
    stopped = make_config("stopped", target_loss_weight=1.0, optimization__epochs=1)
    train(straight, runtime)
    with pytest.raises(Stopped):
        train(stopped, runtime, steps=2)
    train(stopped, runtime)
    assert same(weights(stopped.output), weights(straight.output))
    assert [line["train_loss"] for line in points(stopped)] == [
        line["train_loss"] for line in points(straight)
    ]
    details = json.loads((straight.output / "manifest.json").read_text())["details"]
    assert details["split_targets"] >= 0
    # A rate of nearly nothing leaves the network as it was, whose validation loss does not know the weight.
    losses = []
    for weight in (0.0, 1.0):
        still = make_config(
            f"still-{weight}", target_loss_weight=weight, optimization={"epochs": 1, "learning_rate": 1e-12}
        )
        train(still, runtime)
        losses.append({key: points(still)[-1][key] for key in ("train_loss", "valid_loss")})
    assert losses[0]["valid_loss"] == pytest.approx(losses[1]["valid_loss"], rel=1e-5)
    assert losses[0]["train_loss"] < losses[1]["train_loss"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_the_one_before_serves(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None
) -> None:
    config = make_config(keep_last=2, checkpoint_every_steps=1)
    with pytest.raises(Stopped, match=r"stopped at step 4 of \d+"):
        train(config, runtime, steps=4)
    newest = config.output / "checkpoints" / "step-4"
    path = newest / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"mp_rank_00_model_states.pt: \d+ bytes, expected \d+ bytes"):
        train(config, runtime)
    shutil.rmtree(newest)
    train(config, runtime)
    straight = make_config("straight")
    train(straight, runtime)
    assert same(weights(config.output), weights(straight.output))


def write_again(
    engine: Any,
    config: TeacherConfig,
    state: checkpoint.TeacherState,
    work: str,
    runtime: Runtime,
    save_beside: Callable[[Path], object],
) -> None:
    (config.output / "checkpoints" / f"step-{state.step}" / "state.json").unlink()
    checkpoint.save_checkpoint(engine, config, state, work, runtime, save_beside)


STAGES = [
    {"zero__stage": 0},
    {"zero__stage": 2, "zero__offload_optimizer": True},
    {"zero__stage": 3, "zero__offload_optimizer": True, "zero__offload_parameters": True},
    {"zero__stage": 1, "zero__offload_optimizer": True},
    {"zero__stage": 3},
    {"zero__stage": 0},
    {"zero__stage": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_that_went_through_every_stage_is_the_same_to_the_bit(
    dtype: str,
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = make_config("straight", zero__dtype=dtype, optimization__epochs=1)
    train(straight, runtime)
    changing = make_config("changing", zero__dtype=dtype, optimization__epochs=1)
    with pytest.raises(Stopped):
        train(changing, runtime, steps=3)
    for change in STAGES:
        config = make_config("changing", zero__dtype=dtype, optimization__epochs=1, **change)
        # Written again in the new layout, without a step in between.
        monkeypatch.setattr(training, "save_checkpoint", write_again)
        with pytest.raises(Stopped, match="at step 3 of"):
            train(config, runtime, steps=0)
        monkeypatch.undo()
        state = json.loads((config.output / "checkpoints" / "step-3" / "state.json").read_text())
        assert state["layout"]["stage"] == change["zero__stage"]
    train(changing, runtime)
    assert same(weights(changing.output), weights(straight.output))
    assert [line["train_loss"] for line in points(changing)] == [
        line["train_loss"] for line in points(straight)
    ]


@pytest.mark.parametrize("name", ["causal", "seq2seq", "masked"])
def test_a_partitioned_output_embedding_is_gathered_by_its_own_forward_alone(
    name: str,
    make_config: Callable[..., TeacherConfig],
    families: Callable[[str], Family],
    some_pairs: list[Pair],
    runtime: Runtime,
    group: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read outside it, DeepSpeed gathers it at once, and in later steps for the whole forward and backward."""
    partitioned = {"stage": 3, "stage3_param_persistence_threshold": 0}
    monkeypatch.setattr(
        engine,
        "deepspeed_config",
        lambda *a, **k: deepspeed_config(*a, **k) | {"zero_optimization": partitioned},
    )
    config = make_config(
        family=name, zero__stage=3, **({} if name == "causal" else {"batches__batching": "pairs"})
    )
    family = families(name)
    started = start_engine(config, family, runtime, 1)
    with torch.no_grad():
        started([family.encode(pair) for pair in some_pairs[:2]])
    weights_of_head = list(language_model(started.module.network).get_output_embeddings().parameters())
    assert all(parameter.numel() == 0 for parameter in weights_of_head)  # partitioned indeed
    gathered = [p for module in started.module.modules() for p in module._external_params.values()]
    assert not any(p is parameter for p in gathered for parameter in weights_of_head)


def test_joining_deepspeed_compiles_nothing(
    runtime: Runtime, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)
    monkeypatch.setattr(
        OpBuilder, "load", lambda self, verbose=False: pytest.fail(f"{self.name} is compiled")
    )
    join_deepspeed(runtime)
    assert deepspeed.comm.is_initialized()


def test_a_step_takes_as_many_micro_batches_as_its_own_batch_fills(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(batches__micro_batch_tokens=200, optimization__epochs=1, validate_per_epoch=1)
    forwards: list[int] = []
    expected: list[int] = []
    real_loss, real_step = training.connective_loss, training.TeacherTraining.step

    def loss(logits_PA: torch.Tensor, is_cause_P: torch.Tensor, gold: str) -> torch.Tensor:
        forwards.extend([1] * logits_PA.requires_grad)  # not those of a validation
        return real_loss(logits_PA, is_cause_P, gold)

    def step(run: training.TeacherTraining, batch: list[Unit]) -> tuple[float, float]:
        (share,) = share_among_ranks(batch, world_size=1, micro_batch_tokens=200, padded=run.data.padded)
        expected.append(len(share))
        return real_step(run, batch)

    monkeypatch.setattr(training, "connective_loss", loss)
    monkeypatch.setattr(training.TeacherTraining, "step", step)
    train(config, runtime)
    assert len(set(expected)) > 1
    assert len(forwards) == sum(expected) < len(expected) * max(expected)


def test_what_a_cpu_cannot_do_is_one_line(
    make_config: Callable[..., TeacherConfig], runtime: Runtime
) -> None:
    with pytest.raises(DeviceError, match="float16 needs a GPU"):
        check_device(make_config(zero__dtype="float16"), runtime.device)
    with pytest.raises(DeviceError, match="load_in_4bit needs a GPU"):
        check_device(make_config(model__load_in_4bit=True), runtime.device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None, "model__load_in_4bit": True}, "full tuning trains it"),
        ({"zero__stage": 3, "model__load_in_4bit": True}, "cannot be partitioned"),
        ({"zero__stage": 2, "zero__offload_parameters": True}, "offload_parameters needs stage 3"),
        ({"target_loss_weight": 1, "batches__batching": "pairs"}, "set batches.batching=tree"),
        ({"target_loss_weight": 1, "family": "masked"}, "set model.layout=tree"),
        ({"target_loss_weight": 1, "family": "seq2seq"}, "the family seq2seq do not have; set it to 0"),
        ({"zero__stage": 0, "zero__offload_optimizer": True}, "offload_optimizer needs stage 1, 2 or 3"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    changes: dict[str, Any], message: str, make_config: Callable[..., TeacherConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


@pytest.mark.parametrize(("family", "positions"), [("causal", 512), ("masked", 512)])
def test_prompts_longer_than_the_model_has_positions_are_refused(
    family: str, positions: int, families: Callable[..., Any], bases: Callable[[str], Path]
) -> None:
    base = str(bases(family))
    check_config(base, family, families(family, max_prompt_tokens=positions).max_prompt_tokens)
    with pytest.raises(
        ConfigError, match=f"{positions} positions; set batches.max_prompt_tokens={positions}"
    ):
        check_config(base, family, positions + 1)


def test_cut_prompts_are_counted(families: Callable[..., Any], some_pairs: list) -> None:
    lengths = [len(families("causal").encode(pair).tokens) for pair in some_pairs]
    limit = sorted(lengths)[len(lengths) // 2]
    short = families("causal", max_prompt_tokens=limit)
    cuts = [short.encode(pair).cut for pair in some_pairs]
    for pair, cut, length in zip(some_pairs, cuts, lengths, strict=True):
        assert (cut == "nothing") == (length <= limit)
        if cut == "history":
            assert len(short.encode(pair).tokens) == limit
    assert "history" in cuts
    tiny = families("causal", max_prompt_tokens=30)
    assert {tiny.encode(pair).cut for pair in some_pairs[-3:]} == {"text"}


def test_a_second_training_in_one_directory_is_refused(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    monkeypatch.setattr(training, "LOCK_WAIT_S", 0.0)
    with (
        training.lock_output(config.output, runtime),
        pytest.raises(ArtifactError, match="another training is at work"),
    ):
        train_teacher(config, runtime, StopSignal())


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in range(1, 6):
        metrics.add({"step": step, "epoch": step / 5, "time": 1.0, "train_loss": 0.5})
    with metrics.path.open("a") as file:
        file.write('{"step": 6, "tra')  # killed while it wrote
    metrics.cut_back(3)
    metrics.add({"step": 4, "epoch": 0.8, "time": 2.0, "train_loss": 0.25})
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["train_loss"] == 0.25


def test_mfu_counts_the_operations_of_the_tree(
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    families: Callable[..., Any],
    some_pairs: list,
) -> None:
    from kdecs.teacher.data import PromptSet
    from kdecs.teacher.network import add_lora
    from kdecs.teacher.tree.prefix_tree import pack

    config = make_config(device_peak_tflops=0.002)
    family = families("causal")
    network = add_lora(family.load_network(config.model.base, dtype=torch.float32), config.lora, "CAUSAL_LM")
    prompts = [family.encode(pair) for pair in some_pairs[:6]]
    tree = pack([prompt.tokens for prompt in prompts])
    unit = Unit(tuple(range(6)), tree.num_tokens, max(len(p.tokens) for p in prompts))
    meter = Meter(config, network, PromptSet(some_pairs[:6], prompts, [unit]), runtime)
    meter.add([unit], 0.5)
    line = meter.line()
    ancestors = sum(
        sum(1 for k in range(q + 1) if q < tree.ends_N[k]) for q in range(tree.num_tokens)
    )  # the slow count: who may look at whom
    llama = LlamaConfig.from_pretrained(config.model.base)
    costs = network_flops(meta_network(llama, config.lora), checkpointing=False)
    flops = costs.of(tokens=tree.num_tokens, attended_pairs=ancestors, answers=6).total
    assert line["mfu"] == pytest.approx(flops / (0.5 * 0.002e12))
    assert line["pairs_per_second"] == pytest.approx(12.0)
    assert line["tokens_per_second"] == pytest.approx(2 * tree.num_tokens)
    assert line["memory_peak_gib"] > 0.05
    assert meter.line()["pairs_per_second"] == 0.0
    assert peak_flops(make_config(), runtime.device) is None


def test_mfu_counts_all_of_an_encoders_prompt(
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    families: Callable[..., Any],
    some_pairs: list,
) -> None:
    from kdecs.teacher.data import PromptSet, pair_units
    from kdecs.teacher.network import add_lora

    config = make_config(family="masked", device_peak_tflops=0.002)
    family = families("masked")
    base = family.load_network(config.model.base, dtype=torch.float32)
    prompts = [family.encode(pair) for pair in some_pairs[:6]]
    units = pair_units(prompts)
    meter = Meter(
        config,
        add_lora(base, config.lora, family.lora_task),
        PromptSet(some_pairs[:6], prompts, units),
        runtime,
    )
    meter.add(units, 0.5)
    lengths = [len(prompt.tokens) for prompt in prompts]
    costs = network_flops(meta_network(base.config, config.lora), checkpointing=False)
    flops = costs.of(tokens=sum(lengths), attended_pairs=sum(n * n for n in lengths), answers=6).total
    assert meter.line()["mfu"] == pytest.approx(flops / (0.5 * 0.002e12))


@pytest.mark.slow
def test_mlflow_has_one_run_with_every_point_once_also_after_a_resume(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    tracking = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "experiment": "teachers"}
    config = make_config(tracking=tracking)
    with pytest.raises(Stopped):
        train(config, runtime, steps=2)
    train(config, runtime)
    client = MlflowClient(tracking["uri"])
    runs = client.search_runs([client.get_experiment_by_name("teachers").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].data.params["lora.rank"] == "4"
    expected = points(config)
    for key in ("train_loss", "valid_macro_f1", "tokens_per_second", "memory_peak_gib"):
        history = client.get_metric_history(runs[0].info.run_id, key)
        logged = sorted((metric.step, metric.value) for metric in history)
        assert logged == [(line["step"], line[key]) for line in expected if key in line]
    # A student that is validated on this file has the same dataset and the same name of this score.
    valid = corpus_datasets(config.corpus, universe="fold1+neutral")[1]
    on_valid = [{"dataset_name": valid.name, "dataset_digest": valid.digest}]
    experiment = [runs[0].info.experiment_id]
    [model] = client.search_logged_models(experiment, "metrics.utterance_macro_f1 >= 0", datasets=on_valid)
    details = json.loads((config.output / "manifest.json").read_text())["details"]
    scores = {(metric.key, metric.step): metric.value for metric in model.metrics}
    assert scores["utterance_macro_f1", details["best_step"]] == details["valid"]["valid_macro_f1"]
    assert model.tags["kdecs.directory"] == str(config.output)


def test_mlflow_away_costs_a_warning(
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(
        tracking={"uri": "http://127.0.0.1:9", "experiment": "teachers"}, optimization__epochs=1
    )
    train(config, runtime)
    assert (config.output / "manifest.json").is_file()
    assert "does not answer" in capsys.readouterr().err
