"""An adapter made by plain PEFT serves as a teacher; those that do not fit their base are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import rewrite_manifest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, MistralConfig
from typer.testing import CliRunner

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.prompts import teacher_prompt
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import FINE_TO_COARSE
from kdecs.errors import ArtifactError, KdecsError, ModelError
from kdecs.runtime import Runtime
from kdecs.soft_labels.claims import check_teacher_corpus
from kdecs.soft_labels.config import ExportConfig
from kdecs.teacher.commands import app
from kdecs.teacher.families import Family
from kdecs.teacher.scoring import TeacherScorer

AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
TARGETS = {"causal": ["q_proj", "v_proj", "down_proj"], "masked": ["query", "value"]}


def plain_adapter(base: Path, family: str, directory: Path) -> Any:
    """An adapter as any PEFT script makes one, with weights that matter."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS[family])
    model = get_peft_model(AUTO[family].from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(directory)
    return model.eval()


@pytest.fixture(scope="module")
def made(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    root = tmp_path_factory.mktemp("adapters")
    models: dict[str, Any] = {}

    def adapter(family: str) -> tuple[Path, Any]:
        if family not in models:
            models[family] = plain_adapter(bases(family), family, root / family)
        return root / family, models[family]

    return adapter


def run(adapter: Path, base: Path, output: Path, *extra: str, family: str = "causal") -> Any:
    arguments = [
        *("import", str(adapter), "--base", str(base), "--family", family, "--output", str(output)),
        *("--train", str(bundled_sample("train")), "--valid", str(bundled_sample("valid"))),
        *("--max-prompt-tokens", "500", *extra),
    ]
    return CliRunner().invoke(app, arguments)


def next_token_logits(model: Any, tokenizer: Any, pair: Pair) -> np.ndarray:
    """Oracle: the prompt's text through Transformers, the logits after its last token."""
    emotion = FINE_TO_COARSE.get(pair.emotion or "", pair.emotion or "")
    prompt = teacher_prompt(pair.dialogue, pair.target, pair.candidate, emotion=emotion, separator="\n")
    with torch.no_grad():
        logits = model(**tokenizer(prompt.text, return_tensors="pt")).logits[0, -1]
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][-1] for word in CONNECTIVES]
    return logits[ids].numpy()


def test_a_plain_adapter_is_a_teacher_that_the_export_accepts(
    made: Callable[[str], Any],
    bases: Callable[[str], Path],
    runtime: Runtime,
    some_pairs: list[Pair],
    tmp_path: Path,
) -> None:
    adapter, model = made("causal")
    output = tmp_path / "teacher"
    result = run(adapter, bases("causal"), output)
    assert result.exit_code == 0, result.exception
    assert "scored by tree" in result.output
    assert verify_artifact(output) == []
    manifest = read_manifest(output, "teacher")
    assert manifest.details["imported"] is True
    corpus = {split: bundled_sample(split) for split in ("train", "valid")}
    config = ExportConfig(teacher=output, corpus=corpus, output=tmp_path / "labels")
    check_teacher_corpus(config, manifest)
    scorer = TeacherScorer.load(output, runtime=runtime, dtype="float32", micro_batch_tokens=2048)
    tokenizer = AutoTokenizer.from_pretrained(bases("causal"))
    short = [p for p in some_pairs if p.target <= 4][:12]
    expected = np.stack([next_token_logits(model, tokenizer, pair) for pair in short])
    np.testing.assert_allclose(scorer.score(short)[0], expected, atol=2e-3, rtol=1e-3)
    before = (output / "manifest.json").stat().st_mtime_ns
    assert run(adapter, bases("causal"), output).exit_code == 0
    assert (output / "manifest.json").stat().st_mtime_ns == before


def test_an_adapter_of_another_corpus_needs_the_export_s_leave(
    made: Callable[[str], Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter, _ = made("masked")
    result = run(adapter, bases("masked"), tmp_path / "teacher", "--other-corpus", family="masked")
    assert result.exit_code == 0, result.exception
    corpus = {split: bundled_sample(split) for split in ("train", "valid")}
    manifest = read_manifest(tmp_path / "teacher", "teacher")
    config = ExportConfig(teacher=tmp_path / "teacher", corpus=corpus, output=tmp_path / "labels")
    with pytest.raises(ArtifactError, match="allow_other_corpus"):
        check_teacher_corpus(config, manifest)
    check_teacher_corpus(config.model_copy(update={"allow_other_corpus": True}), manifest)


def test_an_adapter_s_config_leads_nowhere_else(
    made: Callable[[str], Any],
    bases: Callable[[str], Path],
    runtime: Runtime,
    some_pairs: list[Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither to a base and modules of its author's choice, nor to a kind of adapter that fetches others."""
    good, _ = made("causal")
    marker = tmp_path / "marker"
    (tmp_path / "evil_core.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    elsewhere = {
        "base_model_name_or_path": "/nowhere/base",
        "revision": "evil",
        "auto_mapping": {"base_model_class": "x", "parent_library": "evil_core"},
        "megatron_config": {"tensor_model_parallel_size": 1},
        "megatron_core": "evil_core",
    }
    adapter = Path(shutil.copytree(good, tmp_path / "adapter"))
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(values | elsewhere))
    plain, output = tmp_path / "plain", tmp_path / "teacher"
    assert run(good, bases("causal"), plain).exit_code == 0
    result = run(adapter, bases("causal"), output)
    assert result.exit_code == 0, result.exception
    written = json.loads((output / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(bases("causal"))
    assert (written["revision"], written["auto_mapping"], written["megatron_config"]) == (None, None, None)

    def forge(**changes: object) -> None:
        (output / "adapter_config.json").write_text(json.dumps(values | changes))
        rewrite_manifest(output)

    def logits(teacher: Path) -> np.ndarray:
        scorer = TeacherScorer.load(teacher, runtime=runtime, dtype="float32", micro_batch_tokens=2048)
        return scorer.score(some_pairs[:4])[0]

    forge(**elsewhere)
    np.testing.assert_array_equal(logits(output), logits(plain))
    for changes, message in (
        ({"peft_type": "XLORA", "adapters": {"0": "someone/adapter"}}, "peft_type is 'XLORA'"),
        ({"r": "four"}, "does not load onto"),
        ({"r": 10**8}, "asks for rank 100000000"),
        ({"rank_pattern": {"q_proj": 10**8}}, "asks for rank 100000000"),
        ({"layer_replication": [[0, 2]] * 100_000}, "200000 repeated layers"),
        ({"target_modules": {"q_proj": 1.5}, "layers_pattern": 3}, "does not load onto"),
    ):
        forge(**changes)
        with pytest.raises(ModelError, match=message) as caught:
            logits(output)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_window_that_only_the_longest_prompt_outgrows_means_pairs(
    make_base: Callable[..., Path], families: Callable[..., Family], tmp_path: Path
) -> None:
    dialogues = read_corpus(bundled_sample("valid")).dialogues
    pairs = [pair for dialogue in dialogues for pair in pairs_of(dialogue, "fold1")]
    longest = max(len(families("causal").encode(pair).tokens) for pair in pairs)
    base = make_base(MistralConfig, sliding_window=longest - 2)
    plain_adapter(base, "causal", tmp_path / "adapter")
    result = run(tmp_path / "adapter", base, tmp_path / "teacher")
    assert result.exit_code == 0, result.exception
    assert "scored by pairs" in result.output


def test_adapters_that_do_not_fit_are_refused_in_one_line(
    made: Callable[[str], Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    good, _ = made("causal")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    pickled, other_kind, no_base = copy("pickled"), copy("kind"), copy("modules")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    values = json.loads((other_kind / "adapter_config.json").read_text())
    (other_kind / "adapter_config.json").write_text(json.dumps(values | {"peft_type": "IA3"}))
    (no_base / "adapter_config.json").write_text(json.dumps(values | {"target_modules": ["q_proj"]}))
    shape, garbage = copy("shape"), copy("garbage")
    (shape / "adapter_config.json").write_text(json.dumps(values | {"r": 2}))
    (garbage / "adapter_model.safetensors").write_bytes(b"\x80\x04 not safetensors")
    for adapter, base, message in (
        (tmp_path / "nothing", bases("causal"), "no adapter_config.json"),
        (pickled, bases("causal"), "adapter_model.bin is never opened"),
        (other_kind, bases("causal"), "peft_type is 'IA3'"),
        (no_base, bases("causal"), "only one of them has"),
        (shape, bases("causal"), "does not load onto"),
        (garbage, bases("causal"), "cannot be read"),
        (good, bases("masked"), "is masked, the config says model.family=causal"),
        (good, tmp_path / "no-model", "no-model"),
    ):
        result = run(adapter, base, tmp_path / "out")
        assert isinstance(result.exception, KdecsError), (adapter, result.exception)
        assert "\n" not in str(result.exception)
        with pytest.raises(KdecsError, match=message):
            raise result.exception
        assert not (tmp_path / "out" / "manifest.json").exists()
