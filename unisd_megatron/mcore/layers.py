"""Which modules a layer is made of: Transformer Engine's on a GPU in bf16 where they cover the family, else local ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from unisd_megatron.families import Arch
from unisd_megatron.families.covering import engine_covers, flash_covers
from unisd_megatron.mcore.attention import FlashSegmentAttention, LocalGlobalSelfAttention, SegmentAttention
from unisd_megatron.mcore.experts import ReplicatedTokensMoELayer, Router
from unisd_megatron.mcore.norm import RowParallelLinearThenNorm, SequenceParallelRMSNorm, ZeroCenteredRMSNorm
from unisd_megatron.mcore.platform import Platform


def layer_spec(
    arch: Arch, config: TransformerConfig, platform: Platform, chunk: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of pipeline chunk `chunk` (None: the stage has only one)."""
    # In fp32 Transformer Engine has no attention for packed rows.
    if platform.layer_spec == "transformer_engine" and config.bf16 and engine_covers(arch):
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm)
    spec = _local_spec(arch, config, platform)
    norm = ZeroCenteredRMSNorm if arch.zero_centered_norms else SequenceParallelRMSNorm
    return TransformerBlockSubmodules([spec] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=norm)


def _local_spec(arch: Arch, config: TransformerConfig, platform: Platform) -> ModuleSpec:
    experts = None if arch.experts is None else arch.experts.count
    spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    norm = ZeroCenteredRMSNorm if arch.zero_centered_norms else SequenceParallelRMSNorm
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    flash = platform.flash_attn and platform.attention in ("auto", "flash")
    covered = flash_covers(arch, bf16=config.bf16, context_parallel_size=config.context_parallel_size)
    attention.core_attention = FlashSegmentAttention if flash and covered else SegmentAttention
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    if arch.local is not None:
        layer.self_attention.module = LocalGlobalSelfAttention
    if arch.sandwich_norms:
        attention.linear_proj = RowParallelLinearThenNorm
        layer.mlp = _with(layer.mlp, linear_fc2=RowParallelLinearThenNorm)
    if arch.experts is not None:
        replicated = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        layer.mlp = _with(layer.mlp, ReplicatedTokensMoELayer if replicated else None, router=Router)
    return spec


def _with(mlp: ModuleSpec | functools.partial[Any], module: type | None = None, **submodules: type) -> Any:
    """What builds a layer's MLP, with other submodules and perhaps as another module.

    megatron-core 0.16 has a spec for it, 0.19 a partial of the class or of its constructor.
    """
    if isinstance(mlp, functools.partial):
        changed = dataclasses.replace(mlp.keywords["submodules"], **submodules)
        return functools.partial(module or mlp.func, *mlp.args, **{**mlp.keywords, "submodules": changed})
    return dataclasses.replace(mlp, module=module or mlp.module, submodules=dataclasses.replace(mlp.submodules, **submodules))
