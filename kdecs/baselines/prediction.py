"""A trained baseline: its product of kind baseline, and its predictions for whole dialogues.

    model/              a Transformers masked language model (safetensors) with its tokenizer
    heads.safetensors   the tensors of the system beside the language model (ueca-prompt has none)
    baseline.json       BaselineCard: what a predictor needs to know
    valid-predictions.jsonl   predictions of these weights for the validation pairs (kdecs.evaluation.predictions)
    config.json         the resolved config of the training
    metrics.jsonl       one JSON object per epoch
    manifest.json       details: metrics on validation, threshold, emotions, system

Loading unpickles nothing.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdecs.artifact import atomic_path, read_manifest, read_record, read_verified_manifest, write_json
from kdecs.baselines.config import BASELINE_VERSION, CARD_NAME, BaselineCard, Ecpe2d, Kec, Mgsag
from kdecs.baselines.dialogues import DialogueEncoder, EncodedDialogue, moved, pair_places
from kdecs.baselines.ecpe_2d import Ecpe2dModel
from kdecs.baselines.kec import KecModel, Knowledge, read_knowledge
from kdecs.baselines.mgsag import MgsagModel
from kdecs.baselines.model import BaselineModel
from kdecs.baselines.mrc.prediction import Emotions, MrcBaseline
from kdecs.baselines.ueca_prompt import UecaModel
from kdecs.corpus.pairs import Pair, candidate_pairs, pairs_of
from kdecs.corpus.schema import Corpus, Dialogue
from kdecs.errors import ArtifactError
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.models import load_tokenizer, save_pretrained
from kdecs.process import refusing
from kdecs.runtime import autocast
from kdecs.student.config import VALIDATION_NAME
from kdecs.student.decision import (
    PairScores,
    best_spans,
    decide,
    log_softmax,
    pair_emotions,
    span_characters,
)
from kdecs.student.model import HEADS_NAME, MODEL_FOLDER, load_language_model
from kdecs.student.predict.streaming import DEFAULT_BATCH_TOKENS, PairPrediction

logger = logging.getLogger(__name__)

BASELINE_NAMES = (MODEL_FOLDER, HEADS_NAME, CARD_NAME, VALIDATION_NAME)
"""What an epoch that is the best so far leaves."""


def build_model(
    language_model: Any, tokenizer: Any, card: BaselineCard, knowledge: Knowledge | None = None
) -> BaselineModel:
    """The system of a card on a language model; what is beside the language model starts with random weights."""
    system = card.system
    if isinstance(system, Ecpe2d):
        return Ecpe2dModel(language_model, system, len(card.emotions), card.task, card.candidates_after)
    if isinstance(system, Mgsag):
        return MgsagModel(language_model, system, len(card.emotions), card.task)
    if isinstance(system, Kec):
        return KecModel(language_model, system, card.emotions, card.task, knowledge)
    return UecaModel(language_model, system, card.emotions, tokenizer)


def save_baseline(directory: Path, model: BaselineModel, tokenizer: Any, card: BaselineCard) -> None:
    """Write weights, tokenizer and card into a directory, without config, metrics and manifest."""
    save_pretrained([model.language_model, tokenizer], directory / MODEL_FOLDER)
    with atomic_path(directory / HEADS_NAME) as temporary:
        save_file(model.head_tensors(), temporary)
    write_json(directory / CARD_NAME, card.as_json())


def load_baseline(directory: Path, knowledge: Knowledge | None) -> tuple[BaselineModel, Any, BaselineCard]:
    """Model (float32, on the CPU, in evaluation mode), tokenizer and card of a directory.

    Raises ArtifactError for a card or heads that do not fit, ModelError if the weights cannot be loaded.
    """
    card = read_record(BaselineCard, directory / CARD_NAME, "train the baseline again")
    if card.version != BASELINE_VERSION:
        raise ArtifactError(
            f"{directory / CARD_NAME}: the baseline was trained with version {card.version} of its kind, but this "
            f"kdecs uses version {BASELINE_VERSION}; train the baseline again"
        )
    if card.uses_knowledge != (knowledge is not None):
        raise ArtifactError(
            f"{directory}: this baseline was trained with commonsense knowledge; give the phrases for the input with "
            "--knowledge FILE"
            if card.uses_knowledge
            else f"{directory}: this baseline was trained without commonsense knowledge; leave out --knowledge"
        )
    folder = directory / MODEL_FOLDER
    tokenizer, language_model = load_tokenizer(folder), load_language_model(folder, has_head=True)
    path = directory / HEADS_NAME
    # Settings that load may still not run, which a first dialogue shows.
    with refusing(f"model {folder}: does not run as a baseline's"):
        model = build_model(language_model, tokenizer, card, knowledge).eval()
    try:
        tensors = load_file(path)
        if set(tensors) != set(model.head_tensors()):
            raise RuntimeError("other tensors than this system has")
        model.load_state_dict(tensors, strict=False)  # the language model's are loaded already
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{path}: does not hold the heads of this baseline ({reason}); train the baseline again"
        ) from None
    return model, tokenizer, card


class Baseline:
    """A trained baseline, ready to predict."""

    def __init__(
        self, model: BaselineModel, tokenizer: Any, card: BaselineCard, *, device: torch.device
    ) -> None:
        self.model = model.to(device).eval()
        self.card = card
        self.device = device
        self.encoder = DialogueEncoder(tokenizer, card.max_utterance_tokens)

    @property
    def candidates_after(self) -> int:
        """How many turns past its target a candidate may lie."""
        return self.card.candidates_after

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", knowledge: Path | None = None
    ) -> "Baseline":
        """Load a directory of kind baseline (safetensors and JSON only).

        `knowledge` is a file of phrases (kdecs.baselines.kec) for the dialogues to predict, which KEC needs if it was
        trained with one. Raises ArtifactError if the directory is missing, unfinished, damaged or of another kind,
        ModelError if its weights or tokenizer cannot be loaded, CorpusError for a faulty file of phrases.
        """
        directory = Path(directory).expanduser().absolute()
        read_verified_manifest(directory, "baseline")
        phrases = None if knowledge is None else read_knowledge(knowledge)
        return cls(*load_baseline(directory, phrases), device=torch.device(device))

    def predict(self, dialogues: Iterable[Dialogue], *, max_distance: int | None = None) -> list[Prediction]:
        """Predictions for every pair j <= i + `candidates_after` of the dialogues, labelled or not, in order."""
        pairs = [
            pair
            for d in dialogues
            for pair in candidate_pairs(d, max_distance=max_distance, after=self.candidates_after)
        ]
        return [found.prediction for found in self.detail(pairs)]

    def predict_pairs(self, corpus: Corpus) -> dict[PairKey, Prediction]:
        """Predictions for fold1 and the pairs (i, i) of neutral targets, as `evaluate` takes them."""
        pairs = [
            pair
            for dialogue in corpus.dialogues
            for pair in pairs_of(dialogue, "fold1+neutral", self.candidates_after)
        ]
        return {found.prediction.key: found.prediction for found in self.detail(pairs)}

    def detail(
        self,
        pairs: Sequence[Pair],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> list[PairPrediction]:
        """Predictions with scores and character ranges, in the order of the pairs.

        Raises DialogueError for a dialogue that the system cannot read.
        """
        encoded = encode_dialogues(self.encoder, pairs)
        scores, ranges = score_pairs(
            self.model,
            self.encoder,
            encoded,
            pairs,
            num_emotions=len(self.card.emotions),
            device=self.device,
            batch_tokens=batch_tokens,
            on_batch=on_batch,
        )
        if num_cut := sum(dialogue.num_truncated for dialogue in encoded.values()):
            logger.warning("%d utterances were cut to %d tokens", num_cut, self.encoder.max_tokens)
        emotions = pair_emotions(
            scores,
            list(pairs),
            self.card.emotions,
            self.card.neutral_offset,
            weighs_causes=self.card.neutral_weighs_causes,
        )
        decided = decide(list(pairs), scores, emotions, span_texts(pairs, ranges), self.card.threshold)
        return [
            PairPrediction(prediction, float(score), place if prediction.is_cause else None)
            for prediction, score, place in zip(decided, scores.cause_P, ranges, strict=True)
        ]


def open_baseline(
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    knowledge: Path | None = None,
    emotions: Emotions | None = None,
) -> Baseline | MrcBaseline:
    """Load a directory of kind baseline or mrc.

    Raises what the `from_pretrained` of both raises, and ArtifactError for what the system does not take.
    """
    if read_manifest(directory, "baseline", "mrc").kind == "baseline":
        if emotions is not None:
            raise ArtifactError(
                f"{directory}: this baseline predicts the emotions itself, and only MRC takes others; leave out "
                "--emotions"
            )
        return Baseline.from_pretrained(directory, device=device, knowledge=knowledge)
    if knowledge is not None:
        raise ArtifactError(
            f"{directory}: the MRC baseline uses no commonsense knowledge; leave out --knowledge"
        )
    return MrcBaseline.from_pretrained(directory, device=device, emotions=emotions)


Encoded = dict[int, EncodedDialogue]
"""By the identity of the dialogue: two requests may have dialogues of one id."""
Ranges = list[tuple[int, int] | None]


def encode_dialogues(encoder: DialogueEncoder, pairs: Iterable[Pair]) -> Encoded:
    """The dialogues of some pairs, each once."""
    found: Encoded = {}
    for pair in pairs:
        if id(pair.dialogue) not in found:
            found[id(pair.dialogue)] = encoder.encode(pair.dialogue)
    return found


def score_pairs(
    model: BaselineModel,
    encoder: DialogueEncoder,
    encoded: Encoded,
    pairs: Sequence[Pair],
    *,
    num_emotions: int,
    device: torch.device,
    batch_tokens: int,
    on_batch: Callable[[int], object] | None = None,
) -> tuple[PairScores, Ranges]:
    """A baseline's scores, as a student's are, and the characters of each pair's best span (None without spans)."""
    emotion_PE = np.zeros((len(pairs), num_emotions), dtype=np.float32)
    cause_P = np.zeros(len(pairs), dtype=np.float32)
    ranges: Ranges = [None] * len(pairs)
    rows_of: dict[int, list[int]] = {}
    for row, pair in enumerate(pairs):
        rows_of.setdefault(id(pair.dialogue), []).append(row)
    was_training = model.training
    model.eval()
    # In float32, whatever the training's precision: the threshold is chosen on these scores.
    with torch.inference_mode(), autocast(device, "float32"):
        for batch in _batches(encoded, list(rows_of), batch_tokens):
            rows = [row for key in batch for row in rows_of[key]]
            pairs_P3 = pair_places([[pairs[row] for row in rows_of[key]] for key in batch])
            inputs = model.inputs([encoded[key] for key in batch], pairs_P3, encoder)
            pairs_P3 = moved(pairs_P3, device)
            output = model(
                moved(inputs, device),
                pairs_P3,
                torch.ones(len(pairs_P3), dtype=torch.bool, device=device),
            )
            emotion_PE[rows] = log_softmax(
                output.emotion_DNE[pairs_P3[:, 0], pairs_P3[:, 1]].float().cpu().numpy()
            )
            cause_P[rows] = torch.sigmoid(output.cause_P.float()).cpu().numpy()
            if output.start_QS is not None and output.end_QS is not None:
                spans = best_spans(output.start_QS.cpu().numpy(), output.end_QS.cpu().numpy())
                for row, span in zip(rows, spans, strict=True):
                    offsets = encoded[id(pairs[row].dialogue)].offsets[pairs[row].candidate - 1]
                    ranges[row] = span_characters(np.asarray(offsets), span)
            if on_batch:
                on_batch(len(rows))
    model.train(was_training)
    return PairScores(emotion_PE, cause_P, None), ranges


def span_texts(pairs: Sequence[Pair], ranges: Ranges) -> list[str]:
    """The text of each pair's span; "" without one."""
    return [
        "" if place is None else pair.dialogue.utterances[pair.candidate - 1].text[slice(*place)]
        for pair, place in zip(pairs, ranges, strict=True)
    ]


def _batches(encoded: Encoded, keys: list[int], batch_tokens: int) -> list[list[int]]:
    """Dialogues of similar length, in batches of at most so many tokens; a larger one stands alone."""
    batches: list[list[int]] = []
    held = 0
    for key in sorted(keys, key=lambda key: len(encoded[key].token_ids)):
        tokens = encoded[key].num_tokens
        if not batches or held + tokens > batch_tokens:
            batches.append([])
            held = 0
        batches[-1].append(key)
        held += tokens
    return batches
