"""Loading models and tokenizers: one-line errors, no code and no place of an author's choice, settings as they were."""

import builtins
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import change_json, leave_temporary, made_once, save_tiny_encoder

from kdecs.artifact import write_manifest
from kdecs.errors import ArtifactError, KdecsError, ModelError

transformers = pytest.importorskip("transformers")

SENTENCE = "I'm so glad that you won!"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked language model. Read-only: `model` is a copy."""
    return made_once(tmp_path_factory, "plain-encoder", lambda path: save_tiny_encoder(path, "bert"))


@pytest.fixture
def model(encoder: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(encoder, tmp_path / "encoder"))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is written by the code beside a model if it runs. A question for leave to run it is answered yes."""
    monkeypatch.setattr(builtins, "input", lambda *prompt: "y")
    return tmp_path / "marker"


def load(folder: Path) -> Any:
    """Config, tokenizer and network of a directory; the network."""
    from kdecs.models import load_config, load_pretrained, load_tokenizer

    load_config(folder)
    load_tokenizer(folder)
    return load_pretrained(transformers.AutoModelForMaskedLM, folder, "a masked language model")[0]


def add_code(folder: Path, marker: Path, **changes: object) -> None:
    """Code that Transformers would run if it were allowed to, in the way in which models on the hub bring theirs."""
    (folder / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import BertConfig as Config, BertForMaskedLM as Model, BertTokenizerFast as Tokenizer\n"
    )
    names = {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Model"}
    change_json(folder / "config.json", auto_map=names, **changes)
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]})


def test_code_that_a_model_needs_is_refused_without_a_question(model: Path, marker: Path) -> None:
    from kdecs.models import load_config, load_pretrained, load_tokenizer

    add_code(model, marker, model_type="own")
    for start in (
        load_config,
        load_tokenizer,
        lambda folder: load_pretrained(transformers.AutoModelForMaskedLM, folder, "a masked language model"),
    ):
        with pytest.raises(ModelError, match=r"asks for Python code .* never run") as caught:
            start(model)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_model_that_transformers_knows_loads_without_the_code_beside_it(
    model: Path, marker: Path, tmp_path: Path
) -> None:
    from kdecs.models import load_tokenizer, save_pretrained

    add_code(model, marker)
    save_pretrained([load(model), load_tokenizer(model)], tmp_path / "saved")
    assert not marker.exists()
    # What is trained from it does not ask for code either.
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    # In a directory of ours nobody needs such code, so that it stands for nothing good.
    write_manifest(
        model,
        "base-model",
        config_hash="c" * 64,
        inputs={},
        files=[path.name for path in model.iterdir()],
    )
    with pytest.raises(ModelError, match=r"own\.py: Python code, which kdecs never writes"):
        load(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "x"}, "Python code"),
        ("config.json", {"quantization_config": {"quant_method": "mxfp4"}}, "weights are quantised"),
        ("adapter_config.json", {"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}, "an adapter"),
        ("model.safetensors.index.json", {"weight_map": {"a": "/etc/x.safetensors"}}, "of this directory"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "of this directory"),
        ("model.safetensors.index.json", {"weight_map": {"a": "pytorch_model.bin"}}, "of this directory"),
        ("model.safetensors.index.json", {"weight_map": ["a"]}, "of this directory"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}, "elsewhere"),
    ],
)
def test_what_leads_elsewhere_is_refused(
    model: Path, name: str, change: dict[str, object], message: str
) -> None:
    path = model / name
    before = json.loads(path.read_text()) if path.is_file() else {"metadata": {}}
    path.write_text(json.dumps(before | change))
    if name == "model.safetensors.index.json":
        (model / "model.safetensors").rename(model / "x.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_links_stay_in_the_directory_or_in_the_hub_s_cache(
    encoder: Path, model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "models--someone--encoder"
    shutil.copytree(encoder, cache / "blobs")
    (cache / "snapshots" / "1").mkdir(parents=True)
    for path in (cache / "blobs").iterdir():
        (cache / "snapshots" / "1" / path.name).symlink_to(f"../../blobs/{path.name}")
    load(cache / "snapshots" / "1")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(encoder / "model.safetensors")
    with pytest.raises(ModelError, match="a link that leaves the directory; put a copy"):
        load(model)


def test_settings_choose_neither_attention_nor_files(encoder: Path, model: Path, tmp_path: Path) -> None:
    """A kernel on the hub would be fetched and run; other files of weights or words are not those that were checked."""
    import torch

    from kdecs.models import load_tokenizer

    other = save_tiny_encoder(tmp_path / "other", "bert", ["one", "two"])
    shutil.copy(other / "model.safetensors", model / "other.safetensors")
    kernel = "kernels-community/flash-attn2"
    change_json(
        model / "config.json",
        attn_implementation=kernel,
        _attn_implementation=kernel,
        experts_implementation=kernel,
        transformers_weights="other.safetensors",
        _name_or_path=str(other),
    )
    change_json(
        model / "tokenizer_config.json",
        tokenizer_file=str(other / "tokenizer.json"),
        vocab_file=str(other / "vocab.txt"),
        name_or_path=str(other),
    )
    found, expected = load(model), load(encoder)
    assert found.config._attn_implementation == expected.config._attn_implementation
    assert all(
        torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items()
    )
    assert load_tokenizer(model)(SENTENCE)["input_ids"] == load_tokenizer(encoder)(SENTENCE)["input_ids"]


def set_in(*keys: str | int, value: object) -> Callable[[Any], object]:
    """A change of a JSON value: put `value` under nested keys."""

    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


ENDLESS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", "[]"),
        ("config.json", '{"a": ' * 100_000),
        ("config.json", '{"vocab_size": NaN}'),
        ("config.json", b"\xff\xfe"),
        ("config.json", set_in("hidden_size", value="32")),
        ("config.json", set_in("hidden_size", value=[])),
        ("config.json", set_in("num_attention_heads", value=0)),
        ("config.json", set_in("num_hidden_layers", value=10**7)),
        ("config.json", set_in("num_hidden_layers", value=5000)),
        ("config.json", set_in("num_labels", value=10**9)),
        ("config.json", set_in("text_config", value={"num_layers": 10**9})),
        ("config.json", set_in("vocab_size", value=10**9)),
        ("config.json", set_in("intermediate_size", value=10**8)),
        ("config.json", set_in("model_type", value=None)),
        ("config.json", set_in("model_type", value=[])),
        ("config.json", set_in("quantization_config", value="x")),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", set_in("mask_token", value={"content": 5})),
        ("tokenizer_config.json", set_in("tokenizer_class", value=7)),
        ("tokenizer.json", ""),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", set_in("model", value=[])),
        ("tokenizer.json", set_in("added_tokens", value={"a": 1})),
        ("tokenizer.json", set_in("model", "vocab", value={"a": -1})),
        ("tokenizer.json", set_in("pre_tokenizer", value=ENDLESS)),
        ("tokenizer.json", set_in("post_processor", "special_tokens", value={})),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 16),
    ],
)
def test_hostile_files_are_one_line_and_soon(
    model: Path, name: str, change: str | bytes | Callable[[Any], object], capfd: pytest.CaptureFixture[str]
) -> None:
    path = model / name
    if callable(change):
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load(model)
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert "panicked" not in capfd.readouterr().err


def test_a_base_is_what_its_manifest_says(model: Path) -> None:
    files = [path.name for path in model.iterdir()]
    write_manifest(model, "base-model", config_hash="c" * 64, inputs={}, files=files)
    load(model)
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="does not list this file"):
        load(model)
    (model / "generation_config.json").unlink()
    write_manifest(model, "teacher", config_hash="c" * 64, inputs={}, files=files)
    load(model)  # a teacher's directory holds its tokenizer, too
    change_json(model / "config.json", hidden_act="relu")
    with pytest.raises(KdecsError, match=r"config\.json: .*manifest says"):
        load(model)


def test_what_cannot_be_loaded_is_one_line_and_the_noise_comes_back(tmp_path):
    from transformers.utils import logging

    from kdecs.models import load_pretrained, load_tokenizer

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    for reference in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ModelError, match=f"tokenizer {reference}: cannot be loaded: ") as caught:
            load_tokenizer(reference)
        assert "\n" not in str(caught.value)
        with pytest.raises(ModelError, match=f"model {reference}: cannot be loaded as causal: ") as caught:
            load_pretrained(transformers.AutoModelForCausalLM, reference, "causal")
        assert "\n" not in str(caught.value)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_name_that_is_neither_here_nor_on_the_hub_says_both(monkeypatch) -> None:
    from kdecs.models import _loading

    monkeypatch.setattr("kdecs.models.HF_HUB_OFFLINE", False)
    with (
        pytest.raises(ModelError, match=r"no such directory here, .*\(no route\); make models fetches"),
        _loading("model models/mine: cannot be loaded", "models/mine"),
    ):
        raise OSError("no route")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_saved_is_whole_and_has_the_mode_of_other_files(
    encoder: Path, tmp_path: Path, umask: int
) -> None:
    """safetensors makes files that their owner alone may read, in whichever way it likes."""
    from kdecs.models import save_pretrained

    parts = [load(encoder), transformers.AutoTokenizer.from_pretrained(encoder)]
    leave_temporary(tmp_path / "model" / "saved")
    before = os.umask(umask)
    try:
        names = save_pretrained(parts, tmp_path / "model")
    finally:
        os.umask(before)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert files == dict.fromkeys(names, 0o666 & ~umask)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
