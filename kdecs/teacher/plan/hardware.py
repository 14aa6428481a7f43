"""Known GPUs: memory, peak and links, from the makers' data sheets.

Peaks are those of dense tensor (matrix) cores in bfloat16 with float32 sums, without sparsity; V100 and T4 in float16,
since they have no bfloat16. Sources: NVIDIA's data sheets of V100, T4, A10, A10G, A30, A40, A100, L4, L40S, H100, H200
and HGX B200, the Ampere GA102 and Ada architecture papers (RTX), AMD's data sheets of MI250X and MI300X. `link_gb_s`
is one direction between the GPUs of a node: half of the NVLink (or Infinity Fabric) total, or PCIe where there is none.
"""

import re
from dataclasses import dataclass

from kdecs.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Name, memory in GiB, peak in TFLOP/s by kind of number, link in GB/s."""

    name: str
    memory_gib: float
    peak_tflops: float
    float32_tflops: float
    link_gb_s: float

    def peak_at(self, dtype: str) -> float:
        """TFLOP/s in a dtype. float32 runs without tensor cores."""
        return self.float32_tflops if dtype == "float32" else self.peak_tflops


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 15, 65, 8.1, 13),
        Gpu("v100-16g", 16, 125, 15.7, 150),
        Gpu("v100-32g", 32, 125, 15.7, 150),
        Gpu("a10", 22, 125, 31.2, 26),
        Gpu("a10g", 22, 70, 35, 26),
        Gpu("a30", 24, 165, 10.3, 100),
        Gpu("a40", 45, 149.7, 37.4, 56),
        Gpu("a100-40g", 40, 312, 19.5, 300),
        Gpu("a100-80g", 80, 312, 19.5, 300),
        Gpu("rtx-3090", 24, 71, 35.6, 26),
        Gpu("rtx-4090", 24, 165.2, 82.6, 26),
        Gpu("l4", 22, 121, 30.3, 26),
        Gpu("l40s", 45, 362, 91.6, 26),
        Gpu("h100-80g", 80, 989, 67, 450),
        Gpu("h100-pcie", 80, 756, 51, 52),
        Gpu("h200", 140, 989, 67, 450),
        Gpu("b200", 180, 2250, 75, 900),
        # One of its two dies, which is what a process sees.
        Gpu("mi250x", 64, 191.5, 23.9, 50),
        Gpu("mi300x", 192, 1307, 163.4, 448),
    )
}


# Words that make a device another one than the table's: a laptop's RTX 4090 has other memory and another peak, and a
# MIG slice is a part of a card.
_OTHERS = {"laptop", "mobile", "max", "mig"}


def gpu_of_device(device_name: str, memory_gib: float) -> Gpu | None:
    """The table's entry for a device as its driver names it ("NVIDIA H100 PCIe"), or None if there is none.

    All words of the entry must be words of the name; the entry with the most words counts ("h100-pcie" before
    "h100-80g"), then the one with the nearest memory.
    """
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & _OTHERS:
        return None
    found = [(len(parts), gpu) for gpu in GPUS.values() if (parts := _model_words(gpu.name)) <= words]
    nearest = min(found, key=lambda f: (-f[0], abs(f[1].memory_gib - memory_gib)), default=None)
    return None if nearest is None else nearest[1]


def _model_words(name: str) -> set[str]:
    """Without the memory that tells two variants of one model apart."""
    return {word for word in name.split("-") if not re.fullmatch(r"\d+g", word)}


def find_gpu(name: str) -> Gpu:
    """A known GPU by name. Raises ConfigError, which lists the known ones."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(
            f"--gpu {name}: not in the table of known GPUs ({', '.join(GPUS)}); "
            "give --gpu-memory-gib and --set peak_tflops=NUMBER instead"
        )
    return gpu
