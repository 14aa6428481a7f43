"""The config of the generative baseline's training (`kdecs.launch.train_generative`)."""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from kdecs.baselines.generative.answers import ANSWER_VERSION
from kdecs.config import Unhashed
from kdecs.teacher.config import BATCHES_VERSION, CausalModel, TuningConfig


class GenerativeConfig(TuningConfig):
    """Fine-tuning of a decoder-only model to answer the question about a target in words.

    Where a teacher's config counts pairs, this one counts targets: each target is one question with one answer.
    """

    method_versions: ClassVar[dict[str, int]] = {"answer": ANSWER_VERSION, "batches": BATCHES_VERSION}
    model: CausalModel
    max_answer_tokens: Annotated[int, Unhashed()] = Field(
        default=256,
        ge=8,
        description="most tokens of a generated answer; a longer question leaves room for them",
    )

    @model_validator(mode="after")
    def _answer_fits(self) -> "GenerativeConfig":
        if self.max_answer_tokens * 2 > self.batches.max_prompt_tokens:
            raise ValueError(
                f"max_answer_tokens {self.max_answer_tokens} takes more than half of batches.max_prompt_tokens "
                f"{self.batches.max_prompt_tokens}, which question and answer share; set one of them differently"
            )
        return self
