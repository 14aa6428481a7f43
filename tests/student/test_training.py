"""Training end to end on a tiny base."""

import json


def test_kd_training_writes_a_complete_student(make_config, runtime):
    from kdecs.artifact import verify_artifact
    from kdecs.student.training import train_student

    config = make_config()
    out = train_student(config, runtime)
    assert verify_artifact(out) == []
    print((out / "metrics.jsonl").read_text(), json.loads((out / "manifest.json").read_text()))
