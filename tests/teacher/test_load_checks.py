"""What is seen of a model at load: its tree, its head, its family, its positions; refusals of one line."""

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import StopAfter
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
)

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import ModelError
from kdecs.process import StopSignal
from kdecs.runtime import Runtime
from kdecs.teacher import training as preparation
from kdecs.teacher.config import LoraConfig, TeacherConfig
from kdecs.teacher.families import EncodedPrompt, Family
from kdecs.teacher.network import (
    TeacherNetwork,
    add_lora,
    check_config,
    check_head,
    tree_is_exact,
    tree_probes,
)
from kdecs.teacher.training import train_teacher
from kdecs.teacher.tree.prefix_tree import tree_size

BIASES = {"cls.predictions.bias", "cls.predictions.decoder.bias"}


def teacher_of(family: Family, network: nn.Module) -> TeacherNetwork:
    return TeacherNetwork(family, network, use_tree=False, device=torch.device("cpu")).eval()


def encoded_sample(family: Family) -> tuple[list[Pair], list[EncodedPrompt]]:
    dialogues = read_corpus(bundled_sample("valid")).dialogues[:12]
    pairs = [pair for dialogue in dialogues for pair in pairs_of(dialogue, "fold1")]
    return pairs, [family.encode(pair) for pair in pairs]


def test_probes_hold_the_longest_prompt_and_branch_over_targets(families: Callable[..., Family]) -> None:
    pairs, prompts = encoded_sample(families("causal"))
    probes = tree_probes(pairs, prompts, max_tokens=4096)
    lengths = [len(prompt.tokens) for prompt in prompts]
    assert len(probes[0].tokens) == max(lengths)
    chosen = [next(n for n, p in enumerate(prompts) if p is probe) for probe in probes]
    assert len(set(chosen)) == len(probes) > 4
    assert len({pairs[n].dialogue.id for n in chosen}) == 1
    assert len({pairs[n].target for n in chosen}) > 2
    assert tree_size([p.tokens for p in probes]) < sum(len(p.tokens) for p in probes) / 2
    few = tree_probes(pairs, prompts, max_tokens=max(lengths) + 60)
    assert 1 < len(few) < len(probes)
    assert tree_size([p.tokens for p in few]) <= max(lengths) + 60
    assert tree_probes(pairs, prompts, max_tokens=16) == [probes[0]]


def test_a_window_that_only_the_longest_prompt_outgrows_is_seen(
    families: Callable[..., Family], make_base: Callable[..., Path], runtime: Runtime
) -> None:
    family = families("causal")
    pairs, prompts = encoded_sample(family)
    lengths = sorted(len(prompt.tokens) for prompt in prompts)
    for window, is_exact in ((lengths[-1] - 3, False), (lengths[-1] + 1, True)):
        base = make_base(MistralConfig, sliding_window=window)
        teacher = teacher_of(family, family.load_network(str(base), dtype=torch.float32))
        shutil.rmtree(base)
        probes = tree_probes(pairs, prompts, max_tokens=4096)
        assert tree_is_exact(teacher, teacher, probes, runtime) == is_exact
        assert not teacher.use_tree


def test_no_memory_for_the_tree_is_no_verdict(
    families: Callable[..., Family], bases: Callable[[str], Path], runtime: Runtime
) -> None:
    family = families("causal")
    _, prompts = encoded_sample(family)
    teacher = teacher_of(family, family.load_network(str(bases("causal")), dtype=torch.float32))

    def ask(some: list[EncodedPrompt]) -> torch.Tensor:
        if teacher.use_tree:
            raise torch.OutOfMemoryError("out of memory")
        return teacher(some)

    with pytest.raises(torch.OutOfMemoryError):
        tree_is_exact(ask, teacher, prompts[:3], runtime)
    assert not teacher.use_tree


def test_what_another_rank_saw_counts(
    families: Callable[..., Family],
    bases: Callable[[str], Path],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kdecs.teacher import network as load_checks

    family = families("causal")
    _, prompts = encoded_sample(family)
    teacher = teacher_of(family, family.load_network(str(bases("causal")), dtype=torch.float32))
    assert tree_is_exact(teacher, teacher, prompts[:3], runtime)
    monkeypatch.setattr(load_checks, "any_rank", lambda flag, runtime: True)
    assert not tree_is_exact(teacher, teacher, prompts[:3], runtime)


def test_the_first_network_is_freed_before_the_second_is_loaded(
    make_base: Callable[..., Path],
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[weakref.ref[Any]] = []
    real = preparation.start_engine

    def start(*args: Any) -> Any:
        assert [reference() for reference in started] == [None] * len(started)
        engine = real(*args)
        started.append(weakref.ref(engine.module.network))
        return engine

    monkeypatch.setattr(preparation, "start_engine", start)
    base = make_base(MistralConfig, sliding_window=8)
    config = make_config(model__base=str(base), optimization__epochs=1, validate_per_epoch=1)
    train_teacher(config, runtime, StopAfter())
    assert len(started) == 2
    assert "it trains on pairs" in capsys.readouterr().out
    manifest = json.loads((config.output / "manifest.json").read_text())
    assert manifest["details"]["batching"] == "pairs"


def test_a_loss_over_targets_does_not_fall_back_to_pairs(
    make_base: Callable[..., Path],
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
) -> None:
    base = make_base(MistralConfig, sliding_window=8)
    config = make_config(model__base=str(base), target_loss_weight=0.5)
    with pytest.raises(
        ModelError, match=r"batching=pairs and target_loss_weight=0, which needs trees"
    ) as caught:
        train_teacher(config, runtime, StopAfter())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}, "logits_scaling"),
        (CohereConfig, {"logit_scale": 0.0625}, "logit_scale"),
        (
            Gemma2Config,
            {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None},
            "final_logit_softcapping",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_change_after_the_head_are_refused(
    kind: type[PretrainedConfig],
    values: dict[str, Any],
    key: str,
    dtype: torch.dtype,
    make_base: Callable[..., Path],
    families: Callable[..., Family],
    some_pairs: list[Pair],
) -> None:
    family = families("causal")
    base = make_base(kind, **values)
    teacher = teacher_of(family, family.load_network(str(base), dtype=dtype))
    with pytest.raises(ModelError, match=rf"changes its logits after the output embedding \({key}") as caught:
        check_head(teacher, teacher, family.encode(some_pairs[0]), str(base))
    assert "\n" not in str(caught.value)


def test_a_model_that_our_attention_cannot_run_is_one_line(
    make_base: Callable[..., Path], families: Callable[..., Family], some_pairs: list[Pair]
) -> None:
    family = families("causal")
    base = make_base(Gemma2Config)  # caps the scores of its attention
    teacher = teacher_of(family, family.load_network(str(base), dtype=torch.float32))
    with pytest.raises(ModelError, match=r"does not run as a teacher: .*softcap") as caught:
        check_head(teacher, teacher, family.encode(some_pairs[0]), str(base))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["causal", "seq2seq", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_the_families_pass(
    name: str,
    dtype: torch.dtype,
    families: Callable[..., Family],
    bases: Callable[[str], Path],
    some_pairs: list[Pair],
) -> None:
    family = families(name)
    network = add_lora(family.load_network(str(bases(name)), dtype=dtype), LoraConfig(), family.lora_task)
    teacher = teacher_of(family, network)
    check_head(teacher, teacher, family.encode(some_pairs[0]), str(bases(name)))


@pytest.mark.parametrize("name", ["causal", "seq2seq", "masked"])
def test_answer_rows_are_multiplied_in_float32_whatever_the_dtype(
    name: str, families: Callable[..., Family], bases: Callable[[str], Path]
) -> None:
    family = families(name)
    network = family.load_network(str(bases(name)), dtype=torch.bfloat16).eval()
    output = network.get_output_embeddings()
    given: list[torch.Tensor] = []
    output.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        hidden_PH = torch.randn(4, network.config.hidden_size, dtype=torch.bfloat16)
        found = family.answer_logits(network, hidden_PH)
        whole = family.head(network, hidden_PH)[:, family.answer_ids]
        bias = 0 if output.bias is None else output.bias.double()[family.answer_ids]
        exact = given[-1].double() @ output.weight.double()[family.answer_ids].T + bias
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-6 * exact.abs().max()
    assert (whole - exact).abs().max() > 1e-4 * exact.abs().max(), "the test has something to see"


def test_the_head_of_a_masked_teacher_in_trees_passes(
    families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families("masked")
    family.layout = "tree"
    network = family.load_network(str(bases("masked")), dtype=torch.float32)
    with torch.no_grad():
        for (
            name,
            parameter,
        ) in network.named_parameters():  # small random weights hardly attend, whatever the mask
            parameter.mul_(8.0 if "attention" in name and name.endswith("weight") else 1.0)
    teacher = teacher_of(family, network)
    prompt = family.encode(some_pairs[0])
    with torch.no_grad():
        difference = teacher([prompt]) - teacher([replace(prompt, num_trunk=0)])
    assert float(difference.abs().max()) > 5e-4, "the check has something to see"
    check_head(teacher, teacher, prompt, "base")


def test_a_hidden_state_that_is_scaled_before_the_head_is_seen(
    families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families("causal")
    teacher = teacher_of(family, family.load_network(str(bases("causal")), dtype=torch.float32))
    teacher.network.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    with pytest.raises(ModelError, match="by an unknown setting"):
        check_head(teacher, teacher, family.encode(some_pairs[0]), "base")


def test_logits_that_are_not_finite_are_left_to_the_training(
    families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families("causal")
    teacher = teacher_of(family, family.load_network(str(bases("causal")), dtype=torch.float32))
    unused = next(n for n in range(100, 700) if n not in family.answer_ids)
    with torch.no_grad():
        teacher.network.lm_head.weight[unused] = torch.nan
    prompt = next(p for p in map(family.encode, some_pairs) if unused not in p.tokens)
    check_head(teacher, teacher, prompt, "base")


@pytest.mark.parametrize("stage", [2, 3])
def test_training_refuses_such_a_model(
    make_base: Callable[..., Path],
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
    stage: int,
) -> None:
    base = make_base(GraniteConfig, logits_scaling=8.0)
    config = make_config(model__base=str(base), zero__stage=stage)
    with pytest.raises(ModelError, match="logits_scaling"):
        train_teacher(config, runtime, StopAfter())


def test_another_family_is_refused_before_the_base_is_loaded(
    make_config: Callable[..., TeacherConfig],
    bases: Callable[[str], Path],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModelError, match=r"is masked, the config says model\.family=causal"):
        check_config(str(bases("masked")), "causal", 64)
    monkeypatch.setattr(Family, "load_network", lambda *_, **__: pytest.fail("the base was loaded"))
    config = make_config(model__base=str(bases("masked")))
    with pytest.raises(ModelError, match=r"is masked, the config says model\.family=causal"):
        train_teacher(config, runtime, StopAfter())
    assert not config.output.exists()


@pytest.mark.parametrize("targets", [("nope",), ("q_proj", "nope")])
def test_an_unknown_lora_target_is_one_line(
    targets: tuple[str, ...],
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
) -> None:
    config = make_config(lora__targets=list(targets))
    with pytest.raises(ModelError, match=r"lora\.targets: the model has no module 'nope'.*q_proj") as caught:
        train_teacher(config, runtime, StopAfter())
    assert "\n" not in str(caught.value)


def test_weights_of_other_shapes_are_one_line(
    families: Callable[..., Family], make_base: Callable[..., Path]
) -> None:
    base = make_base(LlamaConfig)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"intermediate_size": 48}))
    with pytest.raises(ModelError, match="cannot be loaded as causal: ") as caught:
        families("causal").load_network(str(base), dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_a_base_without_its_head_is_for_full_tuning_alone(
    bases: Callable[[str], Path],
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    tmp_path: Path,
    group: None,
) -> None:
    base = shutil.copytree(bases("masked"), tmp_path / "headless")
    drop_weights(base, "lm_head.")
    config = make_config(model={"family": "masked", "base": str(base)})
    with pytest.raises(
        ModelError, match=r"no weights for the language model's head.*set lora: null"
    ) as caught:
        train_teacher(config, runtime, StopAfter())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_full_tuning_begins_with_a_seeded_new_head_and_says_so(
    stage: int,
    bases: Callable[[str], Path],
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    group: None,
) -> None:
    base = shutil.copytree(bases("masked"), tmp_path / "headless")
    drop_weights(base, "lm_head.dense")
    weights = []
    for number in range(2):
        config = make_config(
            model={"family": "masked", "base": str(base)},
            lora=None,
            zero={"stage": stage, "dtype": "float32"},
            output=f"teacher-{number}",
            optimization={"learning_rate": 0.005, "epochs": 1},
            validate_per_epoch=1,
            batches={"global_batch_pairs": 36, "micro_batch_tokens": 4096, "max_prompt_tokens": 128},
        )
        train_teacher(config, runtime, StopSignal())
        weights.append(load_file(config.output / "model" / "model.safetensors"))
    assert "no weights for the language model's head (lm_head.dense.bias): it is new" in caplog.text
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("family", ["causal", "seq2seq", "masked"])
def test_a_base_without_other_weights_is_refused(
    family: str, bases: Callable[[str], Path], families: Callable[..., Family], tmp_path: Path
) -> None:
    base = shutil.copytree(bases(family), tmp_path / "broken")
    name = drop_weights(base, "", containing=".1.")
    with pytest.raises(ModelError, match=r"has no weights for .*expected a whole model") as caught:
        families(family).load_network(str(base), dtype=torch.float32, new_head=True)
    assert name in str(caught.value)


@pytest.mark.parametrize("stored", ["cls.predictions.bias", "cls.predictions.decoder.bias"])
def test_a_tied_tensor_that_is_stored_under_either_name_is_there(
    stored: str, families: Callable[..., Family], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = BertForMaskedLM(BertConfig(**sizes, intermediate_size=8))
    with torch.no_grad():
        network.cls.predictions.bias.copy_(torch.arange(40.0))
    network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {stored: tensors.pop(next(name for name in tensors if name in BIASES))}
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in BIASES - {stored}},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded = families("masked").load_network(str(tmp_path), dtype=torch.float32)
    assert torch.equal(loaded.get_output_embeddings().bias, torch.arange(40.0))


def drop_weights(base: Path, prefix: str, containing: str = "") -> str:
    """Take some tensors out of a base's file, which is then no longer what a manifest says; the first one's name."""
    (base / "manifest.json").unlink(missing_ok=True)
    tensors = load_file(base / "model.safetensors")
    dropped = sorted(name for name in tensors if name.startswith(prefix) and containing in name)
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    assert dropped and kept
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    return dropped[0]
