"""Prediction with a fine-tuned language model: it answers the question about every target, greedily.

Every dialogue's answers are recorded as they come (`record`), so that a stopped prediction goes on where it ended.
Ranks of a launch share the record and need no connection: each takes its share of the dialogues that are not answered
yet, and the one that finds the record complete writes the predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdecs.artifact import MANIFEST_NAME, read_verified_manifest, sha256_of_file
from kdecs.baselines.generative.answering import answer_trained, questions_about, read_texts
from kdecs.baselines.generative.answers import prompt
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.baselines.generative.network import AnswerNetwork, Decoder
from kdecs.baselines.generative.record import (
    AnswerRecord,
    Outcome,
    Question,
    RecordedAnswer,
    read_answers,
)
from kdecs.baselines.generative.training import answer_family
from kdecs.config import CONFIG_NAME, parse_config, read_yaml
from kdecs.corpus.schema import Corpus, Dialogue
from kdecs.endpoint.record import call_hash
from kdecs.errors import ArtifactError
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.process import ProgressBar, StopSignal, refusing
from kdecs.runtime import Runtime
from kdecs.teacher.product import load_tuned
from kdecs.teacher.scoring import fold_adapter


@dataclass(frozen=True)
class GenerativeBaseline:
    """A trained model on this rank's device. `source` is the checksum of its manifest."""

    model: AnswerNetwork
    labels: tuple[str, ...]
    source: str
    dtype: str

    @classmethod
    def load(
        cls, directory: Path, *, runtime: Runtime, dtype: str = "float32", base: str | None = None
    ) -> "GenerativeBaseline":
        """Load a directory of kind generative (safetensors and JSON only). `base` names a base that has moved.

        Raises ArtifactError for an unfinished, damaged or other directory, ModelError if the weights do not load.
        """
        manifest = read_verified_manifest(directory, "generative")
        labels = manifest.details.get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ArtifactError(f"{directory / MANIFEST_NAME}: names no labels; train the baseline again")
        path = directory / CONFIG_NAME
        config = parse_config(GenerativeConfig, read_yaml(path), source=str(path))
        family, network = load_tuned(
            directory,
            config,
            lambda model: answer_family(config, model.base, labels),
            dtype=dtype,
            device=runtime.device,
            base=base,
        )
        if dtype == "float32" and not config.model.load_in_4bit:
            with refusing(f"{directory}: the adapter cannot be added to its base's weights"):
                network = fold_adapter(network)
        model = (
            AnswerNetwork(family, network, use_tree=False, device=runtime.device).to(runtime.device).eval()
        )
        return cls(model, tuple(labels), sha256_of_file(directory / MANIFEST_NAME), dtype)

    def predict_pairs(self, corpus: Corpus, *, batch_tokens: int = 16_384) -> dict[PairKey, Prediction]:
        """Predictions for the pairs of annotated and of neutral targets, as `evaluate` takes them, in this process."""
        asked = questions_about(corpus)
        texts = answer_trained(self.model, asked, batch_tokens=batch_tokens)
        predictions, _ = read_texts(texts, asked, self.labels)
        return {prediction.key: prediction for prediction in predictions}

    def questions(self, targets: Sequence[tuple[Dialogue, int]]) -> list[Question]:
        """The questions about targets, each with the hash of all that its answer depends on."""
        setting = [self.source, self.dtype, self.model.family.max_prompt_tokens]
        return [
            Question(dialogue.id, target, call_hash([*setting, prompt(dialogue, target, self.labels)]))
            for dialogue, target in targets
        ]


def answer_corpus(
    baseline: GenerativeBaseline,
    dialogues: Sequence[Dialogue],
    record: AnswerRecord,
    *,
    batch_tokens: int,
    runtime: Runtime,
    stop: StopSignal,
) -> Outcome:
    """Answer what the record lacks of this rank's share, and return what all recorded answers amount to.

    Raises Stopped after a stop signal, once the answers of a dialogue are recorded.
    """
    targets = [(dialogue, utterance.turn) for dialogue in dialogues for utterance in dialogue.utterances]
    questions = baseline.questions(targets)
    pending: dict[str, list[int]] = {}
    for number in record.pending(questions, baseline.source):
        pending.setdefault(targets[number][0].id, []).append(number)
    share = list(pending.values())[runtime.rank :: runtime.world_size]
    shares = bool(share) and Decoder(baseline.model, shares=True).is_exact(targets[share[0][0]][0])
    decoder = Decoder(baseline.model, shares=shares)
    with ProgressBar(
        len(targets), initial=len(targets) - sum(map(len, pending.values())), desc="answer", unit="target",
        is_shown=runtime.is_main,
    ) as bar:  # fmt: skip
        for numbers in share:
            stop.raise_if_requested(
                f"stopped; the answers so far are in {record.path}; run the same command again to go on"
            )
            dialogue = targets[numbers[0]][0]
            texts = decoder.answers(dialogue, [targets[n][1] for n in numbers], batch_tokens=batch_tokens)
            record.add(
                RecordedAnswer(
                    call=questions[n].call,
                    source=baseline.source,
                    dialogue_id=dialogue.id,
                    target=targets[n][1],
                    text=text,
                )
                for n, text in zip(numbers, texts, strict=True)
            )
            bar.update(len(numbers))
    record.read()  # what the other ranks have added
    return read_answers(targets, questions, baseline.labels, record, baseline.source)
