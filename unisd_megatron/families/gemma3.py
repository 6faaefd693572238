"""Gemma 3, its language model: norms on both sides of a block, local and global layers, each kind with its own RoPE."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch, Family, LocalAttention, Rope
from unisd_megatron.families.decoder import attention, decoder, feed_forward, norm
from unisd_megatron.families.mapping import Mapping
from unisd_megatron.families.reading import make_rope, number, one_rope, read_arch, refuse, section, whole

LOCAL, GLOBAL = "sliding_attention", "full_attention"

# What a published config leaves out (transformers' Gemma3TextConfig).
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
}


class Gemma3(Family):
    name, model_type = "gemma3", "gemma3_text"

    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        switches = ("attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
        refuse(config, self.name, *switches)
        config = {**DEFAULTS, **config}
        stated = section(config, "rope_parameters")
        of_local, of_global = section(stated, LOCAL), section(stated, GLOBAL)
        scaling = section(config, "rope_scaling")  # of the global layers; transformers reads it over what stands there

        def rope(stated: AbstractMapping[str, Any], base: str) -> Rope:
            return make_rope(config, stated, number(config, base), self.name, "default", "linear")

        both = {**(of_global or {"rope_type": "default"}), **scaling}
        return read_arch(
            config,
            family=self.name,
            rope=one_rope(rope(of_global or scaling, "rope_theta"), rope(both, "rope_theta")),
            local=LocalAttention(
                window=whole(config, "sliding_window"),
                rope=rope(of_local, "rope_local_base_freq"),
                layers=_local_layers(config),
            ),
            activation="gelu_tanh",
            qk_norm=True,
            zero_centered_norms=True,
            sandwich_norms=True,
            embedding_scale=whole(config, "hidden_size") ** 0.5,
            attention_scale=number(config, "query_pre_attn_scalar") ** -0.5,
        )

    def mappings(self, arch: Arch) -> list[Mapping]:
        return decoder(
            arch,
            lambda i: [
                norm(arch, i, "input_layernorm", "input_layernorm"),
                *attention(arch, i),
                norm(arch, i, "self_attention.linear_proj.post_layernorm", "post_attention_layernorm"),
                norm(arch, i, "pre_mlp_layernorm", "pre_feedforward_layernorm"),
                *feed_forward(arch, i),
                norm(arch, i, "mlp.linear_fc2.post_layernorm", "post_feedforward_layernorm"),
            ],
        )

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 96,  # its root is no bf16 number
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL],
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
                GLOBAL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
            "tie_word_embeddings": True,
            "dtype": "float32",
        }


def _local_layers(config: AbstractMapping[str, Any]) -> tuple[bool, ...]:
    """From `layer_types`, or from the older pattern: every n-th layer is global."""
    count = whole(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        every = whole(config, "sliding_window_pattern")
        return tuple((i + 1) % every != 0 for i in range(count))
    if type(kinds) is not list or len(kinds) != count or any(kind not in (LOCAL, GLOBAL) for kind in kinds):
        raise ConfigError(f"config.json: layer_types must name {LOCAL} or {GLOBAL} for each of the {count} layers")
    return tuple(kind == LOCAL for kind in kinds)
