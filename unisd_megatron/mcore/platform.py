"""Device, backend and layer spec: decided once, from what is there, and said aloud."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

import torch

from unisd_megatron.errors import MissingDependency
from unisd_megatron.mcore import cpu

MEGATRON_MIN, MEGATRON_MAX = (0, 16, 1), (0, 19, 2)
"""Versions of megatron-core whose interfaces have been measured; the test suite runs on the first."""


@dataclass(frozen=True)
class Platform:
    """What this machine runs on, and why."""

    device: torch.device
    backend: str  # "nccl" or "gloo"
    layer_spec: str  # "transformer_engine" or "local"
    reason: str


def choose() -> Platform:
    """CUDA with Transformer Engine, CUDA with the local spec, or CPU with gloo.

    Raises `MissingDependency` if megatron-core is absent, or older or newer than the measured versions.
    """
    version = check_megatron()
    if cpu.install():
        return Platform(torch.device("cpu"), "gloo", "local", f"no CUDA: CPU, gloo, local layer spec, megatron-core {version}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if importlib.util.find_spec("transformer_engine") is not None:
        return Platform(
            device,
            "nccl",
            "transformer_engine",
            f"CUDA: NCCL, Transformer Engine (fp32: local spec), megatron-core {version}",
        )
    return Platform(
        device, "nccl", "local", f"CUDA without Transformer Engine: NCCL, local layer spec, megatron-core {version}"
    )


def check_megatron() -> str:
    """The installed megatron-core version; `MissingDependency` outside the measured range or without its hidden needs."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependency("megatron-core is not installed; pip install 'megatron-core==0.16.1'") from error
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not MEGATRON_MIN <= numbers <= MEGATRON_MAX:
        age = "old" if numbers < MEGATRON_MIN else "new"
        raise MissingDependency(
            f"megatron-core {version} is too {age}; 0.16.1 to 0.19.2 are supported: pip install 'megatron-core==0.16.1'"
        )
    if numbers >= (0, 17) and importlib.util.find_spec("triton") is None:
        raise MissingDependency(f"megatron-core {version} needs triton even without a GPU; pip install triton")
    if importlib.util.find_spec("psutil") is None:
        raise MissingDependency(
            "psutil is missing (Megatron's checkpoint writer hangs for ever without it); pip install psutil"
        )
    return version
