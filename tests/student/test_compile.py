"""A compiled encoder: traced with symbolic lengths, the same student in the same files."""

import pytest
import torch
from safetensors.torch import load_file

from kdecs.config import config_hash
from kdecs.student.training import train_student


@pytest.mark.slow
def test_a_compiled_training_gives_the_student_of_a_plain_one(make_config, runtime, plain_base, monkeypatch):
    """With Dynamo's tracing but without a code generator, so that every operation is the plain one's."""
    asked: list[dict[str, object]] = []
    whole = torch.nn.Module.compile

    def traced(module: torch.nn.Module, **options: object) -> None:
        asked.append(options)
        whole(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    groups = {
        "model": {"base": str(plain_base), "max_prompt_tokens": 256},
        "batches": {"global_batch_pairs": 50},  # two steps of unlike lengths: tracing is what takes time
        "optimization": {"learning_rate": 1e-3, "epochs": 1},
    }
    plain = make_config("plain", **groups)
    compiled = make_config("compiled", compile=True, **groups)
    assert config_hash(plain) == config_hash(compiled)
    train_student(plain, runtime)
    train_student(compiled, runtime)
    assert asked == [{"dynamic": True}]
    for file in ("model/model.safetensors", "heads.safetensors"):
        expected, found = load_file(plain.output / file), load_file(compiled.output / file)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4)
