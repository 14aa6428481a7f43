"""The committed configs of students parse, and the refusals name the key."""

from pathlib import Path

import pytest

from kdecs.config import load_config
from kdecs.errors import ConfigError
from kdecs.student.config import StudentConfig

CONFIGS = sorted((Path(__file__).parents[2] / "launch/configs/student").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_committed_config_parses(path: Path):
    config = load_config(StudentConfig, path)
    assert config.output.is_absolute()


def test_the_papers_settings_stand_in_kd():
    config = load_config(StudentConfig, next(path for path in CONFIGS if path.stem == "kd"))
    assert (config.distillation.alpha, config.distillation.temperature) == (0.6, 2.0)
    assert (config.optimization.learning_rate, config.batches.global_batch_pairs) == (1e-5, 16)
    assert (config.model.base, config.model.span_head) == ("roberta-base", "position")


def test_kd_without_labels_is_refused():
    with pytest.raises(ConfigError, match="kd needs labels"):
        load_config(StudentConfig, CONFIGS[0], ["distillation.mode=kd", "distillation.labels=null"])
