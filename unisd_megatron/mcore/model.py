"""A Megatron GPT model that ends at its final norm: `Arch` in, this rank's stage out.

The language-model head is a weight of the last stage that the loss reads; the forward pass never makes logits. That
keeps the loss room free to select completion rows and to walk the vocabulary in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from unisd_megatron.config import Layout
from unisd_megatron.families import Arch
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.layers import layer_spec
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.mcore.precision import is_quantized, write
from unisd_megatron.mcore.rope import rotary_embedding
from unisd_megatron.mcore.shards import EXPERTS

# Transformer Engine folds each norm into the linear layer behind it; one name for both specs.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage returns the output of the final norm, `[s, b, h]` (`[s/t, b, h]` under sequence parallel).

    Overrides `_postprocess`, which is private but the same in megatron-core 0.16.1 and 0.19.2.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's vocabulary shard of the head, `[V/t, h]`; on the last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def named_shards(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters under canonical names: local-spec names with global layer and expert numbers."""
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = self.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
                if EXPERTS in name:
                    parts[6] = str(layer.mlp.local_expert_indices[int(parts[6])])
                tail = ".".join(parts[3:])
                name = ".".join([*parts[:3], _FUSED_NORMS.get(tail, tail)])
            yield name, parameter


class Stage:
    """This rank's pipeline stage: one chunk of layers, or several under virtual pipeline parallelism.

    Attributes: chunks: in the order in which a sequence passes them; settle: called before weights are read: waits for those
    that are on their way from other ranks (`Student.step`).
    """

    def __init__(self, chunks: Sequence[HiddenStateModel]) -> None:
        self.chunks = list(chunks)
        self.settle: Callable[[], None] = lambda: None

    @property
    def config(self) -> TransformerConfig:
        return self.chunks[0].config

    def head_weight(self) -> Tensor:
        """This rank's vocabulary shard of the head, `[V/t, h]`; on the last stage only."""
        self.settle()
        return self.chunks[-1].head_weight()

    def named_shards(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters under canonical names; see `HiddenStateModel.named_shards`."""
        self.settle()
        for chunk in self.chunks:
            yield from chunk.named_shards()

    def sharded_state_dict(self, prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """What `dist_checkpointing` saves and loads, by chunk; layers are keyed by their global number, whatever the layout."""
        return {str(i): chunk.sharded_state_dict(prefix=prefix, metadata=metadata) for i, chunk in enumerate(self.chunks)}

    def load_state_dict(self, loaded: dict[str, Any], prefix: str) -> None:
        """Takes what `dist_checkpointing.load` made of `sharded_state_dict(prefix)`."""
        for i, chunk in enumerate(self.chunks):
            values = {name.removeprefix(prefix): value for name, value in loaded[str(i)].items()}
            chunk.load_state_dict(values)
            for name, parameter in chunk.named_parameters():
                if is_quantized(parameter):
                    write(parameter, values[name])


def build(arch: Arch, layout: Layout, platform: Platform, grid: Grid) -> Stage:
    """This rank's stage of the model, with random weights, on the platform's device. Collective."""
    config = transformer_config(arch, layout, platform)
    count = layout.virtual_pipeline_model_parallel_size or 1
    return Stage([_chunk(arch, config, platform, grid, i if count > 1 else None, count) for i in range(count)])


def _chunk(
    arch: Arch, config: TransformerConfig, platform: Platform, grid: Grid, number: int | None, count: int
) -> HiddenStateModel:
    """Chunk `number` of `count` (None: the only one)."""
    model = HiddenStateModel(
        config,
        layer_spec(arch, config, platform, number),
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position,
        pre_process=grid.is_first_stage and (number or 0) == 0,
        post_process=grid.is_last_stage and (number or 0) == count - 1,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        vp_stage=number,
    )
    model.rotary_pos_emb = rotary_embedding(arch, config)
    if arch.embedding_scale is not None and model.pre_process:
        model.embedding.register_forward_hook(partial(_scaled, arch.embedding_scale))
    return model.to(platform.device) if platform.device.type == "cuda" else model


def _scaled(scale: float, module: torch.nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
    return embedded * torch.tensor(scale, dtype=embedded.dtype, device=embedded.device)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def transformer_config(arch: Arch, layout: Layout, platform: Platform) -> TransformerConfig:
    """Megatron's configuration of the model and the layout."""
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    on_gpu = platform.device.type == "cuda"
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu if arch.activation == "silu" else _gelu_tanh,
        add_bias_linear=arch.linear_bias,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,  # also has the gradients of these norms summed over the heads of all ranks
        softmax_scale=arch.attention_scale,
        **_of_local_layers(arch),
        **_of_experts(arch),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        account_for_embedding_in_pipeline_split=layout.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=layout.account_for_loss_in_pipeline_split,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.tensor_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=layout.bf16,
        # Micro-batches are as long as they need to be. The interleaved schedule announces lengths in batches of messages
        # that cross between two ranks, so there all of a schedule have one length (train/collate.py).
        variable_seq_lengths=layout.pipeline_model_parallel_size > 1 and layout.virtual_pipeline_model_parallel_size is None,
        # Batched p2p crosses two messages between the same two ranks (silently wrong gradients when interleaved).
        batch_p2p_comm=False,
        # The loss is normalised over the global batch before Megatron sees it: sum over micro-batches and replicas.
        calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable_seq_lengths, experts or none
        use_cpu_initialization=not on_gpu,
        # Not to be skipped though every weight is loaded: it marks the shards as such, and without the marks Megatron
        # counts only rank 0's shards in the gradient norm (silently wrong clipping at TP > 1).
        perform_initialization=True,
        gradient_accumulation_fusion=platform.gradient_accumulation_fusion,
        tp_comm_overlap=platform.tp_comm_overlap,
        # The local spec has one core attention (mcore/layers.py), and Megatron's field acts on Transformer Engine alone.
        attention_backend=AttnBackend[platform.attention] if on_gpu else AttnBackend.auto,
        fp8=platform.fp8_format,
        fp8_recipe=platform.fp8_recipe,
        fp8_param=platform.fp8_param_gather,
        fp8_amax_history_len=1024,  # Transformer Engine's own defaults; Megatron's are 1 and the latest
        fp8_amax_compute_algo="max",
        masked_softmax_fusion=False,
        bias_activation_fusion=on_gpu and arch.activation == "silu",
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=on_gpu,
        recompute_granularity=layout.recompute_granularity,
        recompute_method="uniform" if layout.recompute_granularity == "full" else None,
        recompute_num_layers=1 if layout.recompute_granularity == "full" else None,
    )


def _of_local_layers(arch: Arch) -> dict[str, Any]:
    if arch.local is None:
        return {}
    return {"window_size": (arch.local.window - 1, 0), "window_attn_skip_freq": [int(local) for local in arch.local.layers]}


def _of_experts(arch: Arch) -> dict[str, Any]:
    if arch.experts is None:
        return {}
    return {
        "num_moe_experts": arch.experts.count,
        "moe_ffn_hidden_size": arch.ffn_hidden_size,
        "moe_router_topk": arch.experts.per_token,
        # Softmax over the chosen alone is the softmax over all, renormalised.
        "moe_router_pre_softmax": not arch.experts.renormalized,
        "moe_router_load_balancing_type": "none",  # the loss is the method's, nothing else
        "moe_aux_loss_coeff": 0.0,
    }
