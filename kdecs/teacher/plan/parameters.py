"""How many parameters a teacher has, frozen and trained, and what they weigh."""

from dataclasses import dataclass

import torch
from torch import nn

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NF4_BYTES = 0.5 + 0.125 / 8
"""A weight of a 4-bit linear layer: NF4, blocks of 64 with absmax in 8 bits (double quantisation)."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, shared ones once. `small` are those that ZeRO-3 keeps whole on every rank."""

    frozen: int
    trained: int
    frozen_linear: int
    small: int
    largest_module: int

    @property
    def total(self) -> int:
        """All parameters, adapters included."""
        return self.frozen + self.trained

    def frozen_bytes(self, dtype: str, *, in_4bit: bool) -> float:
        """Weight of what is not trained; 4-bit bases keep embeddings, norms and heads in `dtype`."""
        size = DTYPE_BYTES[dtype]
        if not in_4bit:
            return self.frozen * size
        return self.frozen_linear * NF4_BYTES + (self.frozen - self.frozen_linear) * size


def count_parameters(network: nn.Module, *, persistence_threshold: int) -> ParameterCounts:
    """Count a network's parameters, on meta or anywhere else."""
    parameters = list(network.parameters())  # tied ones come once
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    heads = {id(module) for module in (_head(network),) if module is not None}
    linear = sum(
        module.weight.numel()
        for module in network.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module) not in heads
    )
    return ParameterCounts(
        frozen=frozen,
        trained=trained,
        frozen_linear=linear,
        small=sum(p.numel() for p in parameters if p.numel() < persistence_threshold),
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in network.modules()),
    )


def _head(network: nn.Module) -> nn.Module | None:
    get_head = getattr(network, "get_output_embeddings", None)
    return get_head() if get_head is not None else None
