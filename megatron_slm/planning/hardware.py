"""GPUs by their data sheets: peak rates without sparsity, decimal units.

NVLink and network are per GPU and per direction (data sheets often state both directions together).
Network is that of the maker's own eight-GPU machine: one 400 Gb/s port per GPU in DGX H100, H200
and B200, 200 Gb/s in DGX A100. PCIe cards without a bridge: 16 lanes.

Sources: NVIDIA data sheets of H100, H200, GH200, B200 (DGX B200), A100, A800, H20, L40S; user
guides of DGX A100, H100, H200 and B200.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One device. Rates in FLOP/s and bytes/s, memory in bytes."""

    name: str
    bf16_flops_per_second: float
    fp32_flops_per_second: float
    """Without TF32, torch's default."""
    memory_bytes: float
    memory_bytes_per_second: float
    nvlink_bytes_per_second: float
    network_bytes_per_second: float

    def peak_flops_per_second(self, precision: str) -> float:
        return self.fp32_flops_per_second if precision == "fp32" else self.bf16_flops_per_second


# Longer names first: a device is the first entry all of whose words are in its name.
GPUS = (
    GPU("B200", 2250e12, 75e12, 180e9, 8000e9, 900e9, 50e9),
    GPU("GH200", 989e12, 67e12, 96e9, 4000e9, 450e9, 50e9),
    GPU("H200", 989e12, 67e12, 141e9, 4800e9, 450e9, 50e9),
    GPU("H100 PCIe", 756e12, 51e12, 80e9, 2000e9, 64e9, 50e9),
    GPU("H100 NVL", 835e12, 60e12, 94e9, 3900e9, 300e9, 50e9),
    GPU("H100", 989e12, 67e12, 80e9, 3350e9, 450e9, 50e9),
    GPU("H20", 148e12, 44e12, 96e9, 4000e9, 450e9, 50e9),
    GPU("A100 40GB", 312e12, 19.5e12, 40e9, 1555e9, 300e9, 25e9),
    GPU("A100", 312e12, 19.5e12, 80e9, 2039e9, 300e9, 25e9),
    GPU("A800", 312e12, 19.5e12, 80e9, 2039e9, 200e9, 25e9),
    GPU("L40S", 362e12, 91.6e12, 48e9, 864e9, 32e9, 25e9),
)


def find_gpu(name: str) -> GPU | None:
    """The GPU of a name as people write it (h100) or as the driver does (NVIDIA H100 80GB HBM3).

    None where none is known.
    """
    normalized = name.replace("-", " ").lower()
    for gpu in GPUS:
        if all(word in normalized for word in gpu.name.lower().split()):
            return gpu
    return None
