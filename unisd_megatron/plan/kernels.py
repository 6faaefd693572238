"""What a layer of a run is computed with on a cluster, as far as memory and time depend on it. No torch here.

The one place that reads the run's `accelerator` settings. A GPU is taken to have Transformer Engine and flash-attn installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from unisd_megatron.config import Run
from unisd_megatron.families import Arch
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
    """What mcore/layers.py and mcore/platform.py choose where everything is installed."""
    if cluster.on_cpu:
        return Kernels()
    asked = getattr(run, "accelerator", None)
    covered = not arch.sandwich_norms and arch.local is None and arch.experts is None
    return Kernels(
        engine=run.layout.bf16 and covered and getattr(asked, "transformer_impl", None) != "local",
        flash=run.layout.bf16 and getattr(asked, "attention_backend", "auto") != "unfused",
        fused_gate=arch.activation == "silu",
        fp8=getattr(asked, "fp8_format", None) is not None,
        teacher_fp8=getattr(asked, "teacher_fp8", False),
        fp8_weights=getattr(asked, "fp8_param_gather", False),
        overlap=asked is not None and getattr(asked, "overlap_grad_reduce", None) is not False,
        tensor_overlap=getattr(asked, "tp_comm_overlap", False),
    )
