"""The peak memory of a rank: what DeepSpeed holds, and what a micro-batch adds at the worst moment.

    peak = held states + the greatest of
             activations at the start of the backward + buffers that exist by then + what ZeRO-3 has gathered
             the last layers' activations at its end + buffers + what ZeRO-3 has gathered
             temporaries of the optimizer's step (by then nothing of a forward is left)

Gradients count as held throughout, which they are from the second micro-batch of a step on.
"""

from dataclasses import asdict, dataclass
from typing import Any

from kdecs.teacher.plan.activations import Activations
from kdecs.teacher.plan.shapes import DTYPE_BYTES, ParameterCounts

REDUCE_BUCKET = 500_000_000
PERSISTENCE_THRESHOLD = 100_000
MAX_LIVE = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
SUB_GROUP = 1_000_000_000
"""DeepSpeed's defaults in elements, which the teacher's engine does not change."""


@dataclass(frozen=True)
class ZeroChoice:
    """How ZeRO lays out a training over ranks."""

    stage: int
    ranks: int
    dtype: str
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank on its device, and in main memory (`host`) if states are offloaded.

    `empty_buffers` is the part of `buffers` that does not exist yet when a backward starts.
    """

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    buffers: float
    gathered: float
    step: float
    host: float = 0.0
    empty_buffers: float = 0.0

    @property
    def held(self) -> float:
        """Bytes held from one step to the next."""
        return self.weights + self.adapters + self.gradients + self.optimizer


def state_bytes(
    counts: ParameterCounts, choice: ZeroChoice, *, in_4bit: bool = False, is_gpu: bool = True
) -> StateBytes:
    """States and buffers of the rank that holds the most. Full tuning counts its weights as `adapters`."""
    size = DTYPE_BYTES[choice.dtype]
    trained, ranks, stage = counts.trained, choice.ranks, choice.stage
    share = trained / ranks if stage >= 1 else trained
    # Stages 1 to 3 keep an fp32 master copy even of fp32 weights.
    has_master = stage >= 1 or size < 4
    frozen = counts.frozen_bytes(choice.dtype, in_4bit=in_4bit)
    # Bytes per parameter: two fp32 moments of AdamW, and the master copy.
    optimizer = share * (12 if has_master else 8)
    gradients = size * (share if stage >= 2 else trained)
    # The step converts gradients to fp32 (ZeRO-3: a sub-group at a time), and AdamW needs two temporaries.
    step_share = min(share, SUB_GROUP) if stage == 3 else share
    step = step_share * (4 * has_master + 8)
    # A GPU allocates the whole bucket however few parameters are trained; on a CPU untouched pages cost nothing.
    bucket = REDUCE_BUCKET if is_gpu else min(REDUCE_BUCKET, trained)
    buffers = size * (bucket if stage >= 1 else 0)
    # On a CPU, stages 1 and 2 allocate the bucket for each backward, which fills it only by its end.
    empty = 0.0 if is_gpu or stage == 3 else buffers
    if stage == 0:  # flattened for the all-reduce, once the backward is over
        step = max(step, size * min(trained, REDUCE_BUCKET))
    gathered = _gathered(counts, choice) * size if stage == 3 else 0.0
    host = 0.0
    if stage == 3:
        frozen, adapters = frozen / ranks, trained * size / ranks
    else:
        adapters = trained * size
    if choice.offload_optimizer:
        # Stages 2 and 3 send gradients to the CPU as they arise. Stage 1 keeps them on the device until the step.
        host += optimizer + step + gradients + share * size
        optimizer, step = 0.0, 0.0
        gradients = size * trained if stage == 1 else 0.0
    if choice.offload_parameters:
        host += frozen + adapters
        frozen, adapters = 0.0, 0.0
    return StateBytes(frozen, adapters, gradients, optimizer, buffers, gathered, step, host, empty)


def _gathered(counts: ParameterCounts, choice: ZeroChoice) -> float:
    """Elements that ZeRO-3 holds whole at once: small ones always, the others up to its bounds.

    What it prefetches exists twice until the last parameter of a batch is used: in the gathered buffer, and copied out
    of it. A batch ends with the parameter that fills its bucket; at the end of a forward, that is the output embedding.
    """
    if choice.ranks == 1 and not choice.offload_parameters:
        return 0.0  # a single rank's part is the whole parameter, used in place
    large = counts.total - counts.small
    batch = min(large, PREFETCH_BUCKET + counts.largest_module)
    return counts.small + min(large, MAX_LIVE) + batch


GIB = 2**30


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of a rank at its peak, by part. `reserve` is what the driver and the libraries take of a GPU."""

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
        """Bytes of the device. Activations and the step's temporaries never exist at the same time."""
        held = self.weights + self.adapters + self.gradients + self.optimizer + self.reserve
        return held + max(self.activations + self.buffers + self.gathered, self.step)

    def as_dict(self) -> dict[str, Any]:
        """Parts and total in GiB, for JSON."""
        return {f"{name}_gib": value / GIB for name, value in {**asdict(self), "total": self.total}.items()}


@dataclass(frozen=True)
class Limits:
    """What a rank may take: bytes of its device and of main memory (None: not limited)."""

    device: float
    host: float | None = None

    def allow(self, memory: PeakMemory) -> bool:
        """Whether a peak fits."""
        return memory.total <= self.device and (self.host is None or memory.host <= self.host)


def peak_memory(states: StateBytes, activations: Activations, *, reserve: float = 0.0) -> PeakMemory:
    """Add a rank's states and activations; activations and buffers are those of the worse moment."""
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
