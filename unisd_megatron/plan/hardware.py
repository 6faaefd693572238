"""GPUs by name, and the cluster that a plan is made for. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unisd_megatron.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What one accelerator has, as its vendor states it; bandwidths in bytes per second and one direction.

    memory: bytes, as the driver reports them; bf16, fp8: dense floating-point operations per second (fp8 None: it has none);
    capability: CUDA's, (0, 0) without; hbm: of its memory; link: to the other GPUs of its node; network: its part of the node's
    network.
    """

    name: str
    memory: float
    bf16: float
    fp8: float | None
    capability: tuple[int, int]
    hbm: float
    link: float
    network: float


def _gpu(
    name: str,
    capability: tuple[int, int],
    gib: float,
    bf16: float,
    fp8: float | None,
    hbm_tb: float,
    link_gb: float,
    network_gbit: float,
) -> tuple[str, Gpu]:
    fp8_rate = None if fp8 is None else fp8 * 1e12
    return name, Gpu(name, gib * GIB, bf16 * 1e12, fp8_rate, capability, hbm_tb * 1e12, link_gb * 1e9, network_gbit * 1e9 / 8)


# Vendor's data sheets (NVIDIA A100, H100, H200, HGX B200, H20, L40S), rates without sparsity; memory as nvidia-smi shows it.
# Network: one NIC per GPU as the vendor's own systems have (DGX A100 200 Gb/s, DGX H100 and B200 400 Gb/s), L40S 100 Gb/s.
# NVLink per direction is half of the figure that is printed. `cpu` stands for a process of a test: a few cores, no network.
GPUS: Mapping[str, Gpu] = dict(
    [
        _gpu("a100-40", (8, 0), 40.0, 312, None, 1.555, 300, 200),
        _gpu("a100-80", (8, 0), 80.0, 312, None, 2.039, 300, 200),
        _gpu("h100", (9, 0), 79.6, 989, 1979, 3.35, 450, 400),
        _gpu("h200", (9, 0), 140.4, 989, 1979, 4.8, 450, 400),
        _gpu("b200", (10, 0), 179.0, 2250, 4500, 7.7, 900, 400),
        _gpu("h20", (9, 0), 95.6, 148, 296, 4.0, 450, 400),
        _gpu("l40s", (8, 9), 45.0, 362, 733, 0.864, 32, 100),
        _gpu("cpu", (0, 0), 16.0, 0.1, None, 0.02, 5, 10),
    ]
)


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes of one size. `ConfigError` for sizes that are none."""

    gpus: int
    gpus_per_node: int
    gpu: Gpu

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise ConfigError(f"{self.gpus} GPUs in nodes of {self.gpus_per_node} are no cluster; both are at least 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ConfigError(f"--gpus {self.gpus} is not a multiple of --gpus-per-node {self.gpus_per_node}")

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def on_cpu(self) -> bool:
        return self.gpu.name == "cpu"


def gpu_named(name: str) -> Gpu:
    """`ConfigError` names the known ones."""
    if name.lower() not in GPUS:
        raise ConfigError(f"unknown --gpu {name!r}; use one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
