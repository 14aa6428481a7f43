"""Two ranks train the baseline that one rank trains."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import change_json, run_forked_ranks

from kdecs.artifact import verify_artifact
from kdecs.baselines.training import train_baseline

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SYSTEMS = {
    "ecpe-2d": {"hidden_size": 16, "pair_size": 12, "dropout": 0.0},
    "kec": {"hidden_size": 16, "layers": 2, "dropout": 0.0},
    "ueca-prompt": {"max_utterances": 12, "window": None},
    "mrc": {},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_two_ranks_train_what_one_trains(make_config, runtime, base, tmp_path, name):
    plain = shutil.copytree(base, tmp_path / "plain")
    # Each rank draws different dropout masks, so the losses are equal only without dropout.
    change_json(plain / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    groups = {
        "system": {"name": name, **SYSTEMS[name]},
        "model": {"base": str(plain)},
        # Of 6 dialogues: shares of 3, and of 2 with one that only pads; then one dialogue, and a share of padding.
        "batches": {"global_batch_dialogues": 5},
        "optimization": {"learning_rate": 3e-4, "epochs": 1},
    }
    if name == "mrc":
        groups |= {"model": {"base": str(plain), "max_tokens": 200}, "batches": {"global_batch_pairs": 31}}
    elif name == "ueca-prompt":
        groups["task"] = "ecpe"
    alone, together = make_config("alone", **groups), make_config("together", **groups)
    train_baseline(alone, runtime)
    path = tmp_path / "config.json"
    path.write_text(together.model_dump_json())
    done = run_forked_ranks("launch/train_baseline.py", "--config", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training on") == 1 and verify_artifact(together.output) == []
    for file in ("model/model.safetensors", "heads.safetensors"):
        if (alone.output / file).exists():
            expected, found = load_file(alone.output / file), load_file(together.output / file)
            # A constant on all tokens' logits changes no softmax: Adam makes steps of the rounding of its gradient, 0.
            for tensors in (expected, found):
                tensors.pop("qa_outputs.bias", None)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    expected, found = (json.loads((c.output / "metrics.jsonl").read_text()) for c in (alone, together))
    losses = [key for key in expected if key.endswith("_loss")]
    assert {key: found[key] for key in losses} == pytest.approx(
        {key: expected[key] for key in losses}, rel=1e-5
    )
