"""What a run needs before it is started: bytes per rank, seconds per phase, layouts that fit. Arithmetic; no torch here."""

from __future__ import annotations

from unisd_megatron.families import Arch
from unisd_megatron.plan.hardware import GPUS, Cluster, Gpu, gpu_named
from unisd_megatron.plan.memory import RankBytes, rank_bytes
from unisd_megatron.plan.models import PUBLISHED, config_of, find_arch
from unisd_megatron.plan.plan import Plan, plan_run
from unisd_megatron.plan.request import Assumed
from unisd_megatron.plan.search import flags, propose, refuse

__all__ = [
    "GPUS",
    "PUBLISHED",
    "Arch",
    "Assumed",
    "Cluster",
    "Gpu",
    "Plan",
    "RankBytes",
    "config_of",
    "find_arch",
    "flags",
    "gpu_named",
    "plan_run",
    "propose",
    "rank_bytes",
    "refuse",
]
