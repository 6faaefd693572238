"""What a run needs before it is started: bytes per rank, seconds per phase, layouts that fit. Arithmetic; no torch here."""

from __future__ import annotations

from unisd_megatron.plan.hardware import GPUS, Cluster, Gpu, gpu_named
from unisd_megatron.plan.memory import RankBytes, rank_bytes
from unisd_megatron.plan.models import PUBLISHED, config_of, find_arch
from unisd_megatron.plan.plan import Plan, plan_run

__all__ = [
    "GPUS",
    "PUBLISHED",
    "Cluster",
    "Gpu",
    "Plan",
    "RankBytes",
    "config_of",
    "find_arch",
    "gpu_named",
    "plan_run",
    "rank_bytes",
]
