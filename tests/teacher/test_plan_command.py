"""`kdecs plan` and the dry run: what they print, what they refuse, and that they write and download nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdecs.cli import app
from kdecs.config import load_config
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import KdecsError
from kdecs.process import exit_code_of
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.metering import peak_flops
from kdecs.teacher.plan import search
from kdecs.teacher.plan.activations import Activations, Shape
from kdecs.teacher.plan.hardware import GPUS, gpu_of_device
from kdecs.teacher.plan.planning import DEFAULT_GPU, PlanRequest, dry_run, gpu_here, make_plan
from kdecs.teacher.plan.search import Planner, Speed, Training, full_tree
from kdecs.teacher.plan.shapes import resolve_architecture
from kdecs.teacher.plan.workload import CountedPrompts, estimated_prompts, measure_workload

pytestmark = pytest.mark.usefixtures("planned_once")


def run_plan(*arguments: str) -> int:
    """Exit code of `kdecs plan …` in this process."""
    try:
        return exit_code_of(lambda: app(["plan", *arguments], standalone_mode=True))
    except SystemExit as error:
        return int(error.code or 0)


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without traces, for tests to which it does not matter how much memory they find."""
    found = SimpleNamespace(memory=lambda *_, **__: Activations(10**9, 10**8, 1000))
    monkeypatch.setattr(search, "ActivationTracer", lambda *_, **__: found)


@pytest.fixture(scope="module")
def llama_7b(planned_once: None) -> dict[str, Any]:
    """The plan of the documentation's example, as JSON has it."""
    return make_plan(PlanRequest("llama-7b", gpus=4, gpu_memory_gib=40)).as_record()


def test_the_command_prints_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["batches.micro_batch_tokens=1024", "zero.dtype=float32", "mfu=0.3"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert run_plan("--teacher", "smollm2-135m", "--gpu", "l4", "--json", *options) == 0
    expected = make_plan(PlanRequest("smollm2-135m", gpu="l4", settings=settings)).as_record()
    assert json.loads(capsys.readouterr().out) == expected
    assert (expected["gpu_memory_gib"], expected["assumptions"]["share of it"]) == (22, 0.3)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [(3, ["model.load_in_4bit=true"]), (0, ["zero.dtype=float16"])],
)
def test_the_configs_stage_excludes_no_setting(
    stage: int,
    settings: list[str],
    tmp_path: Path,
    bases: Callable[[str], Path],
    few_dialogues: Path,
    untraced: None,
) -> None:
    path = _config_file(tmp_path, str(bases("causal")), train=few_dialogues)
    path.write_text(path.read_text().replace("stage: 2", f"stage: {stage}"))
    request = PlanRequest(
        str(path), gpus=2, gpu_memory_gib=4, settings=[*settings, "batches.micro_batch_tokens=700"]
    )
    stages = {layout.choice.stage for layout in make_plan(request).layouts}
    assert stages == ({0, 1, 2} if stage == 3 else {1, 2, 3})


def test_a_plan_at_scale_is_printed_as_tables_or_json(
    few_dialogues: Path, untraced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--scale", "--teacher", "smollm2-135m", "--gpu", "a100-40g", "--gpus", "16")
    arguments += (
        "--corpus",
        str(few_dialogues),
        "--set",
        "batches.micro_batch_tokens=4096",
        "--set",
        "pairs=1e8",
    )
    assert run_plan(*arguments) == 0
    shown = capsys.readouterr().out
    assert "100,000,000 pairs, 16 × a100-40g" in shown
    assert "checkpoint_every_steps" in shown and "num_shards" in shown and "mtbf_hours 50000" in shown
    assert "price" not in shown  # a price comes from the user alone
    assert run_plan(*arguments, "--json") == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record["training"][0]["price"] is None
    assert record["what_breaks_first"] in shown
    loads = [demand["load"] for demand in record["demands"]]
    assert loads == sorted(loads, reverse=True)


def test_the_example_fits_and_the_best_is_the_fastest(llama_7b: dict[str, Any]) -> None:
    assert llama_7b["parameters"]["frozen"] == 6_738_415_616
    fitting = [c for c in llama_7b["candidates"] if c["fits"]]
    assert fitting and len(fitting) < len(llama_7b["candidates"])
    assert llama_7b["best"]["epoch"]["total_s"] == min(c["epoch"]["total_s"] for c in fitting)
    assert all(c["memory"]["total_gib"] <= 40 for c in fitting)
    assert {c["settings"]["zero.stage"] for c in llama_7b["candidates"]} == {0, 1, 2, 3}
    # 13.5 GB of weights in bfloat16, whole below stage 3, a quarter each there.
    weights = {c["settings"]["zero.stage"]: c["memory"]["weights_gib"] for c in llama_7b["candidates"][::-1]}
    assert weights[2] == pytest.approx(2 * 6_738_415_616 / 2**30)


def test_settings_are_keys_of_a_teachers_config(llama_7b: dict[str, Any], root: Path) -> None:
    path = root / "launch" / "configs" / "teacher" / "llama-7b.yaml"
    for candidate in llama_7b["candidates"]:
        options = [f"{key}={json.dumps(value)}" for key, value in candidate["settings"].items()]
        config = load_config(TeacherConfig, path, options)
        assert config.zero.stage == candidate["settings"]["zero.stage"]


def test_more_checkpointing_less_memory_more_time(llama_7b: dict[str, Any]) -> None:
    def find(**wanted: Any) -> dict[str, Any]:
        return next(
            c
            for c in llama_7b["candidates"]
            if all(c["settings"][key.replace("__", ".")] == value for key, value in wanted.items())
        )

    shared = {"zero__stage": 2, "zero__offload_optimizer": False, "batches__micro_batch_tokens": 4096}
    plain = find(**shared, zero__activation_checkpointing=False)
    recomputed = find(**shared, zero__activation_checkpointing=True)
    assert recomputed["memory"]["activations_gib"] < plain["memory"]["activations_gib"] / 4
    assert recomputed["epoch"]["compute_s"] > 1.3 * plain["epoch"]["compute_s"]


def test_nothing_fits(few_dialogues: Path, untraced: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--gpu-memory-gib", "2", "--set", "batches.micro_batch_tokens=4096")
    arguments += ("--corpus", str(few_dialogues))
    assert run_plan("--teacher", "llama-13b", *arguments) == 1
    error = capsys.readouterr().err
    assert "nothing fits" in error and "GiB of 2.0" in error and error.count("\n") == 1
    assert "more memory, a smaller teacher" in error


def test_what_would_fit_fits(few_dialogues: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--teacher", "roberta-large", "--full", "--gpu-memory-gib", "6")
    arguments += ("--corpus", str(few_dialogues))
    arguments += ("--set", "host_memory_gib=0.5", "--set", "batches.micro_batch_tokens=512", "--gpus")
    assert run_plan(*arguments, "1") == 1
    advice = capsys.readouterr().err.rpartition("; ")[2]
    assert "GPUs would do" in advice
    assert run_plan(*arguments, advice.split()[0]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--teacher", "llama-7b"], 2, "--gpu-memory-gib"),
        (["--teacher", "llama-7b", "--gpu", "l4", "--full", "--set", "lora.rank=8"], 1, "lora is None"),
        (["--teacher", "llama-7b", "--gpu", "l4", "--set", "mfu=2"], 1, "mfu: found 2"),
        (["--teacher", "llama-7b", "--gpu", "l4", "--set", "zero.dtyp=float16"], 1, "zero.dtyp: unknown key"),
        (["--teacher", "llama-8b", "--gpu", "a100-40g"], 1, "nor one of the shipped architectures"),
        (["--teacher", "llama-7b", "--gpu", "z9000"], 1, "not in the table"),
        (["--teacher", "llama-7b", "--gpu", "v100-32g"], 1, "no bfloat16"),
        (["--teacher", "/nowhere/model", "--gpu", "l4"], 1, "found no config.json"),
        (["--teacher", "/nowhere/teacher.yaml", "--gpu", "l4"], 1, "expected a YAML config file"),
        (["--teacher", "llama-7b", "--gpu", "l4", "--corpus", "/nowhere.json"], 1, "/nowhere.json"),
        (
            ["--scale", "--teacher", "llama-7b", "--gpu", "l4", "--set", "mtbf_hours=0"],
            1,
            "mtbf_hours: found 0",
        ),
        (
            ["--scale", "--teacher", "llama-7b", "--gpu", "l4", "--set", "mtbf_hour=9"],
            1,
            "mtbf_hour: unknown",
        ),
        # Without --scale nothing would read it.
        (["--teacher", "llama-7b", "--gpu", "l4", "--set", "mtbf_hours=9"], 1, "mtbf_hours: unknown"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(*arguments) == code
    error = capsys.readouterr().err
    assert words in error
    if code == 1:
        assert error.count("\n") == 1 and error.startswith("kdecs: error: ")


def test_a_model_directory_needs_no_weights(
    tmp_path: Path, bases: Callable[[str], Path], untraced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bases("causal") / name).read_bytes())
    arguments = ("--gpu-memory-gib", "4", "--json", "--set", "zero.dtype=float32")
    arguments += ("--set", "batches.micro_batch_tokens=512")
    assert run_plan("--teacher", str(tmp_path), *arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["family"] == "causal" and record["tokens_are_estimated"] is False
    assert record["best"]["epoch"]["pairs"] == len(_sample_pairs())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ({"hidden_size": "wide"}, "its config cannot be read"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "its weights are quantised"),
    ],
)
def test_a_hostile_config_is_one_line(
    change: dict[str, object],
    words: str,
    tmp_path: Path,
    bases: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = json.loads((bases("causal") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    capsys.readouterr()  # the progress bar of a base that was made just now
    assert run_plan("--teacher", str(tmp_path), "--gpu-memory-gib", "4") == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def _sample_pairs() -> list[Any]:
    dialogues = read_corpus(bundled_sample("train")).dialogues
    return [pair for dialogue in dialogues for pair in pairs_of(dialogue, "fold1+neutral")]


def test_estimated_prompts_are_cut_and_share_what_texts_share() -> None:
    pairs = [pair for pair in _sample_pairs() if pair.target >= 6][:2]
    prompts = estimated_prompts(pairs, max_prompt_tokens=2048)
    work = measure_workload(
        pairs, prompts, use_tree=True, ranks=1, micro_batch_tokens=4096, global_batch_pairs=64
    )
    assert work.tokens < sum(len(prompt.tokens) for prompt in prompts)
    assert max(len(p.tokens) for p in estimated_prompts(pairs, max_prompt_tokens=16)) == 16
    hinted = estimated_prompts(pairs, max_prompt_tokens=2048, is_hinted=lambda pair: pair is pairs[1])
    longer = [len(b.tokens) - len(a.tokens) for a, b in zip(prompts, hinted, strict=True)]
    # ". The relatio n between 6 and 2 is not causal", as pieces
    assert longer == [0, 10 if pairs[1].is_cause else 11]


@pytest.mark.parametrize("use_tree", [True, False])
def test_a_workload_is_the_same_however_many_ranks_share_it(use_tree: bool) -> None:
    pairs = _sample_pairs()[:400]
    prompts = estimated_prompts(pairs, max_prompt_tokens=512)
    options = {"use_tree": use_tree, "micro_batch_tokens": 1024, "global_batch_pairs": 32}
    alone, shared = (measure_workload(pairs, prompts, ranks=ranks, **options) for ranks in (1, 4))
    assert shared.steps == alone.steps
    assert shared.ancestors == alone.ancestors
    assert alone.rank_tokens == alone.tokens
    assert alone.tokens / 4 <= shared.rank_tokens < alone.tokens
    assert shared.scaled(3.0).tokens == 3 * shared.tokens


CONFIG = """\
name: dry
output: {output}
corpus: {{train: {train}, valid: {valid}}}
model: {{family: causal, base: {base}}}
zero: {{stage: 2, activation_checkpointing: true}}
batches: {{max_prompt_tokens: 512, micro_batch_tokens: 700, tree_attention: {attention}}}
optimization: {{epochs: 3, seed: 5}}
"""


def _config_file(directory: Path, base: str, *, train: Path | None = None, attention: str = "auto") -> Path:
    path = directory / "teacher.yaml"
    text = CONFIG.format(
        output=directory / "out",
        train=train or bundled_sample("train"),
        valid=bundled_sample("valid"),
        base=base,
        attention=attention,
    )
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("hints", [0.0, 0.5])
def test_dry_run_counts_the_steps_of_the_training(
    hints: float, tmp_path: Path, bases: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from kdecs.teacher.data import prepare_data
    from kdecs.teacher.families import make_family

    path = _config_file(tmp_path, str(bases("causal")))
    config = load_config(TeacherConfig, path, [f"gold_hint_share={hints}"])
    candidate = dry_run(config, world_size=3)
    shown = capsys.readouterr().out
    family = make_family(config.model, max_prompt_tokens=512, emotions_shown="coarse")
    data = prepare_data(config, family, use_tree=True, world_size=3, show_progress=False)
    assert round(3 * candidate.work.steps) == len(data.steps)
    assert f"{len(data.steps):,} in 3 epochs; up to {data.accumulation_steps} micro-batches" in shown
    assert candidate.work.accumulation == data.accumulation_steps
    assert candidate.work.tokens == pytest.approx(data.train.num_tokens)
    assert candidate.choice.ranks == 3


def test_a_workload_takes_the_seed_and_all_epochs() -> None:
    pairs = _sample_pairs()[:300]
    prompts = estimated_prompts(pairs, max_prompt_tokens=512)

    def busiest(**options: int) -> float:
        return measure_workload(
            pairs,
            prompts,
            use_tree=True,
            ranks=3,
            micro_batch_tokens=300,
            global_batch_pairs=20,
            **options,
        ).rank_attended

    assert busiest(seed=5) != busiest(seed=0)
    first, two = busiest(seed=5), busiest(seed=5, epochs=2)
    assert two != first
    assert two == pytest.approx(first, rel=0.1)  # of an epoch, not of both


@pytest.mark.parametrize(
    ("family", "positions", "message"),
    [
        ("masked", 512, r"is causal, the config says model\.family=masked"),
        (
            "causal",
            256,
            "prompts of up to 512 tokens, but .* 256 positions; set batches.max_prompt_tokens=256",
        ),
    ],
)
def test_dry_run_refuses_what_training_refuses(
    family: str, positions: int, message: str, tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        text = (bases("causal") / name).read_text()
        (base / name).write_text(
            text.replace('"max_position_embeddings": 512', f'"max_position_embeddings": {positions}')
        )
    path = _config_file(tmp_path, str(base))
    path.write_text(path.read_text().replace("family: causal", f"family: {family}"))
    with pytest.raises(KdecsError, match=message):
        dry_run(load_config(TeacherConfig, path), world_size=1)


@pytest.mark.slow
def test_the_attention_over_trees_is_the_configs(
    tmp_path: Path, bases: Callable[[str], Path], few_dialogues: Path
) -> None:
    peaks = {}
    for attention in ("auto", "flex", "mask"):
        path = _config_file(tmp_path, str(bases("causal")), train=few_dialogues, attention=attention)
        run = dry_run(load_config(TeacherConfig, path), world_size=1)
        plan = make_plan(
            PlanRequest(str(path), gpu_memory_gib=4, settings=["batches.micro_batch_tokens=700"])
        )
        assert plan.best is not None
        peaks[attention] = run.memory.activations, plan.best.memory.activations
    assert peaks["auto"] == peaks["flex"]
    assert all(mask > flex for mask, flex in zip(peaks["mask"], peaks["flex"], strict=True))


def test_a_line_of_traces_is_kept_for_its_number_of_answers(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pairs = _sample_pairs()[:40]
    config = load_config(
        TeacherConfig, _config_file(tmp_path, str(bases("causal"))), ["zero.dtype=float32", "lora.rank=4"]
    )
    prompts = estimated_prompts(pairs, max_prompt_tokens=128)
    training = Training(
        config=config,
        architecture=resolve_architecture(str(bases("causal"))),
        counted=CountedPrompts(pairs, prompts, are_estimated=True, max_prompt_tokens=128),
        gpus=1,
        speed=Speed(1e12, 1e9),
        reserve_bytes=0.0,
    )

    def shape(answers: int) -> Shape:
        return Shape(1, 1024, answers, full_tree(1024, 128))

    used = Planner(training)
    few, many = (used.activations(shape(answers), checkpointing=False) for answers in (16, 512))
    assert many == Planner(training).activations(shape(512), checkpointing=False) != few


DEVICES = [
    ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"),
    ("NVIDIA GeForce RTX 3090", 24, "rtx-3090"),
    ("NVIDIA GeForce RTX 3090 Ti", 24, "rtx-3090"),
    ("NVIDIA H100 80GB HBM3", 79, "h100-80g"),
    ("NVIDIA H100 PCIe", 79, "h100-pcie"),
    ("NVIDIA H200", 140, "h200"),
    ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
    ("NVIDIA A100 80GB PCIe", 79.2, "a100-80g"),
    ("Tesla V100-SXM2-32GB", 31.7, "v100-32g"),
    ("Tesla T4", 14.6, "t4"),
    ("NVIDIA A10", 22, "a10"),
    ("NVIDIA A10G", 22, "a10g"),
    ("NVIDIA L4", 22, "l4"),
    ("NVIDIA L40S", 44.4, "l40s"),
    ("NVIDIA GeForce RTX 4080", 16, None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
    ("NVIDIA L40", 44, None),
]


@pytest.mark.parametrize(("device", "memory_gib", "name"), DEVICES)
def test_a_device_is_found_under_its_drivers_name(device: str, memory_gib: float, name: str | None) -> None:
    gpu = gpu_of_device(device, memory_gib)
    assert (gpu and gpu.name) == name


@pytest.mark.parametrize(("device", "memory_gib", "name"), DEVICES[:5] + DEVICES[-3:])
def test_a_peak_that_is_not_known_is_said_to_be_assumed(
    device: str, memory_gib: float, name: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    properties = SimpleNamespace(name=device, total_memory=int(memory_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    gpu, said = gpu_here()
    assert gpu.name == device
    assert ("assumed" in said) == (name is None)
    config = load_config(TeacherConfig, _config_file(tmp_path, "huggyllama/llama-7b"))
    peak = peak_flops(config, torch.device("cuda"))
    assert peak == (None if name is None else GPUS[name].peak_tflops * 1e12)
    assert gpu.peak_tflops == GPUS[name or DEFAULT_GPU].peak_tflops


@pytest.mark.slow
def test_dry_run_of_a_hub_name_downloads_and_writes_nothing(tmp_path: Path, root: Path) -> None:
    path = _config_file(tmp_path, "HuggingFaceTB/SmolLM2-135M")
    before = sorted(tmp_path.iterdir())
    environment = {**os.environ, "HF_HOME": str(tmp_path.parent / "no_hub"), "PYTHONPATH": str(root)}
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, str(root / "launch" / "train_teacher.py"), "--config", str(path), "--dry-run"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "139,399,488 parameters" in done.stdout
    assert done.stderr == ""
    assert "estimated, since the tokenizer is not on this machine" in done.stdout
    assert "nothing was started, nothing was written" in done.stdout
    assert sorted(tmp_path.iterdir()) == before
