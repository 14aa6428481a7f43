"""Scoring's shortcuts against the plain network."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import StopAfter, change_json, rewrite_manifest

from kdecs.artifact import Manifest, write_manifest
from kdecs.config import write_config
from kdecs.corpus.pairs import Pair
from kdecs.errors import KdecsError
from kdecs.runtime import Runtime
from kdecs.teacher.config import LoraConfig, TeacherConfig
from kdecs.teacher.families import Family
from kdecs.teacher.network import TeacherNetwork, add_lora
from kdecs.teacher.scoring import TeacherScorer, fold_adapter
from kdecs.teacher.training import train_teacher

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["causal", "seq2seq", "masked"])
def test_folded_adapter_gives_the_logits_of_base_and_adapter(
    name: str, families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families(name)
    torch.manual_seed(0)
    base = family.load_network(str(bases(name)), dtype=torch.float32)
    adapted = add_lora(base, LoraConfig(rank=4), family.lora_task)
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    prompts = [family.encode(pair) for pair in some_pairs[:6]]

    def logits_and_rest(network: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return TeacherNetwork(family, network, use_tree=True, device=CPU).eval().answers_and_rest(prompts)

    before = logits_and_rest(adapted)
    with torch.no_grad(), adapted.disable_adapter():
        without = TeacherNetwork(family, adapted, use_tree=True, device=CPU).eval()(prompts)
    folded = fold_adapter(adapted)
    assert not any("lora" in parameter_name for parameter_name, _ in folded.named_parameters())
    for found, expected in zip(logits_and_rest(folded), before, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert float((without - before[0]).abs().max()) > 1e-2  # the adapter does something that could be lost


@pytest.mark.parametrize("name", ["causal", "seq2seq", "masked"])
def test_top_logits_are_the_largest_of_the_whole_vocabulary(
    name: str, families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    """K exceeds the number of answer words, so that reading the head's answer rows instead would show."""
    family = families(name)
    network = family.load_network(str(bases(name)), dtype=torch.float32)
    teacher = TeacherNetwork(family, network, use_tree=True, device=CPU).eval()
    manifest = Manifest.model_construct(details={})
    scorer = TeacherScorer(teacher, manifest, {}, micro_batch_tokens=512)
    pairs = some_pairs[:6]
    answers, rest, ids, logits = scorer.score_with_top(pairs, 7)
    for found, expected in zip((answers, rest), scorer.score(pairs), strict=True):
        np.testing.assert_array_equal(found, expected)
    for row, pair in enumerate(pairs):
        with torch.no_grad():
            _, head_V = family.model_logits(network, family.encode(pair), CPU)
        np.testing.assert_allclose(head_V[ids[row]].numpy(), logits[row], atol=1e-4)
        np.testing.assert_allclose(np.sort(head_V.numpy())[::-1][:7], logits[row], atol=1e-4)


@pytest.mark.slow
def test_a_masked_teacher_trained_in_trees_scores_in_trees(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None, some_pairs: list[Pair]
) -> None:
    """Its config says so: the scores of pairs together are those of each pair alone."""
    config = make_config(family="masked", model__layout="tree", optimization__epochs=1)
    train_teacher(config, runtime, StopAfter())
    scorer = TeacherScorer.load(config.output, runtime=runtime, dtype="float32", micro_batch_tokens=600)
    assert scorer.network.family.encode(some_pairs[0]).num_trunk > 0
    answers, rest = scorer.score(some_pairs)
    alone = [scorer.score([pair]) for pair in some_pairs]
    np.testing.assert_allclose(answers, np.concatenate([found for found, _ in alone]), atol=1e-4)
    np.testing.assert_allclose(rest, np.concatenate([found for _, found in alone]), atol=1e-4)


def test_a_tuned_teacher_from_anybody_runs_no_code_and_is_refused_in_one_line(
    make_config: Callable[..., TeacherConfig],
    bases: Callable[[str], Path],
    runtime: Runtime,
    some_pairs: list[Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    marker = tmp_path / "marker"
    config = make_config(lora=None)
    shutil.copytree(bases("causal"), config.output / "model")
    (config.output / "model" / "manifest.json").unlink()
    write_config(config, config.output)
    files = [str(path.relative_to(config.output)) for path in config.output.rglob("*") if path.is_file()]
    write_manifest(
        config.output,
        "teacher",
        config_hash="c" * 64,
        inputs={"base": "b" * 64},
        files=files,
        details={"batching": "pairs"},
    )

    def load(teacher: Path) -> TeacherScorer:
        return TeacherScorer.load(teacher, runtime=runtime, dtype="float32", micro_batch_tokens=600)

    def forged(name: str, *more: str, **changes: object) -> Path:
        teacher = Path(shutil.copytree(config.output, tmp_path / name))
        for path in more:
            (teacher / path).write_text(f"open({str(marker)!r}, 'w').close()")
        change_json(teacher / "model" / "config.json", **changes)
        rewrite_manifest(teacher, *more)
        return teacher

    expected = load(config.output).score(some_pairs[:2])[0]
    kernel = forged("kernel", attn_implementation="kernels-community/flash-attn2")
    np.testing.assert_array_equal(load(kernel).score(some_pairs[:2])[0], expected)
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    bare = forged("bare")
    change_json(bare / "manifest.json", inputs={})
    unlisted = forged("unlisted")
    (unlisted / "adapter_config.json").write_text("{}")
    for teacher, message in (
        (forged("code", "model/own.py", auto_map=auto_map), "Python code"),
        (forged("needed", auto_map=auto_map, model_type="own"), "Python code"),
        (forged("tuple", return_dict=False), "does not run as a teacher"),
        (forged("layers", num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
        (unlisted, "does not list this file"),
        (bare, "names no base"),
    ):
        with pytest.raises(KdecsError, match=message) as caught:
            load(teacher)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
