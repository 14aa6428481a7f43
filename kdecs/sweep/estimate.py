"""What a sweep will take: measured where a like student was trained before, else by arithmetic, and which of the two.

Arithmetic: 6 · parameters · tokens operations a training step (2 forward, 4 backward), tokens by characters. It is the
order of magnitude that decides whether a sweep is started, not its end to the hour.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kdecs.artifact import is_complete
from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.splits import training_dialogues
from kdecs.errors import KdecsError
from kdecs.run_record import METRICS_NAME, read_points
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.space import Trial
from kdecs.sweep.store import find_student
from kdecs.sweep.trial import read_status

_CHARACTERS_A_TOKEN = 4.0
_GPU_TFLOPS = 40.0  # what a data-centre GPU keeps up in such a training, not its peak
_CORE_TFLOPS = 0.03
_PARAMETERS = {"roberta-base": 0.125e9, "roberta-large": 0.355e9, "bert-base-uncased": 0.11e9}
_USUAL_PARAMETERS = 0.125e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hours of one trial after another, and where the figure comes from."""

    seconds: float
    source: str


def estimate_left(config: SweepConfig, trials: Sequence[Trial], left: Sequence[Trial]) -> Estimate:
    """What the trials in `left` take, summed. `trials` are all of the sweep: complete ones are the measure."""
    measured = [rate for trial in trials if (rate := _seconds_an_epoch(config, trial)) is not None]
    if measured:
        mean = sum(measured) / len(measured)
        seconds = sum(mean * trial.config.optimization.epochs for trial in left)
        return Estimate(seconds, f"measured: {len(measured)} trials, {mean:.1f} s an epoch")
    tflops = config.effective_tflops or (
        _GPU_TFLOPS * config.gpus_per_trial if config.gpus_per_trial else _CORE_TFLOPS * config.cpus_per_trial
    )
    seconds = sum(_operations(trial) for trial in left) / (tflops * 1e12)
    return Estimate(seconds, f"arithmetic: {tflops:g} TFLOP/s a trial (set effective_tflops), all epochs")


def _seconds_an_epoch(config: SweepConfig, trial: Trial) -> float | None:
    store = config.store or config.output.parent / "students"
    places = [trial.directory if is_complete(trial.directory, "student", trial.config_hash) else None]
    places.append(find_student(store, trial.config_hash) if trial.config_hash else None)
    for place in places:
        status = read_status(place) if place else None
        points = read_points(place / METRICS_NAME) if place else []
        if status and status.seconds and points:
            return status.seconds / len(points)
    return None


def _operations(trial: Trial) -> float:
    config = trial.config
    tokens = _training_tokens(config.corpus.model_dump_json(), config.model.max_prompt_tokens)
    return 6 * _parameters(config.model.base) * tokens * config.optimization.epochs


@cache
def _training_tokens(corpus: str, longest: int) -> float:
    """Tokens of an epoch, from the characters of every pair's prompt; 0 where the corpus cannot be read yet."""
    try:
        dialogues = training_dialogues(CorpusConfig.model_validate_json(corpus))
    except KdecsError:
        return 0.0
    total = 0.0
    for dialogue in dialogues:
        lengths = [len(utterance.text) for utterance in dialogue.utterances]
        for pair in pairs_of(dialogue, "fold1+neutral"):
            characters = sum(lengths[: pair.target]) + lengths[pair.candidate - 1] + 120
            total += min(characters / _CHARACTERS_A_TOKEN, longest)
    return total


@cache
def _parameters(base: str) -> float:
    """Parameters of a base by its config or weights, or by name."""
    folder = Path(base)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if weights:
        config = folder / "config.json"
        dtype = json.loads(config.read_text(encoding="utf-8")).get("dtype") if config.is_file() else None
        return weights / (2 if dtype in ("bfloat16", "float16") else 4)
    return _PARAMETERS.get(folder.name, _USUAL_PARAMETERS)
