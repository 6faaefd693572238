"""What a layer of a run is computed with on a cluster, as far as memory and time depend on it. No torch here.

The one place that reads the run's `accelerator` settings. A GPU is taken to have Transformer Engine and flash-attn installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from unisd_megatron.config import Run
from unisd_megatron.errors import ConfigError
from unisd_megatron.families import Arch
from unisd_megatron.families.covering import check_covered, engine_covers, flash_covers
from unisd_megatron.plan.hardware import Cluster


@dataclass(frozen=True)
class Kernels:
    """engine: Transformer Engine's layers; flash: attention that keeps no scores; fused_gate: the gated activation keeps its
    input alone; fp8, teacher_fp8: the student's and the teacher's matrix products; fp8_weights: parameters in FP8;
    overlap: gradients and weights cross data-parallel ranks under computation; tensor_overlap: so do tensor-parallel sums."""

    engine: bool = False
    flash: bool = False
    fused_gate: bool = False
    fp8: bool = False
    teacher_fp8: bool = False
    fp8_weights: bool = False
    overlap: bool = False
    tensor_overlap: bool = False


def kernels(run: Run, arch: Arch, cluster: Cluster) -> Kernels:
    """What mcore/layers.py and mcore/platform.py choose where everything is installed.

    Raises `ConfigError` for FP8 on a GPU that has none, and as `check_recipe` and `check_covered` do, which training asks too.
    """
    asked = run.accelerator
    if asked.fp8 and cluster.gpu.fp8 is None:
        raise ConfigError(f"{asked.fp8_flag}: {cluster.gpu.name} has no FP8; drop it, or plan for another --gpu")
    asked.check_recipe(cluster.gpu.capability)
    check_covered(run, arch)
    if cluster.on_cpu:
        return Kernels()
    layout = run.layout
    engine = layout.bf16 and engine_covers(arch) and asked.transformer_impl != "local"
    flash = flash_covers(arch, bf16=layout.bf16, context_parallel_size=layout.context_parallel_size)
    return Kernels(
        engine=engine,
        flash=asked.attention_backend != "unfused" and (engine or (layout.packing and flash)),
        fused_gate=arch.activation == "silu",
        fp8=asked.fp8_format is not None,
        teacher_fp8=asked.teacher_fp8,
        fp8_weights=asked.fp8_param_gather,
        overlap=asked.overlap_grad_reduce is not False,
        tensor_overlap=asked.tp_comm_overlap,
    )
