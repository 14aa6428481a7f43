"""The config of the generative baseline's training (`kdecs.launch.train_generative`, or a trial of a sweep)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdecs.baselines.generative.answers import ANSWER_VERSION
from kdecs.config import HashedUnlessDefault, Unhashed
from kdecs.teacher.config import BATCHES_VERSION, CausalModel, TuningConfig


class GenerativeConfig(TuningConfig):
    """Fine-tuning of a decoder-only model to answer the question about a target in words.

    Where a teacher's config counts pairs, this one counts targets: each target is one question with one answer.
    """

    method_versions: ClassVar[dict[str, int]] = {"answer": ANSWER_VERSION, "batches": BATCHES_VERSION}
    kind: ClassVar[Literal["generative"]] = "generative"
    task: ClassVar[Literal["ecspe"]] = "ecspe"  # it answers with spans
    is_given_emotions: ClassVar[bool] = False
    candidates_after: ClassVar[int] = 0  # a question shows the dialogue up to the target
    # Unhashed: the hash holds the name of the class, and configs from before this key stay the same work.
    system: Annotated[Literal["generative"], Unhashed()] = "generative"
    model: CausalModel
    max_answer_tokens: Annotated[int, Unhashed()] = Field(
        default=256,
        ge=8,
        description="most tokens of a generated answer; a longer question leaves room for them",
    )
    answered_share: Annotated[float, HashedUnlessDefault()] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the validation dialogues that each validation answers about; their macro F1 chooses the "
        "product. 0: none, and the loss chooses it",
    )

    @property
    def system_name(self) -> str:
        """The name of the system."""
        return self.system

    @property
    def threads(self) -> int:
        """CPU threads of a rank, under the name that a student's config has for them."""
        return self.threads_per_rank

    @property
    def num_validations(self) -> int:
        """How often a whole training validates. A tiny corpus may have fewer steps than that."""
        return self.optimization.epochs * self.validate_per_epoch

    @property
    def versions(self) -> dict[str, int]:
        """With answers in validation also their length, on which the choice of the product then depends."""
        return super().versions | (
            {"max_answer_tokens": self.max_answer_tokens} if self.answered_share else {}
        )

    @model_validator(mode="after")
    def _answer_fits(self) -> "GenerativeConfig":
        if self.max_answer_tokens * 2 > self.batches.max_prompt_tokens:
            raise ValueError(
                f"max_answer_tokens {self.max_answer_tokens} takes more than half of batches.max_prompt_tokens "
                f"{self.batches.max_prompt_tokens}, which question and answer share; set one of them differently"
            )
        return self
