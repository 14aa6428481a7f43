"""What DeepSpeed holds on a rank beside activations, by ZeRO stage, dtype and offload.

P trained and F frozen parameters, b bytes of the dtype, W ranks. As DeepSpeed 0.19 holds them (Rajbhandari et al.
2020, but a frozen base has no gradients and no optimizer states):

                     stage 0          stage 1            stage 2            stage 3
    weights          F·b              F·b                F·b                F·b/W + what is gathered
    adapters         P·b              P·b                P·b                P·b/W (small ones whole beside)
    gradients        P·b              P·b                P·b/W              P·b/W
    master, fp32     P·4 unless b=4   P·4/W              P·4/W              P·4/W
    Adam moments     P·8              P·8/W              P·8/W              P·8/W
    in the step      fp32 gradients P·4 unless they are there, and two temporaries of AdamW, both of a rank's share
    buffers          reduce: P·b      bucket             bucket             bucket

Stages 1 to 3 keep an fp32 master copy even of fp32 weights. A bucket is `reduce_bucket_size` elements of the dtype,
allocated whole on a GPU whatever P is. On a CPU its untouched pages cost nothing: stages 1 and 2 allocate it for each
backward, which fills it up to P; stage 3 keeps it.
"""

from dataclasses import dataclass

from kdecs.teacher.plan.parameters import DTYPE_BYTES, ParameterCounts

REDUCE_BUCKET = 500_000_000
PERSISTENCE_THRESHOLD = 100_000
MAX_LIVE = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
SUB_GROUP = 1_000_000_000
"""DeepSpeed's defaults (elements), which the teacher's engine leaves as they are."""


@dataclass(frozen=True)
class ZeroChoice:
    """How a training is laid out over ranks."""

    stage: int
    ranks: int
    dtype: str
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank on its device; `host` is beside it in main memory, where states are offloaded.

    `empty_buffers`: what of `buffers` is not there yet when a backward starts.
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
        """What stands from one step to the next."""
        return self.weights + self.adapters + self.gradients + self.optimizer


def state_bytes(
    counts: ParameterCounts, choice: ZeroChoice, *, in_4bit: bool = False, is_gpu: bool = True
) -> StateBytes:
    """States and buffers of the rank that holds most. A full tuning has its weights under `adapters`."""
    size = DTYPE_BYTES[choice.dtype]
    trained, ranks, stage = counts.trained, choice.ranks, choice.stage
    share = trained / ranks if stage >= 1 else trained
    has_master = stage >= 1 or size < 4
    frozen = counts.frozen_bytes(choice.dtype, in_4bit=in_4bit)
    optimizer = share * (12 if has_master else 8)
    gradients = size * (share if stage >= 2 else trained)
    # Gradients become fp32 in the step, a sub-group of ZeRO-3 at a time; AdamW has two temporaries.
    step_share = min(share, SUB_GROUP) if stage == 3 else share
    step = step_share * (4 * has_master + 8)
    bucket = REDUCE_BUCKET if is_gpu else min(REDUCE_BUCKET, trained)
    buffers = size * (bucket if stage >= 1 else 0)
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
        host += optimizer + step + gradients + share * size
        optimizer, step = 0.0, 0.0
        gradients = size * trained if stage == 1 else 0.0
    if choice.offload_parameters:
        host += frozen + adapters
        frozen, adapters = 0.0, 0.0
    return StateBytes(frozen, adapters, gradients, optimizer, buffers, gathered, step, host, empty)


def _gathered(counts: ParameterCounts, choice: ZeroChoice) -> float:
    """Elements that ZeRO-3 holds whole at once: small ones always, the rest up to its bounds.

    What it fetches ahead lies there twice until the last of a batch is used: in the gathered buffer, and copied out of
    it. A batch ends with the parameter that fills its bucket, at the end of a forward the output embedding.
    """
    if choice.ranks == 1 and not choice.offload_parameters:
        return 0.0  # a single rank's part is the whole, used where it lies
    large = counts.total - counts.small
    batch = min(large, PREFETCH_BUCKET + counts.largest_module)
    return counts.small + min(large, MAX_LIVE) + batch
