"""Llama 2 to 3.1: grouped-query attention without bias, RoPE with Llama-3.1's frequency scaling."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.families.base import Arch, Family
from unisd_megatron.families.decoder import attention, decoder, feed_forward, norm
from unisd_megatron.families.mapping import Mapping
from unisd_megatron.families.reading import read_arch, read_rope, refuse


class Llama(Family):
    name = model_type = "llama"

    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        refuse(config, self.name, "attention_bias", "mlp_bias")
        return read_arch(config, family=self.name, rope=read_rope(config, self.name, "default", "llama3"))

    def mappings(self, arch: Arch) -> list[Mapping]:
        return decoder(
            arch,
            lambda i: [
                norm(arch, i, "input_layernorm", "input_layernorm"),
                *attention(arch, i),
                norm(arch, i, "pre_mlp_layernorm", "post_attention_layernorm"),
                *feed_forward(arch, i),
            ],
        )

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            "tie_word_embeddings": False,
            "dtype": "float32",
        }
