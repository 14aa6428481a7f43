"""Every kind of adapter that PEFT makes: a teacher gives the logits of plain PEFT, or the import refuses it."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig, KasaConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import ModelError, TrainingError
from kdecs.process import StopSignal
from kdecs.runtime import Runtime
from kdecs.teacher.config import LoraConfig as OurLora
from kdecs.teacher.families import Family
from kdecs.teacher.importing import AdapterImport, import_adapter
from kdecs.teacher.network import TOLERANCES, TeacherNetwork, add_lora
from kdecs.teacher.product import save_product
from kdecs.teacher.scoring import TeacherScorer, fold_adapter, load_partitioned

AUTO = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "masked": AutoModelForMaskedLM}
LAYERS = {"causal": ["q_proj", "v_proj"], "seq2seq": ["q", "v"], "masked": ["query", "value"]}
HEAD = {"causal": "lm_head", "seq2seq": "lm_head", "masked": "decoder"}
EMBEDDING = {"causal": "embed_tokens", "seq2seq": "shared", "masked": "word_embeddings"}
NORM = {"causal": "norm", "seq2seq": "final_layer_norm", "masked": "LayerNorm"}
ADDED = 3


def kinds(family: str) -> dict[str, dict[str, Any]]:
    """LoRA's variants, as changes of a plain one."""
    layers, head, embedding = LAYERS[family], HEAD[family], EMBEDDING[family]
    return {
        "plain": {},
        "rank-stabilised": {"use_rslora": True},
        "dora": {"use_dora": True},
        "kasa": {"kasa_config": KasaConfig()},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "all linear layers but one": {"target_modules": "all-linear", "exclude_modules": [layers[0]]},
        "pattern": {"target_modules": rf".*\.{layers[0]}"},
        "ranks and alphas by layer": {"rank_pattern": {layers[0]: 3}, "alpha_pattern": {layers[1]: 20}},
        "biases": {"bias": "all"},
        "a bias of the adapter": {"lora_bias": True},
        "parameters": {"target_parameters": [f"{layers[1]}.weight"], "target_modules": [layers[0]]},
        "trained head": {"modules_to_save": [head]},
        "trained embedding": {"modules_to_save": [embedding]},
        "trained norms": {"modules_to_save": [NORM[family]]},
        "head": {"target_modules": [*layers, head]},
        "embedding": {"target_modules": [*layers, embedding]},
        "embedding alone": {"target_modules": [embedding]},
        "head with dora": {"target_modules": [head], "use_dora": True},
        "head and embedding, tied": {
            "target_modules": [*layers, embedding],
            "ensure_weight_tying": True,
        },
        "rows of the embedding": {"trainable_token_indices": {embedding: [5, 9, 70]}},
    }


ONLY_CAUSAL = {
    "layers": {"layers_to_transform": [0]},
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
}
# Those that a fold, tied embeddings or PEFT's own way of loading can spoil; the others and families take longer.
ALWAYS = {
    *(
        "plain",
        "dora",
        "pissa",
        "a bias of the adapter",
        "trained head",
        "trained embedding",
        "head",
        "embedding",
    ),
    *("embedding alone", "head and embedding, tied", "rows of the embedding", "repeated layers"),
}
CASES = [
    pytest.param(family, kind, marks=[] if family == "causal" and kind in ALWAYS else [pytest.mark.slow])
    for family in AUTO
    for kind in [*kinds(family), *(ONLY_CAUSAL if family == "causal" else ())]
]


@pytest.fixture(scope="module")
def one_dialogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dialogue = next(iter(json.loads(bundled_sample("valid").read_text()).items()))
    path = tmp_path_factory.mktemp("one") / "one.json"
    path.write_text(json.dumps(dict([dialogue])))
    return path


@pytest.fixture(scope="module")
def pairs(one_dialogue: Path) -> list[Pair]:
    (dialogue,) = read_corpus(one_dialogue).dialogues
    return pairs_of(dialogue, "fold1")[:4]


def save_adapter(base: Any, directory: Path, **changes: Any) -> None:
    """An adapter as any PEFT script makes one, trained by chance."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter) * (parameter.abs().mean() + 1)
        model.save_pretrained(directory)


@torch.no_grad()
def plain_logits(family: Family, base: Any, adapter: Path, pairs: list[Pair]) -> np.ndarray:
    """Oracle: the adapter through PEFT's own forward, prompt by prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    rows = []
    for pair in pairs:
        prompt = family.encode(pair)
        inputs = {"input_ids": torch.from_numpy(prompt.tokens.astype(np.int64))[None]}
        if family.name == "seq2seq":
            start = model.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.tensor([[start, family.sentinel_id]])  # type: ignore[attr-defined]
        rows.append(model(**inputs).logits[0, prompt.answer, family.answer_ids].float())
    return torch.stack(rows).numpy()


@pytest.fixture
def imported(
    bases: Callable[[str], Path], runtime: Runtime, one_dialogue: Path, tmp_path: Path
) -> Callable[..., Path]:
    def run(adapter: Path, family: str, base: Path | None = None) -> Path:
        wanted = AdapterImport(
            adapter=adapter,
            base=str(base or bases(family)),
            family=family,
            output=tmp_path / "teacher",
            train=one_dialogue,
            valid=one_dialogue,
            max_prompt_tokens=400,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_adapter(wanted, runtime, dtype="float32")
        return tmp_path / "teacher"

    return run


def assert_scores_as_peft(
    teacher: Path,
    adapter: Path,
    family: Family,
    make: Callable[..., Any],
    pairs: list[Pair],
    runtime: Runtime,
) -> None:
    for dtype in ("float32", "bfloat16"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scorer = TeacherScorer.load(teacher, runtime=runtime, dtype=dtype, micro_batch_tokens=2048)
        expected = plain_logits(family, make(dtype=getattr(torch, dtype)), adapter, pairs)
        tolerance = TOLERANCES[getattr(torch, dtype)] * np.abs(expected).max()
        np.testing.assert_allclose(scorer.score(pairs)[0], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_teacher_gives_the_logits_of_plain_peft(
    family: str,
    kind: str,
    bases: Callable[[str], Path],
    families: Callable[..., Family],
    imported: Callable[..., Path],
    pairs: list[Pair],
    runtime: Runtime,
    tmp_path: Path,
) -> None:
    def base(**options: Any) -> Any:
        return AUTO[family].from_pretrained(bases(family), **options)

    torch.manual_seed(0)
    changes = {"target_modules": LAYERS[family], **(kinds(family) | ONLY_CAUSAL)[kind]}
    save_adapter(base(), tmp_path / "adapter", **changes)
    teacher = imported(tmp_path / "adapter", family)
    assert_scores_as_peft(teacher, tmp_path / "adapter", families(family), base, pairs, runtime)


OTHER_KINDS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"total_step": 10},
    "BOFTConfig": {"boft_block_size": 4},
    "FourierFTConfig": {"n_frequency": 8},
    "HRAConfig": {},
    "IA3Config": {"feedforward_modules": []},
    "LNTuningConfig": {"target_modules": ["norm"]},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "OFTConfig": {"oft_block_size": 4},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "RoadConfig": {"group_size": 8},
    "TrainableTokensConfig": {"target_modules": ["embed_tokens"], "token_indices": [3]},
    "VeraConfig": {"r": 4},
}


def test_adapters_that_are_no_lora_are_refused_in_one_line(
    bases: Callable[[str], Path], imported: Callable[..., Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(bases("causal"))
    for name, values in OTHER_KINDS.items():
        is_prompt = "num_virtual_tokens" in values
        targets = {} if is_prompt else {"target_modules": LAYERS["causal"]}
        config = getattr(peft, name)(**{"task_type": "CAUSAL_LM", **targets, **values})
        if name == "BOFTConfig":
            # For its layers PEFT compiles CUDA code. Where that fails it leaves another compiler in the environment.
            config.save_pretrained(tmp_path / name)
            save_file({"some": torch.zeros(1)}, tmp_path / name / "adapter_model.safetensors")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(base, config)
                model.save_pretrained(tmp_path / name)
                base = model.get_base_model() if is_prompt else model.unload()
        with pytest.raises(
            ModelError, match=f"peft_type is {config.peft_type.value!r}, expected 'LORA'"
        ) as caught:
            imported(tmp_path / name, "causal")
        assert "\n" not in str(caught.value)


def test_loras_that_act_on_some_tokens_only_are_refused_in_one_line(
    bases: Callable[[str], Path], imported: Callable[..., Path], tmp_path: Path
) -> None:
    save_adapter(
        AutoModelForCausalLM.from_pretrained(bases("causal")),
        tmp_path / "adapter",
        target_modules=LAYERS["causal"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=[5, 6],
    )
    with pytest.raises(ModelError, match=r"alora_invocation_tokens is set, .*; train it without"):
        imported(tmp_path / "adapter", "causal")
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text()) | {
        "alora_invocation_tokens": None,
        "arrow_config": vars(ArrowConfig()),
    }
    path.write_text(json.dumps(values, default=list))
    with pytest.raises(ModelError, match="arrow_config is set"):
        imported(tmp_path / "adapter", "causal")


ADDED_CASES: dict[str, dict[str, Any]] = {
    "saved by itself": {},
    "trained embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained embedding": {"modules_to_save": ["embed_tokens"]},
    "rows": {"trainable_token_indices": [5, 6]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("kind", ADDED_CASES)
def test_an_adapter_with_added_tokens_brings_their_rows(
    kind: str,
    bases: Callable[[str], Path],
    families: Callable[..., Family],
    imported: Callable[..., Path],
    pairs: list[Pair],
    runtime: Runtime,
    tmp_path: Path,
) -> None:
    def base(**options: Any) -> Any:
        network = AutoModelForCausalLM.from_pretrained(bases("causal"), **options)
        network.resize_token_embeddings(network.config.vocab_size + ADDED, mean_resizing=False)
        return network

    torch.manual_seed(0)
    save_adapter(base(), tmp_path / "adapter", **({"target_modules": ["q_proj"]} | ADDED_CASES[kind]))
    teacher = imported(tmp_path / "adapter", "causal")
    assert_scores_as_peft(teacher, tmp_path / "adapter", families("causal"), base, pairs, runtime)


def test_added_tokens_whose_rows_are_not_there_are_explained(
    bases: Callable[[str], Path], imported: Callable[..., Path], tmp_path: Path
) -> None:
    for kind in ("embedding", "head", "trained embedding"):
        network = AutoModelForCausalLM.from_pretrained(bases("causal"))
        rows = network.config.vocab_size
        network.resize_token_embeddings(rows + ADDED, mean_resizing=False)
        adapter = tmp_path / kind
        save_adapter(network, adapter, **({"target_modules": ["q_proj"]} | ADDED_CASES[kind]))
        path = adapter / "adapter_model.safetensors"
        held = {
            name: tensor
            for name, tensor in load_file(path).items()
            if "lora_" in name or (kind == "trained embedding" and name.endswith("model.embed_tokens.weight"))
        }
        save_file(held, path)
        with pytest.raises(
            ModelError, match=f"{rows + ADDED} rows of embeddings, whereas .* has {rows}, .*; save the"
        ):
            imported(adapter, "causal")


def test_an_adapter_that_was_never_trained_is_told_by_all_its_products(
    bases: Callable[[str], Path], imported: Callable[..., Path], tmp_path: Path
) -> None:
    for targets in (["q_proj"], ["embed_tokens"]):
        base = AutoModelForCausalLM.from_pretrained(bases("causal"))
        adapter = tmp_path / targets[0]
        get_peft_model(base, LoraConfig(r=2, target_modules=targets)).save_pretrained(
            adapter, save_embedding_layers=False
        )
        with pytest.raises(TrainingError, match="so it does nothing; train it again"):
            imported(adapter, "causal")


@pytest.mark.parametrize("family", AUTO)
def test_own_lora_on_tied_embeddings_is_saved_without_them_and_scores_the_same(
    family: str,
    bases: Callable[[str], Path],
    families: Callable[..., Family],
    pairs: list[Pair],
    runtime: Runtime,
    tmp_path: Path,
) -> None:
    ours = families(family)
    targets = (LAYERS[family][0], HEAD[family], EMBEDDING[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = add_lora(
            ours.load_network(str(bases(family)), dtype=torch.float32),
            OurLora(rank=4, targets=targets),
            ours.lora_task,
        )
        torch.manual_seed(0)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.3)
        save_product(network, tmp_path / "product", runtime, zero_stage=0)
        names = load_file(tmp_path / "product" / "adapter_model.safetensors")
        assert all("lora_" in name for name in names)
        base = AUTO[family].from_pretrained(bases(family))
        expected = plain_logits(ours, base, tmp_path / "product", pairs)
    for folded in (network, fold_adapter(network)):
        teacher = TeacherNetwork(ours, folded, use_tree=False, device=runtime.device).eval()
        with torch.no_grad():
            found = teacher([ours.encode(pair) for pair in pairs])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.slow
def test_a_partitioned_teacher_scores_as_a_whole_one_or_says_how(
    bases: Callable[[str], Path],
    imported: Callable[..., Path],
    pairs: list[Pair],
    runtime: Runtime,
    group: None,
    tmp_path: Path,
) -> None:
    def load(teacher: Path) -> TeacherScorer:
        options = {"runtime": runtime, "dtype": "float32", "micro_batch_tokens": 2048}
        return load_partitioned(teacher, stop=StopSignal(), persistence_threshold=0, **options)[0]

    for kind, is_served in (
        ("trained head", True),
        ("head", True),
        ("embedding", True),
        ("head with dora", False),
        ("head and embedding, tied", False),
    ):
        base = AutoModelForCausalLM.from_pretrained(bases("causal"))
        changes = {"target_modules": LAYERS["causal"], **kinds("causal")[kind]}
        save_adapter(base, tmp_path / kind, **changes)
        teacher = imported(tmp_path / kind, "causal")
        whole = TeacherScorer.load(teacher, runtime=runtime, dtype="float32", micro_batch_tokens=2048)
        if is_served:
            np.testing.assert_allclose(load(teacher).score(pairs)[0], whole.score(pairs)[0], atol=2e-4)
        else:
            with pytest.raises(ModelError, match="engine=replica") as caught:
                load(teacher)
            assert "\n" not in str(caught.value)
        shutil.rmtree(teacher)
