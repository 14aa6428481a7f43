"""`student.json`: what a predictor has to know of a student in addition to its weights. No torch.

A student and its export to ONNX have the same card.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from kdecs.artifact import read_record
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import PROMPT_VERSION, PromptVariant
from kdecs.errors import ArtifactError
from kdecs.student.config import CONNECTIVE_MODES, Mode

CARD_NAME = "student.json"
SpanHeadName = Literal["position", "pointer"]
CauseBy = Literal["connective", "cls", "none"]


@dataclass(frozen=True)
class Outputs:
    """What a student predicts. `cause_by`: the cause from mask_cau (Eq. 7), from the first token, or not at all."""

    cause_by: CauseBy = "connective"
    emotions: bool = True
    spans: bool = True
    priors: bool = False


class StudentCard(BaseModel):
    """`student.json`: what a predictor has to know in addition to the weights."""

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
    mode: Mode = "kd"
    task: Literal["ecspe", "ecpe"] = "ecspe"
    priors: bool = False
    layout: Literal["pair", "tree"] = "pair"
    branch: Literal["paper", "short"] = "paper"
    given_emotions: dict[str, str] | None = Field(
        default=None, description="if not null, the prompt gives the target's emotion, mapped by this table"
    )
    history_utterances: int | None = None

    @property
    def outputs(self) -> Outputs:
        """What the model of this mode predicts."""
        cause_by: dict[str, CauseBy] = {"cls": "cls", "span_only": "none"}
        return Outputs(
            cause_by=cause_by.get(self.mode, "connective"),
            emotions=self.given_emotions is None,
            spans=self.task == "ecspe",
            priors=self.priors,
        )

    @property
    def prompt(self) -> PromptVariant:
        """The variant of the prompt that this mode uses."""
        return PromptVariant(
            has_connective=self.mode in CONNECTIVE_MODES,
            given_emotions=self.given_emotions,
            history_utterances=self.history_utterances,
            has_short_branch=self.branch == "short",
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
