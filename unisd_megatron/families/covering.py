"""What Transformer Engine and flash-attn cover of a model, and what a run may therefore ask of them. No torch here."""

from __future__ import annotations

from unisd_megatron.config import Run
from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch

_FLASH_HEAD_DIM = 256  # the largest of flash-attn 2
FLASH_ROWS = "--attention-backend flash: layers of local modules take it for packed rows on one context-parallel rank"


def engine_covers(arch: Arch) -> bool:
    """Whether the family can be built from Transformer Engine's modules: norms behind a block, layers with a RoPE of their own
    and experts have only been built from local ones here."""
    return not arch.sandwich_norms and arch.local is None and arch.experts is None


def flash_covers(arch: Arch, *, bf16: bool, context_parallel_size: int) -> bool:
    """Whether layers of local modules can have flash-attn for their packed rows; windows and grouped queries are no matter."""
    return bf16 and context_parallel_size == 1 and arch.head_dim <= _FLASH_HEAD_DIM


def check_covered(run: Run, arch: Arch) -> None:
    """Raises `ConfigError` where what is asked of Transformer Engine or flash-attn does not suit the model or its layout."""
    asked, layout, shards = run.accelerator, run.layout, run.layout.tensor_model_parallel_size
    wanted = {
        "--fp8-format": asked.fp8_format is not None,
        "--teacher-fp8": asked.teacher_fp8,
        "--tp-comm-overlap": asked.tp_comm_overlap,
        "--transformer-impl transformer_engine": asked.transformer_impl == "transformer_engine",
        "--attention-backend fused": asked.attention_backend == "fused",
    }
    flags = [flag for flag, on in wanted.items() if on]
    if flags and not engine_covers(arch):
        raise ConfigError(
            f"{flags[0]} is Transformer Engine's, and the layers of {run.model_name} are built from local modules; drop it"
        )
    local = asked.transformer_impl == "local" or not engine_covers(arch)
    flash = layout.packing and flash_covers(arch, bf16=layout.bf16, context_parallel_size=layout.context_parallel_size)
    if asked.attention_backend == "flash" and local and not flash:
        raise ConfigError(f"{FLASH_ROWS} and for heads of at most {_FLASH_HEAD_DIM}; use auto")
    widths = {
        "hidden size": arch.hidden_size,
        "feed-forward width": arch.ffn_hidden_size / shards,
        "attention's width": arch.num_attention_heads * arch.head_dim / shards,
        "key-value width": 2 * arch.num_query_groups * arch.head_dim / shards,
    }
    odd = [f"{name} {size:g}" for name, size in widths.items() if size % 16]
    if asked.fp8 and odd:
        raise ConfigError(
            f"{flags[0]}: FP8 matrix products take multiples of 16, and with --tensor-model-parallel-size {shards} a rank of "
            f"{run.model_name} has {odd[0]}; lower it, or drop FP8"
        )
