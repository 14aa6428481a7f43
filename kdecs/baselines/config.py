"""The configs of the baselines of Table 4 (`kdecs.launch.train_baseline`), and the card of a product. No torch.

`system` says which baseline a config trains: `mrc` makes it an `MrcConfig`, the other systems share `BaselineConfig`.
Each of these has its own settings, and `system.name` says whose they are; `system: kec` alone takes all defaults.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
    read_yaml,
    set_dotted,
    value_of_text,
)
from kdecs.corpus.checking import MAX_UTTERANCES
from kdecs.corpus.splits import CandidatesConfig, CorpusConfig
from kdecs.student.config import LATER_KEYS, StudentBatches
from kdecs.tracking.record import TrackingConfig

BASELINE_VERSION = 1
"""Version of how the baselines read a dialogue: part of the config hash and of a product's card."""
QUESTION_VERSION = 2
"""Version of the MRC question's wording and the context's layout: part of the config hash and of a product.

2: the wording of RECCON's released questions, whose utterances end without an added full stop.
"""
CARD_NAME = "baseline.json"
Task = Literal["ecspe", "ecpe"]
_Size = Annotated[int, Field(ge=1, le=4096)]
_Dropout = Annotated[float, Field(ge=0, lt=1)]


class Ecpe2d(Config):
    """ECPE-2D (Ding, Xia and Yu 2020), Inter-EC with the two-dimensional transformer."""

    name: Literal["ecpe-2d"] = "ecpe-2d"
    hidden_size: _Size = Field(default=200, description="of an utterance's emotion and cause vectors")
    pair_size: _Size = Field(default=30, description="of a cell of the pair matrix")
    layers: int = Field(default=1, ge=0, le=16, description="of interaction over the pair matrix")
    window: Annotated[int | None, HashedUnlessDefault()] = Field(
        default=None,
        ge=0,
        le=100,
        description="null: a pair interacts with its row and its column (cross-road); a number: with all pairs at most "
        "so far apart (window-constrained)",
    )
    stop_gradient: bool = Field(
        default=True,
        description="the pair matrix passes no gradient to the utterances' vectors, as in the variant with BERT",
    )
    l2: float = Field(default=1e-5, ge=0, description="weight of the squared weights of the three heads")
    dropout: _Dropout = 0.1


class Kec(Config):
    """KEC (Li et al. 2022): a directed acyclic graph of utterances, with commonsense on its edges or without."""

    name: Literal["kec"] = "kec"
    hidden_size: _Size = 300
    layers: int = Field(default=5, ge=1, le=16)
    window: int = Field(default=2, ge=1, le=100, description="an edge joins utterances at most so far apart")
    knowledge: InputPath | None = Field(
        default=None, description="JSON lines of commonsense phrases; null: the variant without commonsense"
    )
    dropout: _Dropout = 0.1


class Mgsag(Config):
    """MGSAG (Bao et al. 2022): a graph of utterances and keywords, and one of all utterances."""

    name: Literal["mgsag"] = "mgsag"
    hidden_size: _Size = 200
    heads: int = Field(default=4, ge=1, le=64, description="attention heads of the coarse graph")
    keywords: int = Field(default=64, ge=0, le=1000, description="keywords per dialogue; 0: none")
    dropout: _Dropout = 0.1

    @model_validator(mode="after")
    def _heads_divide(self) -> "Mgsag":
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of heads {self.heads}")
        return self


class UecaPrompt(Config):
    """UECA-Prompt (Zheng et al. 2022): three masks per utterance, filled by the masked language model."""

    name: Literal["ueca-prompt"] = "ueca-prompt"
    max_tokens: int = Field(default=512, ge=32, le=8192, description="of the sequence of a target")
    max_utterances: int = Field(
        default=40, ge=1, le=400, description="utterances that are numbered in the sequence of a target"
    )
    window: int | None = Field(
        default=2, ge=0, description="a cause is at most so far before its target; null: any distance"
    )
    stand_ins: dict[str, str] = Field(
        default_factory=dict,
        description="emotion -> a single-token word to use if the tokenizer splits the emotion's own word",
    )


SystemConfig = Annotated[Ecpe2d | Kec | Mgsag | UecaPrompt, Field(discriminator="name")]
_SYSTEMS = tuple(each.model_fields["name"].default for each in (Ecpe2d, Kec, Mgsag, UecaPrompt))


class BaselineModelConfig(Config):
    """The encoder of a baseline."""

    base: ModelReference
    max_utterance_tokens: int = Field(
        default=128, ge=4, le=8192, description="an utterance keeps its first tokens"
    )


class DialogueBatches(Config):
    """Dialogues per step. Batches hold dialogues of similar length, drawn from buckets."""

    global_batch_dialogues: int = Field(default=4, ge=1)
    bucket_batches: int = Field(default=50, ge=1, description="batches per length bucket")
    # Unhashed: which dialogues are scored together moves a score by rounding alone.
    evaluation_batch_tokens: Annotated[int, Unhashed()] = Field(default=8192, ge=32)

    @property
    def size(self) -> dict[str, int]:
        """The key that says how much a step trains on, with its value."""
        return {"global_batch_dialogues": self.global_batch_dialogues}


class _Training(Config):
    """What the training of every baseline has."""

    output: OutputPath
    corpus: CorpusConfig
    precision: Literal["float32", "bfloat16"] = "float32"
    patience_epochs: int | None = Field(
        default=None,
        ge=1,
        description="stop after this many epochs without improvement; with optimization.steps an epoch is the time "
        "between two validations",
    )
    tracking: Annotated[TrackingConfig | None, Unhashed()] = Field(
        default=None, description="MLflow; null: write only metrics.jsonl. A sweep has its own"
    )
    threads: Threads = 0
    lost_rank_s: LostRankSeconds = 120.0


class BaselineConfig(_Training):
    """Joint training of emotions, emotion-cause pairs and spans with a system of Table 4."""

    method_versions: ClassVar[dict[str, int]] = {"baseline": BASELINE_VERSION}
    kind: ClassVar[Literal["baseline"]] = "baseline"
    is_given_emotions: ClassVar[bool] = False
    name: Name = "baseline"
    system: SystemConfig
    candidates: Annotated[CandidatesConfig, HashedUnlessDefault()] = CandidatesConfig()
    task: Task = Field(
        default="ecspe",
        description="ecspe: emotions and cause spans; ecpe: emotions and cause utterances. ueca-prompt has no spans",
    )
    model: BaselineModelConfig
    batches: DialogueBatches = DialogueBatches()
    optimization: BudgetedOptimization = BudgetedOptimization(
        learning_rate=2e-5, weight_decay=0.01, epochs=15
    )
    head_rate_factor: float = Field(
        default=1.0,
        gt=0,
        description="learning rate of what stands on the encoder, as a multiple of the encoder's",
    )
    neutral_decision: Literal["argmax", "balanced", "macro_f1"] = Field(
        default="argmax", description="how a target is found neutral: as for a student"
    )
    threshold_for: Literal["span", "utterance", "both"] = Field(
        default="span",
        description="the macro F1 that the threshold of causes maximises, as for a student (task ecpe: utterance)",
    )

    @property
    def system_name(self) -> str:
        """The name of the system."""
        return self.system.name

    @property
    def candidates_after(self) -> int:
        """How many turns past its target a candidate may lie."""
        return self.candidates.after

    @field_validator("system", mode="before")
    @classmethod
    def _system_by_name(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in _SYSTEMS:
            raise ValueError(
                f"expected {', '.join(map(repr, _SYSTEMS))} or 'mrc'; a sweep also takes 'generative', which "
                "kdecs.launch.train_generative trains by itself"
            )
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_the_system(self) -> "BaselineConfig":
        if self.system.name == "ueca-prompt" and self.task != "ecpe":
            raise ValueError("system ueca-prompt finds utterances, not spans; set task: ecpe")
        if self.candidates.after and not isinstance(self.system, Ecpe2d):
            raise ValueError(
                f"candidates.after needs system ecpe-2d: {self.system.name} reads no utterance after the target; "
                "leave it out"
            )
        return self


class MrcModel(Config):
    """An encoder with a question-answering head."""

    base: ModelReference
    max_tokens: int = Field(default=512, ge=48, description="question and context together")
    answer_within: Literal["context", "candidate"] = Field(
        default="context",
        description="context: anywhere in the conversation, as in RECCON's released setup; candidate: only in the "
        "evidence utterance that the question names",
    )


class MrcConfig(_Training):
    """RECCON's question-answering baseline: SQuAD 2.0 with impossible questions."""

    method_versions: ClassVar[dict[str, int]] = {"question": QUESTION_VERSION}
    kind: ClassVar[Literal["mrc"]] = "mrc"
    is_given_emotions: ClassVar[bool] = True
    candidates_after: ClassVar[int] = 0  # the context of a question ends with the target
    name: Name = "mrc"
    # Unhashed: the hash holds the name of the class, and configs from before this key stay the same work.
    system: Annotated[Literal["mrc"], Unhashed()] = "mrc"
    model: MrcModel
    batches: StudentBatches = StudentBatches()
    optimization: BudgetedOptimization = BudgetedOptimization(
        learning_rate=1e-5, weight_decay=0.01, epochs=12
    )
    negative_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the impossible questions to train on, drawn once by seed",
    )

    @property
    def system_name(self) -> str:
        """The name of the system."""
        return self.system

    @property
    def task(self) -> Task:
        """It answers with spans."""
        return "ecspe"

    @field_validator("system", mode="before")
    @classmethod
    def _system_by_name(cls, value: Any) -> Any:
        return value["name"] if isinstance(value, dict) and value.keys() == {"name"} else value


AnyBaseline = BaselineConfig | MrcConfig


def baseline_type(values: Mapping[str, Any]) -> type[AnyBaseline]:
    """The type of the config that has these values, by their `system`."""
    system = values.get("system")
    name = system.get("name") if isinstance(system, dict) else system
    return MrcConfig if name == MrcConfig.kind else BaselineConfig


def type_of_config(path: Path, overrides: Iterable[str]) -> type[AnyBaseline]:
    """The type of the config that a file and the overrides of a command line describe. Raises ConfigError."""
    values = read_yaml(path)
    for override in overrides:
        key, _, text = override.partition("=")
        if key == "system":
            value = value_of_text(BaselineConfig, key, text, source=f"--set {override}")
            set_dotted(values, key, value, BaselineConfig)
    return baseline_type(values)


class BaselineCard(BaseModel):
    """`baseline.json`: what a predictor has to know in addition to the weights.

    `system` has no path: `uses_knowledge` says whether KEC was trained with commonsense, which a prediction then needs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    version: int
    system: SystemConfig
    task: Task
    emotions: tuple[str, ...] = Field(min_length=1, max_length=1000)
    max_utterance_tokens: int = Field(ge=4, le=8192)
    uses_knowledge: bool = False
    threshold: float = Field(ge=0, le=1, description="a pair is a cause if its score is at least this")
    neutral_offset: float = Field(
        default=0.0, description="added to neutral's log-probability in the decision"
    )
    neutral_weighs_causes: bool = Field(
        default=False, description="neutral is less likely the likelier the target is its own cause"
    )
    candidates_after: int = Field(default=0, ge=0, le=MAX_UTTERANCES)

    def as_json(self) -> dict[str, Any]:
        """The values of `baseline.json`, without those that older versions do not know and that are not needed."""
        values = self.model_dump(mode="json")
        return {key: value for key, value in values.items() if value or key not in LATER_KEYS}
