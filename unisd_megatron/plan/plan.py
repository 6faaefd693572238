"""The plan of one run: its own layout on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from unisd_megatron.config import Run
from unisd_megatron.families import Arch
from unisd_megatron.plan.hardware import GIB, Cluster
from unisd_megatron.plan.memory import RankBytes, rank_bytes


@dataclass(frozen=True)
class Plan:
    """ranks: what the first replica's rank of each pipeline stage holds; memory: the worst of them."""

    run: Run
    arch: Arch
    cluster: Cluster
    ranks: tuple[RankBytes, ...]

    @property
    def memory(self) -> RankBytes:
        return max(self.ranks, key=lambda one: one.device)

    @property
    def fits(self) -> bool:
        return self.memory.device <= self.cluster.gpu.memory

    def lines(self) -> list[str]:
        """The page that `unisd plan` prints."""
        held = self.memory
        parts = {name: getattr(held, name) for name in ("weights", "gradients", "optimizer", "teacher", "ema")}
        return [f"{name:12} {count / GIB:8.2f} GiB" for name, count in parts.items()]


def plan_run(run: Run, arch: Arch, cluster: Cluster) -> Plan:
    """Raises `ConfigError` where the run's layout does not divide the model or the cluster."""
    layout = run.layout
    layout.validate(cluster.gpus)
    expert = layout.expert_model_parallel_size
    arch.check_layout(layout.tensor_model_parallel_size, layout.virtual_stages, run.model_name, expert)
    how = {"teacher": run.teacher.teacher or "frozen", "teacher_memory": run.teacher.teacher_memory}
    stages = range(layout.pipeline_model_parallel_size)
    ranks = (rank_bytes(arch, layout, world_size=cluster.gpus, pipeline_rank=stage, **how) for stage in stages)
    return Plan(run, arch, cluster, tuple(ranks))
