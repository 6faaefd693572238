"""The plan of one run on a cluster: bytes of every stage's ranks, seconds of a step, whether it fits. No torch here."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from unisd_megatron.config import Run
from unisd_megatron.errors import ConfigError
from unisd_megatron.families import Arch
from unisd_megatron.plan.activations import Activations, Rows, activations, reading
from unisd_megatron.plan.hardware import GIB, Cluster
from unisd_megatron.plan.kernels import Kernels, kernels
from unisd_megatron.plan.memory import Fp8Bytes, RankBytes, fp8_bytes, rank_bytes
from unisd_megatron.plan.request import Assumed, views
from unisd_megatron.plan.rollout import Engine, engine
from unisd_megatron.plan.time import Clock, Seconds
from unisd_megatron.validation import teacher_kind, validate_accelerator


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the ranks of one pipeline stage.

    held: as long as the run lasts; fp8: beside it; activations: at the peak of the student's pass; reading: the teacher's pass
    on top of weights; engine: of the rollout engine; reserved: what is kept free of all this.
    """

    stage: int
    held: RankBytes
    fp8: Fp8Bytes
    activations: Activations
    reading: int
    engine: Engine
    reserved: int
    fragmentation: float

    @property
    def phases(self) -> dict[str, int]:
        """What lies on the device in each phase of a step."""
        held, always = self.held.device + self.fp8.copies, self.engine.training
        return {
            "rollout": held + self.engine.generating + self.fp8.leaving,
            "teacher": held + always + self.held.reading + self.reading,
            "student": held + always + self.activations.total,
        }

    @property
    def peak(self) -> int:
        """Of the phases, with what is lost between allocations and what CUDA and NCCL take."""
        return int(max(self.phases.values()) * (1 + self.fragmentation)) + self.reserved


@dataclass(frozen=True)
class Plan:
    """ranks: by pipeline stage; memory: of the stage that needs the most; seconds: of a step."""

    run: Run
    arch: Arch
    cluster: Cluster
    assumed: Assumed
    how: Kernels
    ranks: tuple[RankMemory, ...]
    engine: Engine

    @property
    def memory(self) -> RankMemory:
        return max(self.ranks, key=lambda one: one.peak)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.cluster.gpu.memory and not self._engine_lacks

    @property
    def _engine_lacks(self) -> int:
        """Bytes that an engine is not granted and needs for the model and one sequence."""
        return max(0, self.engine.needed - self.engine.weights - self.engine.cache)

    @functools.cached_property
    def seconds(self) -> Seconds:
        return Clock(self.run, self.arch, self.cluster, self.how, self.assumed, self.memory.held, self.engine).seconds()

    def with_engine(self, run: Run, one: Engine) -> Plan:
        """The same with the rollout engine of another run, which differs in nothing else."""
        ranks = tuple(dataclasses.replace(rank, engine=one) for rank in self.ranks)
        return dataclasses.replace(self, run=run, ranks=ranks, engine=one)

    def require_fit(self) -> None:
        """Raises `ConfigError` with the worst rank's bytes where the plan does not fit."""
        if self.fits:
            return
        gpu = self.cluster.gpu
        if self._engine_lacks and self.memory.peak <= gpu.memory:
            raise ConfigError(
                f"an engine needs {self.engine.needed / GIB:.1f} GiB for the model and one sequence and is granted "
                f"{(self.engine.weights + self.engine.cache) / GIB:.1f}; raise --vllm_gpu_memory_utilization or "
                "--vllm_tensor_parallel_size"
            )
        worst = self.memory
        phase = max(worst.phases, key=lambda name: worst.phases[name])
        raise ConfigError(
            f"{describe(self.run)}: a rank of pipeline stage {worst.stage} needs {worst.peak / GIB:.1f} GiB ({phase} phase), "
            f"a {gpu.name} has {gpu.memory / GIB:.1f}"
        )

    def lines(self) -> list[str]:
        """The page that `unisd plan` prints."""
        from unisd_megatron.plan.page import lines

        return lines(self)

    def numbers(self) -> dict[str, Any]:
        """Everything, for a machine: settings, bytes of each stage, seconds."""
        stages = [
            {
                **dataclasses.asdict(one.held),
                **{f"activations_{name}": value for name, value in dataclasses.asdict(one.activations).items()},
                "fp8_copies": one.fp8.copies,
                "fp8_leaving": one.fp8.leaving,
                "teacher_pass": one.reading,
                "engine_training": one.engine.training,
                "engine_generating": one.engine.generating,
                "peak": one.peak,
            }
            for one in self.ranks
        ]
        return {
            "layout": dataclasses.asdict(self.run.layout),
            "teacher_memory": self.run.teacher.teacher_memory,
            "vllm": dataclasses.asdict(self.run.vllm),
            "fits": self.fits,
            "gpu_memory": int(self.cluster.gpu.memory),
            "stages": stages,
            "seconds": {**dataclasses.asdict(self.seconds), "step": self.seconds.step},
        }


def describe(run: Run) -> str:
    """A layout in the field's short names."""
    layout = run.layout
    sizes = {
        "TP": layout.tensor_model_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
        "VPP": layout.virtual_pipeline_model_parallel_size or 1,
        "CP": layout.context_parallel_size,
        "EP": layout.expert_model_parallel_size,
    }
    text = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP"))
    return f"{text} MBS {layout.micro_batch_size}"


def plan_run(run: Run, arch: Arch, cluster: Cluster, assumed: Assumed | None = None) -> Plan:
    """The run's own layout, sequences as long as its settings allow. Raises `ConfigError` where it does not divide the model
    or the cluster; whether it fits is the plan's to say."""
    assumed = assumed or Assumed()
    layout = run.layout
    layout.validate(cluster.gpus)
    validate_accelerator(run, cluster.gpus)
    expert = layout.expert_model_parallel_size
    arch.check_layout(layout.tensor_model_parallel_size, layout.virtual_stages, run.model_name, expert, layout.pipeline_ends)
    how, one = kernels(run, arch, cluster), engine(run, arch, cluster)
    rows = Rows(layout.micro_batch_size, run.data.max_prompt_length, run.rollout.max_completion_length)
    fused = run.objective.loss_path != "materialized"
    count = layout.micro_batches(cluster.gpus)
    read = reading(arch, layout, rows, how, fused=fused)
    teacher, heard = teacher_kind(run), views(run)
    lent = run.teacher.teacher_memory != "beside"
    stages = layout.pipeline_model_parallel_size
    ranks = tuple(
        RankMemory(
            stage,
            rank_bytes(
                arch,
                layout,
                world_size=cluster.gpus,
                teacher=teacher,
                teacher_memory=run.teacher.teacher_memory,
                pipeline_rank=stage,
            ),
            fp8_bytes(arch, layout, how, lent=lent, stage=stage),
            activations(
                arch, layout, rows, stage=stage, micro_batches=count, how=how, fused=fused, teacher=teacher is not None
            ),
            read if heard else 0,
            one,
            0 if cluster.on_cpu else int(assumed.reserved),
            0.0 if cluster.on_cpu else assumed.fragmentation,
        )
        # Stages in the middle hold what the first holds without the embedding.
        for stage in sorted({0, min(1, stages - 1), stages - 1})
    )
    return Plan(run, arch, cluster, assumed, how, ranks, one)
