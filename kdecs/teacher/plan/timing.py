"""How long an epoch takes: operations over what a GPU does of its peak, and bytes over a link.

    compute of a rank  = max(operations / (peak · share of it), launches · time of a launch)
    communication      = bytes that a rank sends or receives / link, by stage:
        0        all-reduce of gradients, 2·P·b·(W-1)/W a step
        1, 2     reduce of gradients, P·b·(W-1)/W a step (stage 2: a micro-step), and as much to gather the update
        3        gathering of all weights in forward and again in backward, 2·(F+P)·b·(W-1)/W a micro-step, and the
                 reduce of gradients, P·b·(W-1)/W a micro-step
    offload           = states or weights over PCIe a step (a micro-step)

Communication is added, not overlapped: an upper bound. The share of the peak (MFU of what the hardware computes,
recomputation included) is an assumption, 40% unless given; so are 6 µs a launched operator, which is what keeps small
micro-batches from being free.
"""

from dataclasses import dataclass

from kdecs.teacher.plan.flops import NetworkFlops
from kdecs.teacher.plan.parameters import DTYPE_BYTES, ParameterCounts
from kdecs.teacher.plan.workload import Workload
from kdecs.teacher.plan.zero import ZeroChoice

LAUNCH_S = 6e-6


@dataclass(frozen=True)
class Speed:
    """What a GPU and its links do: FLOP/s as assumed to be reached, bytes a second between ranks and to the host."""

    flops_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float = 20e9


@dataclass(frozen=True)
class EpochTime:
    """Seconds of an epoch, by what they are spent on."""

    compute_s: float
    communication_s: float
    offload_s: float

    @property
    def total_s(self) -> float:
        """Nothing overlaps."""
        return self.compute_s + self.communication_s + self.offload_s


def epoch_time(
    work: Workload,
    flops: NetworkFlops,
    counts: ParameterCounts,
    choice: ZeroChoice,
    speed: Speed,
    *,
    launches: int,
    skips_hidden: bool,
) -> EpochTime:
    """Time of the busiest ranks. `skips_hidden`: attention computes ancestors alone, not what its mask hides."""
    attended = work.rank_ancestors if skips_hidden else work.rank_attended
    operations = flops.of(tokens=work.rank_tokens, attended_pairs=attended, answers=work.rank_answers).total
    compute = max(operations / speed.flops_per_s, work.micro_steps * launches * LAUNCH_S)
    size = DTYPE_BYTES[choice.dtype]
    others = (choice.ranks - 1) / choice.ranks
    gradients = counts.trained * size * others
    reductions = work.micro_steps if choice.stage >= 2 else work.steps
    sent = gradients * (reductions + work.steps)
    if choice.stage == 3:
        sent = gradients * work.micro_steps + 2 * counts.total * size * others * work.micro_steps
    moved = 0.0
    if choice.offload_optimizer:
        share = counts.trained / (choice.ranks if choice.stage >= 1 else 1)
        moved += 2 * share * size * work.steps
    if choice.offload_parameters:
        moved += 2 * counts.total * size / choice.ranks * work.micro_steps
    return EpochTime(compute, sent / speed.link_bytes_per_s, moved / speed.host_bytes_per_s)
