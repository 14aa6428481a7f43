"""Every part that labels depend on shows in their lineage, and nothing else does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdecs.artifact import Manifest, write_manifest
from kdecs.config import parse_config
from kdecs.teacher import product as lineage
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.families import Family
from kdecs.teacher.product import lineage_of

FILES = {
    "adapter_model.safetensors": "weights",
    "adapter_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "config.json": "{}",
    "metrics.jsonl": "",
}


def make(directory: Path, **changes: str) -> Manifest:
    directory.mkdir()
    for name, text in (FILES | {key.replace("__", "."): value for key, value in changes.items()}).items():
        (directory / name).write_text(text)
    return write_manifest(directory, "teacher", config_hash="0", inputs={"base": "b" * 64}, files=FILES)


@pytest.fixture
def config() -> TeacherConfig:
    values = {"name": "x", "output": "x", "corpus": {"train": "x", "valid": "x"}}
    return parse_config(
        TeacherConfig, values | {"model": {"family": "causal", "base": "hub/name"}}, source="test"
    )


def test_what_changes_shows_where_it_belongs(
    families: Callable[[str], Family],
    config: TeacherConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = families("causal")
    first = lineage_of(tmp_path / "a", make(tmp_path / "a"), config, family, dtype="float32")
    again = lineage_of(tmp_path / "b", make(tmp_path / "b"), config, family, dtype="float32")
    assert first == again

    def changed(name: str, **changes: str) -> set[str]:
        found = lineage_of(tmp_path / name, make(tmp_path / name, **changes), config, family, dtype="float32")
        return {key for key in first if found[key] != first[key]}

    assert changed("weights", adapter_model__safetensors="other") == {"teacher", "adapter"}
    assert changed("lora", adapter_config__json='{"r": 2}') == {"teacher", "adapter"}
    assert changed("tokenizer", tokenizer__json="[]") == {"teacher", "tokenizer"}
    assert changed("metrics", metrics__jsonl="{}") == {"teacher"}
    fine = config.model_copy(update={"emotions_shown": "fine"})
    found = lineage_of(tmp_path / "a", make(tmp_path / "c"), fine, family, dtype="bfloat16")
    assert {key for key in first if found[key] != first[key]} == {"emotions_shown", "dtype"}
    other_ids = SimpleNamespace(
        name=family.name,
        layout=family.layout,
        separator=family.separator,
        answer_suffix=family.answer_suffix,
        answer_ids=[n + 1 for n in family.answer_ids],
    )
    found = lineage_of(tmp_path / "a", make(tmp_path / "d"), config, other_ids, dtype="float32")
    assert {key for key in first if found[key] != first[key]} == {"answer_words"}
    plain = lineage.teacher_prompt

    def reworded(*arguments: object, **values: object) -> object:
        prompt = plain(*arguments, **values)
        return replace(prompt, text=prompt.text.replace("connective", "linking"))

    monkeypatch.setattr(lineage, "teacher_prompt", reworded)
    found = lineage_of(tmp_path / "a", make(tmp_path / "e"), config, family, dtype="float32")
    assert {key for key in first if found[key] != first[key]} == {"prompt_template"}


def test_families_have_templates_of_their_own(families: Callable[[str], Family]) -> None:
    digests = {lineage.template_digest(families(name)) for name in ("causal", "seq2seq", "masked")}
    tree = families("masked")
    tree.layout = "tree"  # whose prompts are cut in another way
    assert len({*digests, lineage.template_digest(tree)}) == 4
