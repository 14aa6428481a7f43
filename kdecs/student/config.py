"""The config of a student's training (`kdecs.launch.train_student`), and the card of what comes out of it. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kdecs.artifact import read_record
from kdecs.config import (
    BudgetedOptimization,
    Config,
    HashedUnlessDefault,
    InputPath,
    LostRankSeconds,
    ModelReference,
    Name,
    OutputPath,
    Threads,
    Unhashed,
)
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import PROMPT_VERSION, PromptVariant
from kdecs.corpus.schema import FINE_TO_COARSE, KNOWN_EMOTIONS
from kdecs.corpus.splits import CandidatesConfig, CorpusConfig
from kdecs.errors import ArtifactError
from kdecs.evaluation.by_distance import DistanceCalibration
from kdecs.tracking.record import TrackingConfig

Mode = Literal["kd", "joint", "cls", "span_only"]
SpanHeadName = Literal["position", "pointer"]
CauseBy = Literal["connective", "cls", "none"]
CONNECTIVE_MODES = ("kd", "joint")
"""The modes whose prompt has mask_cau."""
TREE_BATCHES_VERSION = 2
"""Version of how trees are dealt to steps: part of the config hash of the layout tree alone."""
CARD_NAME = "student.json"
VALIDATION_NAME = "valid-predictions.jsonl"
"""What the product of a training has beside its weights: the card, and predictions for the validation pairs."""


class StudentModelConfig(Config):
    """The student: a masked language model with span heads."""

    base: ModelReference
    layout: Annotated[Literal["pair", "tree"], HashedUnlessDefault()] = Field(
        default="pair",
        description="pair: a prompt per pair (Eq. 5); tree: a sequence per target, whose history and clause are read "
        "once for all of its candidates",
    )
    branch: Annotated[Literal["paper", "short"], HashedUnlessDefault()] = Field(
        default="paper",
        description="layout tree only: what follows the target clause. paper: as in Eq. 5; short: "
        "`<mask_cau> d_j sp_j: u_j <mask_st> <mask_ed>`, a third fewer tokens",
    )
    span_head: SpanHeadName = Field(
        default="position", description="position: Eq. 8-9 as written; pointer: a query against each token"
    )
    max_prompt_tokens: int = Field(default=512, ge=32)
    history_utterances: int | None = Field(
        default=None, ge=0, description="keep only the last k utterances before the target; null: all"
    )
    given_emotions: Literal["none", "fine", "coarse"] = Field(
        default="none",
        description="Table 6: the prompt gives the target's gold emotion, as it is (fine) or mapped (coarse), and the "
        "student does not predict it",
    )
    priors: Literal["none", "training"] = Field(
        default="none",
        description="training: biases by distance, span edge and emotion start at the frequencies of the training "
        "pairs, so that a student starts from the distance rule",
    )
    stand_ins: dict[str, str] = Field(
        default_factory=dict,
        description="emotion -> a single-token word to use if the tokenizer splits the emotion's own word",
    )

    @field_validator("stand_ins")
    @classmethod
    def _are_for_emotions(cls, stand_ins: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(set(stand_ins) - KNOWN_EMOTIONS):
            raise ValueError(f"{unknown[0]} is not an emotion; known: {', '.join(sorted(KNOWN_EMOTIONS))}")
        return stand_ins

    @model_validator(mode="after")
    def _short_branches_grow_on_trees(self) -> "StudentModelConfig":
        if self.branch == "short" and self.layout != "tree":
            raise ValueError("branch short needs layout tree: the layout pair has the paper's wording alone")
        return self


class TeacherLabels(Config):
    """The soft labels of one of several teachers."""

    labels: InputPath
    weight: float = Field(default=1.0, gt=0, description="share in the mixture, before `teacher_weighting`")


class Distillation(Config):
    """How a student learns which utterances are causes, in addition to emotions and spans.

    kd: from soft labels (Eq. 12-13). joint (Table 5, w/o KD): from gold labels on mask_cau, weight 1. cls (w/o
    connectives): with a binary classifier on the first token. span_only (w/o mask_cau): not at all.
    """

    mode: Mode = "kd"
    labels: InputPath | None = Field(default=None, description="soft-label directory of the teacher")
    teachers: tuple[TeacherLabels, ...] = Field(
        default=(), description="several teachers instead of `labels`: their distributions are mixed"
    )
    alpha: float = Field(default=0.6, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0)
    teacher_weighting: Literal["uniform", "correct", "confidence"] = Field(
        default="uniform",
        description="weight of a teacher for a pair whose gold label is known: 1 (uniform); 1 if the teacher is right, "
        "else 0 (correct); its p(gold) (confidence)",
    )
    dynamic: Literal["none", "temperature", "weight"] = Field(
        default="none",
        description="adapt to the gap g in [0, 1] between student and teacher: temperature x (1 + g), or "
        "weight x (1 - g)",
    )
    space: Annotated[Literal["answers", "vocabulary"], HashedUnlessDefault()] = Field(
        default="answers",
        description="what the distributions of Eq. 12 are over: the five answer words, or the whole vocabulary, for a "
        "student with its teacher's tokenizer; needs labels that were exported with top_k: their tokens are one "
        "class each, and all others are one class together",
    )
    hard_weight: float = Field(
        default=0.0,
        ge=0,
        description="mode kd: weight of the loss on gold labels at mask_cau, added to Eq. 13",
    )
    hard_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Figure 3: share of the training dialogues whose gold labels are used (nested by seed)",
    )
    outside_share: Literal["distil", "drop"] = Field(
        default="distil",
        description="mode kd: train pairs outside hard_share on L_KD alone (distil), or leave them out, as the other "
        "modes do",
    )
    gold_repeats: Annotated[int, HashedUnlessDefault()] = Field(
        default=1,
        ge=1,
        le=1000,
        description="mode kd, outside_share distil: how many times each pair with gold labels occurs in an epoch, so "
        "that a small hard_share fills more of each batch",
    )

    @model_validator(mode="after")
    def _fits_the_mode(self) -> "Distillation":
        if self.mode == "kd" and self.labels is None and not self.teachers:
            raise ValueError("mode kd needs labels, a soft-label directory; mode joint trains without")
        if self.labels is not None and self.teachers:
            raise ValueError("labels and teachers exclude each other; list every teacher in teachers")
        if self.mode != "kd":
            for name in ("teacher_weighting", "dynamic", "hard_weight", "space"):
                # A setting that the mode ignores would give the same training another hash, and another row in tables.
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} needs mode kd, found mode {self.mode}")
        if self.gold_repeats > 1 and (self.mode != "kd" or self.outside_share == "drop"):
            raise ValueError(
                "gold_repeats needs mode kd and outside_share distil: otherwise all pairs have gold labels, and "
                "repeats would be epochs"
            )
        if self.space == "vocabulary" and (self.labels is None or self.dynamic != "none"):
            raise ValueError(
                "space vocabulary needs one teacher, in labels, and dynamic none: the top logits of several teachers "
                "are of different tokens"
            )
        return self

    @property
    def used_teachers(self) -> tuple[TeacherLabels, ...]:
        """The teachers that this mode reads: none, that of `labels`, or several."""
        if self.mode != "kd":
            return ()
        return self.teachers or (TeacherLabels(labels=self.labels),)  # type: ignore[arg-type]


class StudentBatches(Config):
    """Pairs per step over all ranks. Batches hold pairs of similar length, drawn from buckets."""

    global_batch_pairs: int = Field(default=16, ge=1)
    bucket_batches: int = Field(default=50, ge=1, description="batches per length bucket")
    # Unhashed: which pairs are scored together moves a score by rounding alone.
    evaluation_batch_tokens: Annotated[int, Unhashed()] = Field(default=8192, ge=32)

    @property
    def size(self) -> dict[str, int]:
        """The key that says how much a step trains on, with its value."""
        return {"global_batch_pairs": self.global_batch_pairs}


class StudentConfig(Config):
    """Joint training of emotions, connectives and spans with distillation (Eq. 5-13)."""

    method_versions: ClassVar[dict[str, int]] = {"prompt": PROMPT_VERSION}
    kind: ClassVar[Literal["student"]] = "student"
    name: Name = "student"
    output: OutputPath
    cache: OutputPath = Field(description="tokenised corpus and label files, shared by all trials of a node")
    corpus: CorpusConfig
    candidates: Annotated[CandidatesConfig, HashedUnlessDefault()] = CandidatesConfig()
    task: Literal["ecspe", "ecpe"] = Field(
        default="ecspe",
        description="ecspe: emotions and cause spans; ecpe: emotions and cause utterances, without L_span, and the "
        "best epoch is the one with the best macro F1 at utterance level",
    )
    model: StudentModelConfig
    distillation: Distillation
    batches: StudentBatches = StudentBatches()
    # The paper names the learning rate and the batch size of 16 pairs, and leaves the rest to its framework.
    optimization: BudgetedOptimization = BudgetedOptimization(
        learning_rate=1e-5, weight_decay=0.01, epochs=10
    )
    head_rate_factor: float = Field(
        default=1.0,
        gt=0,
        description="learning rate of span heads and priors, as a multiple of the encoder's",
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: Annotated[bool, Unhashed()] = Field(
        default=False,
        description="torch.compile the encoder (layout pair only): pays off on GPUs over many epochs",
    )
    patience_epochs: int | None = Field(
        default=None,
        ge=1,
        description="stop after this many epochs without improvement; with optimization.steps an epoch is the time "
        "between two validations",
    )
    neutral_share: float = Field(
        default=1.0, gt=0, le=1, description="share of the pairs (i, i) of neutral targets in training"
    )
    emotion_weight: Literal["pair", "target", "own"] = Field(
        default="pair",
        description="what has equal weight in L_emo: pair: every pair (Eq. 10); target: every target, spread over its "
        "pairs; own: every target, at its pair (i, i) alone, where emotions are decided",
    )
    neutral_decision: Literal["argmax", "balanced", "macro_f1"] = Field(
        default="argmax",
        description="how a target is found neutral: by its likeliest emotion (argmax), or after adding an offset to "
        "neutral's log-probability that is chosen on the validation split for macro F1 alone, or for the mean of macro "
        "F1 and emotion accuracy (balanced), where a target that seems to be its own cause is less likely neutral",
    )
    least_emotion_accuracy: Annotated[float, HashedUnlessDefault()] = Field(
        default=0.0,
        ge=0,
        le=100,
        description="percent of the validation split's emotions that the chosen offset of neutral has to get right, if "
        "any offset does; above 0, a target that seems to be its own cause is less likely neutral, as for balanced",
    )
    cause_decision: Annotated[Literal["threshold", "argmax"], HashedUnlessDefault()] = Field(
        default="threshold",
        description="how a pair is found a cause: by a score of at least a threshold that is chosen on the validation "
        "split, or as the paper decodes (argmax): the largest connective is a causal word, and the best span is "
        "likelier than none",
    )
    cause_calibration: Annotated[Literal["none", "distance"], HashedUnlessDefault()] = Field(
        default="none",
        description="distance: cause scores get a scale and a shift for each distance of target and candidate, fitted "
        "to the validation split's gold before the threshold is chosen",
    )
    threshold_for: Literal["span", "utterance", "both"] = Field(
        default="span",
        description="the macro F1 on the validation split that the threshold of causes maximises (task ecpe: always "
        "utterance); both: the mean of the two. The best epoch is chosen by macro F1 of spans in any case",
    )
    tracking: Annotated[TrackingConfig | None, Unhashed()] = Field(
        default=None, description="MLflow; null: write only metrics.jsonl. A sweep has its own"
    )
    threads: Threads = 0
    lost_rank_s: LostRankSeconds = 120.0

    @model_validator(mode="after")
    def _task_has_a_cause(self) -> "StudentConfig":
        # Combinations that would train without an error, but not what the config says.
        if self.task == "ecpe" and self.distillation.mode == "span_only":
            raise ValueError("task ecpe has no span loss, so mode span_only has nothing to find causes by")
        if self.model.given_emotions == "coarse" and self.corpus.emotions == "coarse":
            raise ValueError(
                "model.given_emotions coarse maps fine labels, but corpus.emotions coarse has none; use fine"
            )
        if self.compile and self.model.layout == "tree":
            raise ValueError(
                "compile needs model.layout pair: trees differ in their pieces, so nearly every batch would compile "
                "the encoder again; leave compile out"
            )
        if self.distillation.space == "vocabulary" and self.model.priors != "none":
            raise ValueError(
                "distillation.space vocabulary needs model.priors none: priors belong to the answer words alone"
            )
        if self.is_given_emotions and self.neutral_decision != "argmax":
            raise ValueError("neutral_decision needs predicted emotions, but model.given_emotions gives them")
        if self.cause_calibration != "none" and self.cause_decision == "argmax":
            raise ValueError("cause_calibration needs cause_decision threshold: argmax reads no scores")
        if self.least_emotion_accuracy and self.neutral_decision == "argmax":
            raise ValueError(
                "least_emotion_accuracy needs neutral_decision macro_f1 or balanced: argmax chooses no offset"
            )
        return self

    @property
    def versions(self) -> dict[str, int]:
        """In the layout tree also how batches are dealt."""
        return super().versions | (
            {"tree_batches": TREE_BATCHES_VERSION} if self.model.layout == "tree" else {}
        )

    @property
    def is_given_emotions(self) -> bool:
        """Whether the prompt gives the target's gold emotion, so that none is predicted."""
        return self.model.given_emotions != "none"

    @property
    def candidates_after(self) -> int:
        """How many turns past its target a candidate may lie."""
        return self.candidates.after

    @property
    def emotion_table(self) -> dict[str, str] | None:
        """How the prompt maps the gold emotions that it gives (identity if empty); None if they are predicted."""
        tables = {"none": None, "fine": {}, "coarse": dict(FINE_TO_COARSE)}
        return tables[self.model.given_emotions]

    @property
    def prompt(self) -> PromptVariant:
        """The variant of the prompt (Eq. 5) that the mode and the model ask for."""
        return PromptVariant(
            has_connective=self.distillation.mode in CONNECTIVE_MODES,
            given_emotions=self.emotion_table,
            history_utterances=self.model.history_utterances,
            has_short_branch=self.model.branch == "short",
            candidates_after=self.candidates.after,
        )


@dataclass(frozen=True)
class Outputs:
    """What a student predicts. `cause_by`: the cause from mask_cau (Eq. 7), from the first token, or not at all."""

    cause_by: CauseBy = "connective"
    emotions: bool = True
    spans: bool = True
    priors: bool = False
    later_candidates: bool = False


LATER_KEYS = ("candidates_after", "neutral_weighs_causes", "cause_calibration")
"""Keys of cards that came later, and that are left out where they are 0, false or null."""


class StudentCard(BaseModel):
    """`student.json`: what a predictor has to know in addition to the weights. An export to ONNX has the same card."""

    # Fields with a default were added later: cards of earlier versions lack them.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    emotions: tuple[str, ...] = Field(min_length=1)
    stand_ins: dict[str, str]
    connectives: tuple[str, ...]
    span_head: SpanHeadName
    max_prompt_tokens: int = Field(ge=32)
    prompt_version: int
    threshold: float = Field(ge=0, le=1, description="a pair is a cause if its score is at least this")
    neutral_offset: float = Field(
        default=0.0, description="added to neutral's log-probability in the decision"
    )
    neutral_weighs_causes: bool = Field(
        default=False, description="neutral is less likely the likelier the target is its own cause"
    )
    cause_calibration: DistanceCalibration | None = Field(
        default=None, description="of cause scores, before the threshold decides"
    )
    cause_decision: Literal["threshold", "argmax"] = Field(
        default="threshold", description="argmax: the threshold is not used"
    )
    mode: Mode = "kd"
    task: Literal["ecspe", "ecpe"] = "ecspe"
    priors: bool = False
    layout: Literal["pair", "tree"] = "pair"
    branch: Literal["paper", "short"] = "paper"
    given_emotions: dict[str, str] | None = Field(
        default=None, description="if not null, the prompt gives the target's emotion, mapped by this table"
    )
    history_utterances: int | None = None
    candidates_after: int = Field(default=0, ge=0)

    def as_json(self) -> dict[str, Any]:
        """The values of `student.json`, without those that earlier versions do not know and this card does not need."""
        values = self.model_dump(mode="json")
        return {key: value for key, value in values.items() if value or key not in LATER_KEYS}

    @property
    def chosen_threshold(self) -> float | None:
        """The threshold of causes; None if argmax decides."""
        return None if self.cause_decision == "argmax" else self.threshold

    @property
    def outputs(self) -> Outputs:
        """What the model of this mode predicts."""
        cause_by: dict[str, CauseBy] = {"cls": "cls", "span_only": "none"}
        return Outputs(
            cause_by=cause_by.get(self.mode, "connective"),
            emotions=self.given_emotions is None,
            spans=self.task == "ecspe",
            priors=self.priors,
            later_candidates=self.candidates_after > 0,
        )

    @property
    def prompt(self) -> PromptVariant:
        """The variant of the prompt that this mode uses."""
        return PromptVariant(
            has_connective=self.mode in CONNECTIVE_MODES,
            given_emotions=self.given_emotions,
            history_utterances=self.history_utterances,
            has_short_branch=self.branch == "short",
            candidates_after=self.candidates_after,
        )


def read_card(path: Path) -> StudentCard:
    """The card of a student. Raises ArtifactError if it is damaged, or of another wording of the prompt."""
    card = read_record(StudentCard, path, "train the student again")
    # Another wording would still predict, only worse, and nobody would notice.
    if card.prompt_version != PROMPT_VERSION or card.connectives != CONNECTIVES:
        raise ArtifactError(
            f"{path}: the student was trained with prompt version {card.prompt_version} and the connectives "
            f"{', '.join(card.connectives)}, but this kdecs uses version {PROMPT_VERSION} and "
            f"{', '.join(CONNECTIVES)}; train the student again"
        )
    return card
