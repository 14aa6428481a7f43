"""A teacher that no device can hold whole: its parameters partitioned over the ranks of a launch (ZeRO-3 inference).

Every layer's parameters are gathered for the moment of its forward, by all ranks together. So all ranks run the same
number of forwards, in step: before each one they agree on what comes next, and a rank that has nothing to score
takes part with a dummy prompt until none has. Ranks take shards as they like; only forwards are in step.

Shapes: P prompts, A answer words.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any, cast

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from kdecs.errors import Stopped, TrainingError
from kdecs.process import StopSignal
from kdecs.runtime import Runtime
from kdecs.soft_labels.scoring import WaitPolicy
from kdecs.teacher.engine import join_deepspeed
from kdecs.teacher.families import EncodedPrompt, Family
from kdecs.teacher.network import TeacherNetwork
from kdecs.teacher.scoring import TeacherScorer

_DUMMY_TOKENS = 2


class Intent(IntEnum):
    """What a rank is about to do; what the largest of all says, every rank does."""

    LEAVE = 0
    WAIT = 1
    FORWARD = 2
    STOP = 3
    FAIL = 4


class Lockstep(WaitPolicy):
    """The network as a scorer sees it, and how its rank passes the time while others score."""

    def __init__(
        self, engine: nn.Module, teacher: TeacherNetwork, runtime: Runtime, stop: StopSignal
    ) -> None:
        self.family: Family = teacher.family
        self.network = teacher.network
        self.use_tree = teacher.use_tree
        self.may_complete = runtime.is_main
        self.num_forwards = 0
        self._engine, self._device, self._stop = engine, teacher.device, stop
        self._is_over = False
        tokens = np.zeros(_DUMMY_TOKENS, dtype=np.int32)
        self._dummy = [EncodedPrompt(tokens=tokens, answer=_DUMMY_TOKENS - 1)]

    def answers_and_rest(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        """As `TeacherNetwork.answers_and_rest`. Collective: every rank runs one forward.

        Raises Stopped on every rank once any was asked to stop, TrainingError where another rank failed.
        """
        self._agree(Intent.FORWARD)
        return self._forward(prompts)

    def wait(self, seconds: float) -> None:
        """Take part in one forward of others, or let the time pass where none has work. Collective."""
        if self._agree(Intent.WAIT) == Intent.FORWARD:
            self._forward(self._dummy)
        else:
            time.sleep(seconds)

    def finish(self) -> None:
        """Take part until no rank has anything left. Collective."""
        while (intent := self._agree(Intent.LEAVE)) != Intent.LEAVE:
            if intent == Intent.FORWARD:
                self._forward(self._dummy)
        self._is_over = True

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises inside ends the others too, at their next forward. Collective."""
        try:
            yield
        except BaseException as error:
            if not self._is_over:
                with suppress(RuntimeError):  # the others may be gone already
                    self._exchange(Intent.STOP if isinstance(error, Stopped) else Intent.FAIL)
            raise

    @torch.inference_mode()
    def _forward(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        self.num_forwards += 1
        return self._engine(prompts)

    def _agree(self, intent: Intent) -> Intent:
        agreed = self._exchange(Intent.STOP if self._stop.requested else intent)
        self._is_over = agreed in (Intent.STOP, Intent.FAIL)
        if agreed == Intent.STOP:
            raise Stopped("stopped between two forwards; run the same command again to go on")
        if agreed == Intent.FAIL:
            raise TrainingError("another rank failed: see its message; run the same command again to go on")
        return agreed

    def _exchange(self, intent: Intent) -> Intent:
        value = torch.tensor([int(intent)], device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return Intent(int(value.item()))


class _Question(nn.Module):
    """The teacher's forward as DeepSpeed hooks it: the top module's, so that its trace of layers starts anew."""

    def __init__(self, teacher: TeacherNetwork) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        """As `TeacherNetwork.answers_and_rest`."""
        return self.teacher.answers_and_rest(prompts)


def load_partitioned(
    directory: Path,
    *,
    runtime: Runtime,
    stop: StopSignal,
    dtype: str,
    micro_batch_tokens: int,
    base: str | None = None,
    persistence_threshold: int | None = None,
) -> tuple[TeacherScorer, Lockstep]:
    """`TeacherScorer.load` with parameters partitioned over all ranks; no rank ever holds all of them. Collective.

    Parameters of up to `persistence_threshold` values stay whole on each rank (None: DeepSpeed's default).
    """
    zero: dict[str, Any] = {"stage": 3}
    if persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = persistence_threshold
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 1_000_000,
    }
    join_deepspeed(runtime)
    # Transformers looks for a live HfDeepSpeedConfig while it loads; only a weak reference is kept there.
    partitioned = HfDeepSpeedConfig(settings)
    scorer = TeacherScorer.load(
        directory, runtime=runtime, dtype=dtype, micro_batch_tokens=micro_batch_tokens, base=base
    )
    del partitioned
    engine, *_ = deepspeed.initialize(model=_Question(scorer.network), config=settings)
    engine.eval()
    lockstep = Lockstep(engine, scorer.network, runtime, stop)
    return replace(scorer, network=cast(TeacherNetwork, lockstep)), lockstep
