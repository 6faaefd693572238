"""What a run asks of a GPU. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unisd_megatron.errors import ConfigError
from unisd_megatron.setting import setting

_BLOCKS_ON = 9  # the major compute capability whose matrix products take blockwise scales


@dataclass(frozen=True)
class Accelerator:
    """What a GPU is asked to use (Megatron's names). Left out: what is installed and makes sense, said at start."""

    transformer_impl: Literal["transformer_engine", "local"] | None = setting(
        None, "modules of a layer; left out: Transformer Engine's where it is installed and covers the model in bf16"
    )
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = setting(
        "auto",
        "attention kernels: flash-attn's, cuDNN's through Transformer Engine, or matrix products; auto: the best",
    )
    gradient_accumulation_fusion: bool | None = setting(
        None, "weight gradients added to the fp32 buffer by the matrix product itself; left out: where Apex's kernel is there"
    )
    tp_comm_overlap: bool = setting(
        False, "tensor-parallel communication under matrix products (pads every row of a step to one length)"
    )
    overlap_grad_reduce: bool | None = setting(
        None, "gradients reduced over data-parallel ranks during the backward pass; left out: on GPUs with replicas"
    )
    overlap_param_gather: bool | None = setting(
        None, "new weights gathered until something reads them; left out: on GPUs with the distributed optimizer"
    )
    fp8_format: Literal["hybrid", "e4m3"] | None = setting(
        None, "the student's matrix products in FP8: e4m3 forward and e5m2 backward, or e4m3 throughout (Hopper)"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] | None = setting(
        None, "how FP8 is scaled: by past maxima, by each tensor's, or by blocks of 128; left out: tensorwise"
    )
    fp8_param_gather: bool = setting(False, "keep and gather weights in FP8 (fp32 main parameters stay in the optimizer)")
    teacher_fp8: bool = setting(False, "the teacher's matrix products in FP8, whatever the student's are in")

    @property
    def fp8(self) -> bool:
        """Whether anything is computed in FP8."""
        return self.fp8_format is not None or self.teacher_fp8

    @property
    def fp8_flag(self) -> str:
        """The flag that asks for FP8."""
        return "--teacher-fp8" if self.fp8_format is None else "--fp8-format"

    def check_recipe(self, capability: tuple[int, int]) -> None:
        """Raises `ConfigError` for scaling that a GPU of this compute capability is not made for."""
        if self.fp8_recipe == "blockwise" and capability[0] != _BLOCKS_ON:
            major, minor = capability
            raise ConfigError(
                f"--fp8-recipe blockwise is made for Hopper (compute capability 9.0), not {major}.{minor}; use tensorwise"
            )
