"""The peak of a rank: what DeepSpeed holds, and what a micro-batch adds at the worst moment.

    peak = held states + the greatest of
             activations at the start of the backward + buffers as far as they are there + what ZeRO-3 has gathered
             the last layers' activations at its end + buffers + what ZeRO-3 has gathered
             temporaries of the optimizer's step (nothing of a forward is left then)

Gradients are counted as held throughout: they are, from the second micro-batch of a step on.
"""

from dataclasses import asdict, dataclass
from typing import Any

from kdecs.teacher.plan.activations import Activations
from kdecs.teacher.plan.zero import StateBytes

GIB = 2**30


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of a rank at its peak, by part; `reserve` is what the driver and the libraries take of a GPU."""

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    gathered: float
    step: float
    reserve: float
    host: float

    @property
    def total(self) -> float:
        """Bytes of the device; activations and the step's temporaries never stand together."""
        held = self.weights + self.adapters + self.gradients + self.optimizer + self.reserve
        return held + max(self.activations + self.buffers + self.gathered, self.step)

    def as_dict(self) -> dict[str, Any]:
        """Parts and total in GiB, for JSON."""
        return {f"{name}_gib": value / GIB for name, value in {**asdict(self), "total": self.total}.items()}


@dataclass(frozen=True)
class Limits:
    """What a rank may take: bytes of its device, and of main memory (None: not limited)."""

    device: float
    host: float | None = None

    def allow(self, memory: PeakMemory) -> bool:
        """Whether a peak fits."""
        return memory.total <= self.device and (self.host is None or memory.host <= self.host)


def peak_memory(states: StateBytes, activations: Activations, *, reserve: float = 0.0) -> PeakMemory:
    """States and activations of a rank together, in bytes; activations and buffers are those of the worse moment."""
    start = (activations.peak_bytes, states.buffers - states.empty_buffers)
    end = (activations.backward_end_bytes, states.buffers)
    active, buffers = max(start, end, key=sum)
    return PeakMemory(
        weights=states.weights,
        adapters=states.adapters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=active,
        buffers=buffers,
        gathered=states.gathered,
        step=states.step,
        reserve=reserve,
        host=states.host,
    )
