"""Fine-tuning on answers under DeepSpeed, and prediction with the product: resumes, ranks, and what it learns."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import StopAfter, assert_same_weights, run_forked_ranks

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.baselines.generative import prediction
from kdecs.baselines.generative.answers import gold_answer, predictions_of
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.baselines.generative.prediction import GenerativeBaseline, answer_corpus
from kdecs.baselines.generative.record import AnswerRecord
from kdecs.baselines.generative.training import train_generative
from kdecs.config import config_hash
from kdecs.corpus.reading import read_corpus
from kdecs.errors import ArtifactError, ConfigError, Stopped
from kdecs.evaluation.metrics import SCORE_KEYS
from kdecs.evaluation.predictions import read_predictions
from kdecs.process import StopSignal
from kdecs.runtime import Runtime
from kdecs.teacher.metering import tuning_record


def points(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [point["train_loss"] for point in points(output)]


def scores(output: Path) -> list[dict[str, float]]:
    """What each validation found, without the loss, which is never equal to the last digit."""
    keys = {*SCORE_KEYS, "faulty_answers"}
    return [
        {key: point[key] for key in keys & point.keys()} for point in points(output) if "macro_f1" in point
    ]


@pytest.mark.slow
def test_a_stopped_training_and_prediction_go_on_exactly(
    make_config: Callable[..., GenerativeConfig],
    runtime: Runtime,
    group: None,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = train_generative(
        make_config("straight", answered_share=1, validate_per_epoch=2), runtime, StopSignal()
    )
    config = make_config("stopped", answered_share=1, validate_per_epoch=2)
    with pytest.raises(Stopped, match="generative test: stopped at step 2 of"):
        train_generative(config, runtime, StopAfter(2))
    train_generative(config, runtime, StopSignal())
    assert_same_weights(straight, config.output)
    assert losses(straight) == losses(config.output)
    assert len(scores(straight)) > 1 and scores(straight) == scores(config.output)
    name = "valid-predictions.jsonl"
    assert (straight / name).read_bytes() == (config.output / name).read_bytes()
    assert not verify_artifact(config.output)
    details = read_manifest(straight, "generative").details
    assert details["batching"] == "tree" and "neutral" in details["labels"]
    assert not verify_artifact(straight)
    record = tuning_record(config, "generative", "fold1+neutral", config_hash(config))
    assert record.model is not None and record.model.kind == "generative"
    assert record.points[-1]["valid_loss"] < record.points[0]["train_loss"]
    assert record.points[-1]["macro_f1"] == scores(straight)[-1]["macro_f1"]

    corpus = read_corpus(few)
    num_targets = sum(len(dialogue.utterances) for dialogue in corpus.dialogues)
    baseline = GenerativeBaseline.load(straight, runtime=runtime)
    baseline.model.family.max_answer_tokens = 2
    asked: list[tuple[str, int]] = []
    real = prediction.Decoder.answers

    def answers(self: prediction.Decoder, dialogue: object, targets: list[int], **options: int) -> list[str]:
        asked.extend((dialogue.id, target) for target in targets)
        return real(self, dialogue, targets, **options)

    monkeypatch.setattr(prediction.Decoder, "answers", answers)

    def answer(name: str, rank: Runtime, stop: StopSignal) -> prediction.Outcome:
        record = AnswerRecord(tmp_path / name)
        return answer_corpus(baseline, corpus.dialogues, record, batch_tokens=4096, runtime=rank, stop=stop)

    whole = answer("one.jsonl", runtime, StopSignal())
    assert (whole.num_answers, whole.num_missing) == (num_targets, 0)
    assert whole.faults["not in the form"] == num_targets  # two tokens are no answer
    asked.clear()
    ranks = [replace(runtime, rank=rank, world_size=2) for rank in range(2)]
    first = answer("two.jsonl", ranks[1], StopSignal())
    assert 0 < first.num_missing < num_targets
    with pytest.raises(Stopped, match="run the same command again"):
        answer("two.jsonl", ranks[0], StopAfter(0))
    second = answer("two.jsonl", ranks[0], StopSignal())
    assert sorted(asked) == sorted({(d.id, u.turn) for d in corpus.dialogues for u in d.utterances})
    assert second == whole


FIVE = (
    (("A", "We won the game today !", "happiness", {1: "We won the game"}),
     ("B", "Congratulations , I am so glad .", "happiness", {1: "We won the game", 2: "I am so glad"})),
    (("A", "My bike was stolen last night .", "sadness", {1: "My bike was stolen"}),
     ("B", "Did you call the police ?", "neutral", {})),
    (("A", "There is a spider on your coat .", "neutral", {}),
     ("B", "Take it away , please !", "fear", {1: "a spider on your coat"})),
    (("A", "You are late again , and you forgot the keys .", "anger", {1: "You are late again"}),
     ("B", "I am sorry , the bus broke down .", "sadness", {1: "you forgot the keys", 2: "the bus broke down"})),
    (("A", "Guess who called me this morning .", "neutral", {}),
     ("B", "Your old teacher ? I don't believe it !", "surprise", {1: "who called me", 2: "Your old teacher"})),
)  # fmt: skip
"""Five dialogues: speaker, text, emotion, and the span in each turn that is a cause."""


def five_dialogues(path: Path, copies: int) -> Path:
    """A corpus file with so many copies of each."""
    raw = {}
    for number, lines in enumerate(FIVE, start=1):
        utterances = [
            {"turn": turn, "speaker": speaker, "utterance": text, "emotion": emotion}
            | ({"expanded emotion cause evidence": list(causes), "expanded emotion cause span": [*causes.values()]}
               if causes else {})
            for turn, (speaker, text, emotion, causes) in enumerate(lines, start=1)
        ]  # fmt: skip
        raw |= {f"d{number}_{copy}": [utterances] for copy in range(copies)}
    path.write_text(json.dumps(raw))
    return path


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return five_dialogues(tmp_path_factory.mktemp("five") / "five.json", 1)


@pytest.fixture(scope="module")
def by_heart(
    config_of: Callable[..., GenerativeConfig],
    runtime: Runtime,
    group: None,
    five: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The directory of a training that has learnt the five dialogues by heart."""
    folder = tmp_path_factory.mktemp("by-heart")
    # A pass over thirty copies, since each pass ends with a validation and a checkpoint.
    copies = five_dialogues(folder / "train.json", 30)
    config = config_of(
        folder / "out",
        five,
        train=copies,
        lora=None,
        batches={"global_batch_pairs": 10, "micro_batch_tokens": 4096, "max_prompt_tokens": 1024},
        optimization={"learning_rate": 0.004, "warmup_share": 0.1, "epochs": 3},
        max_answer_tokens=128,
        answered_share=1,
    )
    return train_generative(config, runtime, StopSignal())


@pytest.mark.slow
def test_it_learns_five_dialogues_by_heart(
    by_heart: Path, five: Path, runtime: Runtime, tmp_path: Path
) -> None:
    baseline = GenerativeBaseline.load(by_heart, runtime=runtime)
    corpus = read_corpus(five)
    dialogues = corpus.dialogues
    record = AnswerRecord(tmp_path / "answers.jsonl")
    found = answer_corpus(baseline, dialogues, record, batch_tokens=4096, runtime=runtime, stop=StopSignal())
    assert not found.faults and found.num_answers == 10
    gold = [
        prediction
        for dialogue in dialogues
        for turn in (1, 2)
        for prediction in predictions_of(gold_answer(dialogue, turn), dialogue, turn)
    ]
    assert found.predictions == gold
    # Its validations said so, and they chose the product.
    by_key = {each.key: each for each in gold}
    assert baseline.predict_pairs(corpus) == by_key
    assert read_predictions(by_heart / "valid-predictions.jsonl", corpus) == by_key
    details = read_manifest(by_heart, "generative").details
    assert details["valid"]["macro_f1"] == details["valid"]["emotion_accuracy"] == 100
    assert details["valid"]["faulty_answers"] == 0 and details["valid_answers"] == 10
    first_best = max(points(by_heart), key=lambda point: point.get("macro_f1", -1))
    assert details["best_step"] == first_best["step"]


def test_other_directories_and_settings_are_refused(
    make_config: Callable[..., GenerativeConfig], runtime: Runtime, base: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        GenerativeBaseline.load(base, runtime=runtime)
    with pytest.raises(ConfigError, match=r"takes more than half of batches\.max_prompt_tokens"):
        make_config(max_answer_tokens=600)


def rank_values(config: GenerativeConfig, output: Path, stage: int, directory: Path) -> Path:
    values = config.model_dump(mode="json") | {"output": str(output)}
    values["zero"] |= {"stage": stage}
    path = directory / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(
    make_config: Callable[..., GenerativeConfig],
    runtime: Runtime,
    group: None,
    by_heart: Path,
    five: Path,
    few: Path,
    tmp_path: Path,
) -> None:
    # Three dialogues, of which the model knows two by heart, so that its answers have something to score.
    raw = [*json.loads(five.read_text()).items()][:2] + [*json.loads(few.read_text()).items()][:1]
    valid = tmp_path / "valid.json"
    valid.write_text(json.dumps(dict(raw)))
    model = {"family": "causal", "base": str(by_heart / "model")}
    optimization = {"learning_rate": 0.0001, "epochs": 1}
    config = make_config(
        "one",
        valid,
        train=five,
        model=model,
        optimization=optimization,
        max_answer_tokens=128,
        answered_share=1,
    )
    train_generative(config, runtime, StopSignal())
    output = tmp_path / "two"
    path = rank_values(config, output, 3, tmp_path)  # the stage that shares out the parameters, too
    result = run_forked_ranks("launch/train_generative.py", "--config", path)
    assert result.returncode == 0, result.stderr
    assert losses(output) == pytest.approx(losses(config.output), rel=1e-4)
    assert scores(output) == scores(config.output) and len(scores(output)) == 1
    assert 0 < scores(output)[-1]["positive_f1"] < 100 and 0 < scores(output)[-1]["faulty_answers"] < 100
    name = "valid-predictions.jsonl"
    assert (output / name).read_text() == (config.output / name).read_text()
